# SPDX-License-Identifier: Apache-2.0
"""Figures of the audit: every tree, statement and machine is in them, and nothing lies over anything else."""

from itertools import combinations, product

import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

from aiterlab import plots
from aiterlab.plots.audit import CHOICES, JUDGED

TREES = [f"release:0.{minor}.0" for minor in range(11, 33)]
STATEMENTS = ["explicit choice", "availability", "only what is available"]
GPUS = ["gfx90a", "gfx942", "gfx1201"]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def judged():
    verdicts = ["holds", "broken", "not applicable", "unknown"]
    lines = [
        {"tree": tree, "statement": statement, "verdict": verdicts[i % 4], "violations": 7 if i % 4 == 1 else 0}
        for i, (tree, statement) in enumerate(product(TREES, STATEMENTS))
    ]
    return pd.DataFrame(lines)


@pytest.fixture
def chosen():
    """In the order of a matrix: the switch varies slowest."""
    lines = [
        {"tree": tree, "arch": gpu, "aiter": aiter, "switch": switch, "outcome": "ROCM_ATTN"}
        for tree, switch, gpu, aiter in product(TREES[:3], ("unset", "0", "1"), GPUS, ("present", "absent"))
    ]
    return pd.DataFrame(lines)


def signs(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def overlaps(figure, texts) -> list[tuple[str, str]]:
    figure.canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]


def test_verdicts_has_a_square_for_every_judgement_and_counts_contradictions(judged):
    figure = plots.verdicts(judged, "told")
    (ax,) = figure.axes
    assert len(ax.patches) == len(judged)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == TREES
    assert [tick.get_text() for tick in ax.get_xticklabels()] == STATEMENTS
    assert [signs(ax).count(sign) for sign in ("✓", "7", "–", "?")] == list(judged.groupby("verdict").size()[
        ["holds", "broken", "not applicable", "unknown"]
    ])  # fmt: skip
    assert len(legend(figure)) == 4 and figure._suptitle.get_text() == "told"


def test_verdicts_explains_only_what_is_there(judged):
    figure = plots.verdicts(judged[judged["verdict"] == "holds"], "told")
    assert legend(figure) == ["✓  holds"]


def test_choices_groups_columns_by_gpu_whatever_the_order_of_the_answers(chosen):
    chosen.loc[(chosen["arch"] == "gfx1201") & (chosen["switch"] == "1"), "outcome"] = "ROCM_AITER_UNIFIED_ATTN"
    figure = plots.choices(chosen, "told")
    present, absent = figure.axes
    assert (present.get_title(), absent.get_title()) == ("AITER present", "AITER absent")
    assert [tick.get_text() for tick in present.get_xticklabels()] == ["unset", "0", "1"] * 3
    squares = [text for text in present.texts if text.get_text() == "U"]
    assert {text.get_position() for text in squares} == {(8, 0), (8, 1), (8, 2)}
    assert [text.get_text() for text in present.texts if text.get_text() in GPUS] == GPUS
    assert len(present.patches) == len(absent.patches) == 27


def test_choices_gives_an_unexpected_backend_a_letter_of_its_own(chosen):
    chosen.loc[0, "outcome"], chosen.loc[1, "outcome"] = "SOME_ATTN", "OTHER_ATTN"
    assert legend(plots.choices(chosen, "told"))[:3] == ["R  ROCM_ATTN", "A  SOME_ATTN", "B  OTHER_ATTN"]


def test_nothing_lies_over_anything_else(judged, chosen):
    for figure in (plots.verdicts(judged, "told"), plots.choices(chosen, "told")):
        figure.canvas.draw()
        rows = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
        assert not [pair for pair in combinations(rows, 2) if pair[0].overlaps(pair[1])]
        assert not overlaps(figure, [text for ax in figure.axes for text in ax.texts])
        assert not overlaps(
            figure, [figure._suptitle, *(ax.title for ax in figure.axes), *figure.legends[0].get_texts()]
        )


def luminance(colour: str) -> float:
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), to_rgb(colour), strict=True))


def test_what_is_broken_is_the_darkest_and_every_sign_is_one_of_a_kind():
    broken = luminance(JUDGED["broken"][0])
    assert all(luminance(colour) > broken + 0.4 for name, (colour, *_) in JUDGED.items() if name != "broken")
    assert len({sign for _, sign in CHOICES.values()}) == len(CHOICES)
