# SPDX-License-Identifier: Apache-2.0
"""Figures of speculative decoding: all rows are in them, what is missing has its reason, what is assumed is said."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.collections import PathCollection
from matplotlib.patches import Rectangle

from aiterlab import plots
from aiterlab.plots.spec_decode import ASSUMED, METHODS
from aiterlab.plots.style import PROVIDERS


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def words(figure):
    """Everything that is written in a figure."""
    figure.draw_without_rendering()
    found = [text.get_text() for ax in figure.axes for text in ax.findobj(plt.Text)]
    return "\n".join([*found, *(text.get_text() for box in figure.legends for text in box.get_texts())])


def colours(artists):
    return [plt.matplotlib.colors.to_hex(one.get_facecolor()) for one in artists]


def bars(ax):
    return [one for one in ax.patches if isinstance(one, Rectangle)]


# Acceptance


def accepted(method, task, *rates, temperature=0.0, **fields):
    row = {"method": method, "draft_tokens": len(rates), "task": task, "temperature": temperature, "rates": list(rates)}
    ends = [1 - rates[0], *(one - other for one, other in pairwise(rates)), rates[-1]]
    steps = [round(100 * share) for share in ends]
    mean = 1 + sum(rates)
    row |= {"steps_by_tokens": steps, "tokens_per_step": mean, "acceptance_length": mean, "reason": ""}
    return row | {"acceptance_length_low": mean - 0.1, "acceptance_length_high": mean + 0.1} | fields


NOTHING = {"rates": None, "acceptance_length": None, "acceptance_length_low": None, "acceptance_length_high": None}
NOTHING |= {"steps_by_tokens": [0, 0, 0], "tokens_per_step": None, "reason": "no draft was made"}


@pytest.fixture
def acceptance():
    return [
        accepted("eagle3", "code", 0.9, 0.8),
        accepted("eagle3", "code", 0.9, 0.8, 0.6),
        accepted("eagle", "code", 0.7, 0.4, 0.2),
        accepted("eagle3", "prose", 0.6, 0.3, 0.1),
        accepted("ngram", "prose", 0.1, 0.1) | NOTHING,
    ]


def test_acceptance_has_a_panel_per_task_and_a_ceiling(acceptance):
    figure = plots.acceptance_by_position(acceptance, "told")
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["code", "prose"]
    code, prose = figure.axes
    ceiling, eagle, eagle3 = code.lines
    assert set(ceiling.get_ydata()) == {100}
    assert list(eagle.get_ydata()) == [70, 40, 20] and eagle.get_color() == METHODS["eagle"]
    assert list(eagle3.get_ydata()) == [90, 80, 60]  # the row with the most draft tokens
    assert len(prose.lines) == 2  # the ceiling and eagle3: n-gram is a gap
    assert "ngram: no draft was made" in words(figure)
    assert "eagle3: 3.30 (3.20–3.40)" in words(figure)
    assert figure._suptitle.get_text() == "told"


def test_a_second_temperature_is_dashed(acceptance):
    figure = plots.acceptance_by_position([*acceptance, accepted("eagle", "code", 0.5, 0.2, 0.1, temperature=1.0)], "")
    styles = [line.get_linestyle() for line in figure.axes[0].lines]
    assert styles.count("--") == 1
    assert "eagle, T = 1: 1.80 (1.70–1.90)" in words(figure) and "temperature 1" in words(figure)


def test_the_histogram_is_one_of_shares_with_the_mean(acceptance):
    figure = plots.tokens_per_step(acceptance, "told")
    code, prose = figure.axes
    assert len(bars(code)) == 8 and sum(bar.get_height() for bar in bars(code)) == pytest.approx(200)
    assert len(bars(prose)) == 4  # no bars of nothing for n-gram
    assert [text.get_text() for text in code.texts] == ["2.30", "3.30"]
    tops = [one.get_offsets()[0, 1] for one in code.collections]
    assert all(top > max(bar.get_height() for bar in bars(code)) for top in tops)
    assert code.get_ylim()[1] > max(tops)


# Speed-up


def speedup(series, k, value, **fields):
    row = {"series": series, "draft_tokens": k, "speedup": value, "predicted": 1.5, "reason": None}
    return row | {"speedup_low": value and value - 0.1} | fields


def test_the_best_k_is_named_and_gaps_have_reasons():
    rows = [speedup("eagle", 1, 1.2), speedup("eagle", 2, 1.6), speedup("eagle", 3, None, reason="out of memory")]
    rows += [speedup("eagle3", 1, 1.1), speedup("eagle3", 2, 1.3), speedup("eagle3", 3, 1.9)]
    figure = plots.speedup_by_draft_tokens(rows, "told", assumed="by an article")
    said = words(figure)
    assert "K = 2: 1.60 ×" in said and "K = 3: 1.90 ×" in said
    assert "no point: eagle, K = 3: out of memory" in said
    assert f"{ASSUMED}: by an article" in said
    (ax,) = figure.axes
    points = [one.get_offsets() for one in ax.collections if isinstance(one, PathCollection)]
    assert sorted(y for one in points if len(one) > 1 for _, y in one) == [1.1, 1.2, 1.3, 1.6, 1.9]
    assert ASSUMED not in words(plots.speedup_by_draft_tokens(rows, "told"))


def test_series_have_their_methods_colour_or_one_of_their_own():
    def points(rows):
        ax = plots.speedup_by_draft_tokens(rows, "").axes[0]
        return {plt.matplotlib.colors.to_hex(one.get_color()) for one in ax.lines if one.get_linestyle() == "--"}

    named = [speedup("a", 1, 1.2, method="eagle"), speedup("b", 1, 1.3, method="eagle3")]
    assert points(named) == {METHODS["eagle"].lower(), METHODS["eagle3"].lower()}
    same = [speedup("a", 1, 1.2, method="eagle"), speedup("b", 1, 1.3, method="eagle")]
    assert len(points(same)) == 2


def test_the_map_names_the_reason_of_every_gap():
    rows = [
        {"batch": b, "context": c, "speedup": 1.5 - b / 50, "draft_tokens": 4} for b in (1, 64) for c in (128, 4096)
    ]
    rows[-1] |= {"speedup": None, "reason": "the cache does not fit"}
    figure = plots.speedup_map(rows, "told", assumed="by an article")
    said = words(figure)
    assert "1.48\nK = 4" in said and "0.22\nK = 4" in said and "4k" in said
    assert "a: the cache does not fit" in said and f"{ASSUMED}: by an article" in said
    mesh = figure.axes[0].collections[0]
    assert np.ma.count_masked(mesh.get_array()) == 1
    assert mesh.norm.vcenter == 1  # white neither gains nor costs


def test_a_map_of_nothing_is_all_reasons():
    rows = [{"batch": b, "context": 128, "speedup": None, "reason": "no GPU"} for b in (1, 8)]
    assert "a: no GPU" in words(plots.speedup_map(rows, "told"))


# Where the time goes


def step(k, *parts, series="pair", **fields):
    names = ("draft_ms", "verify_ms", "sample_ms", "host_ms", "step_ms")
    return {"series": series, "draft_tokens": k} | dict(zip(names, parts, strict=True)) | fields


def test_a_step_is_stacked_and_the_rest_left_white():
    gap = step(4, None, None, None, None, None, reason="engine killed")
    figure = plots.step_components([step(0, None, 1.0, 0.2, 0.3, 1.5), step(2, 0.5, 1.0, 0.2, 0.3, 2.5), gap], "told")
    (ax,) = figure.axes
    drawn = bars(ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["vanilla", "K = 2", "K = 4"]
    assert len(drawn) == 3 + 5  # vanilla drafts nothing; K = 2 has four parts and a rest
    assert drawn[-1].get_width() == pytest.approx(0.5) and colours(drawn)[-1] == "#ffffff"
    assert "– engine killed" in words(figure) and "not accounted for" in words(figure)


def test_backends_stand_beside_their_kernels():
    rows = [
        {"backend": name, "context": context, "tokens_per_s": rate, "tokens_per_s_low": 0.9 * rate if rate else None}
        | {"reason": None if rate else "refused: head size"}
        for context, rates in ((16384, (30.0, 120.0, None)), (32768, (17.0, 130.0, 128.0)))
        for name, rate in zip(("TRITON_ATTN", "SUITE_PAGED", "FLASH_ATTN"), rates, strict=True)
    ]
    kernels = [
        {"workload": "verify_q4_1x32k", "provider": provider, "implementation": name, "median_us": median}
        | {"p20_us": median and 0.99 * median, "p80_us": median and 1.01 * median}
        for provider, name, median in (
            ("vllm_triton", "unified", 1486.27),
            ("suite", "paged", 40.91),
            ("reference", "formula", None),
        )
    ]
    figure = plots.backend_throughput(rows, kernels, "told")
    engine, alone = figure.axes
    said = words(figure)
    assert "16k tokens of context" in said and "– refused: head size" in said
    assert "130  (7.6 ×)" in said and "1,486  (36.3 ×)" in said and "40.9" in said
    assert len(bars(engine)) == 5 and len(bars(alone)) == 2
    assert colours(bars(alone)) == [PROVIDERS["suite"].lower(), PROVIDERS["vllm_triton"].lower()]
    assert engine.get_ylim() == alone.get_ylim()


def test_no_rows_are_refused():
    for figure in (plots.step_components, plots.speedup_map, plots.tokens_per_step):
        with pytest.raises(ValueError, match="no rows"):
            figure([], "told")
