# SPDX-License-Identifier: Apache-2.0
"""The answer's page: all of it is on one A4, what is missing is told, and no text lies over other text."""

import itertools

import answer_records as made
import pytest
from matplotlib import pyplot as plt

from aiterlab import paths, plots
from aiterlab.answer import findings, sources, tables
from aiterlab.answer.sources import EAGLE, KERNELS, STEMS, Source
from aiterlab.plots import page
from aiterlab.plots.answer import answer_page

ALL = [made.cells(STEMS[0]), made.cells(STEMS[1]), made.kernels(), made.eagle()]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def drawn(records, missing=()):
    found = [Source(record["stem"], "this run", record) for record in records]
    frames = tables.read([*found, *(Source(stem, "this run", reason="no record") for stem in missing)])
    return answer_page(frames, findings.panels(frames), findings.headline(frames))


def texts(figure):
    """Everything that can be read on the figure, with its place in pixels; not the ticks beyond an axis."""
    figure.canvas.draw()
    found = list(figure.texts)
    for ax in figure.axes:
        legend = ax.get_legend()
        found += [*ax.texts, ax._left_title, ax.xaxis.label, ax.yaxis.label, *(legend.get_texts() if legend else [])]
        found += [tick.label1 for axis in (ax.xaxis, ax.yaxis) for tick in axis._update_ticks()]
    seen = [text for text in found if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent(), text.get_fontsize()) for text in seen]


def everything(figure):
    return " ".join(text for text, _, _ in texts(figure))


def test_a_page_is_an_a4_with_the_finding_as_its_title_and_a_letter_for_every_panel():
    figure = drawn(ALL)
    assert tuple(figure.get_size_inches()) == page.A4_LANDSCAPE
    said = [text.replace("\n", " ") for text, _, _ in texts(figure)]
    assert any(text.startswith("On simulated AMD GPUs the fix takes 2 broken cells to 0") for text in said)
    assert set("abcdefg") <= set(said)
    assert "2 of 8 trapped" in said and "none trapped" in said
    assert "— not run: the platform is not ROCm" in said
    assert any("05: NVIDIA H200, this run, commit c0ffee0, 2026-01-02" in text for text in said)


@pytest.mark.parametrize("machines", ["one machine", "two machines", "reference"])
def test_nothing_is_small_or_off_the_page_and_no_text_lies_over_another(machines, tmp_path, monkeypatch):
    if machines == "reference":
        monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path))
        frames = tables.read(sources.gather("06_x"))
        figure = answer_page(frames, findings.panels(frames), findings.headline(frames))
    else:
        figure = drawn(ALL + ([made.kernels(made.CPU), made.eagle(made.CPU)] if machines == "two machines" else []))
    width, height = figure.canvas.get_width_height()
    seen = texts(figure)
    for text, box, size in seen:
        assert size >= page.SMALL or len(text) == 1, text  # one character: the sign within a square
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
    words = [(text, box.padded(-1)) for text, box, _ in seen if len(text) > 1]
    over = [(a, b) for (a, one), (b, other) in itertools.combinations(words, 2) if one.overlaps(other)]
    assert over == []


@pytest.mark.parametrize("left_out", STEMS)
def test_a_page_without_one_record_says_which_is_missing(left_out):
    figure = drawn([record for record in ALL if record["stem"] != left_out], [left_out])
    said = everything(figure).replace("\n", " ")
    assert f"{left_out[:2]}: not run" in said
    panels = {KERNELS: 2, EAGLE: 4}.get(left_out, 0)
    assert said.count(f"— {left_out} not run (this run: no record)") == panels


def test_a_page_of_nothing_is_a_page():
    said = everything(drawn([], STEMS)).replace("\n", " ")
    assert "No record to answer from" in said and said.count("not run (this run: no record)") == 7


def test_an_interpreters_times_are_not_drawn_and_a_cpus_are_marked():
    said = everything(drawn([*ALL, made.kernels(made.CPU), made.eagle(made.CPU)]))
    assert "— CPU (AMD EPYC): Triton's interpreter" in said
    assert "eagle3 CPU*" in said and "* Times on a CPU say nothing about a GPU." in said
    native, both = (
        next(ax for ax in figure.axes if ax.get_xlabel().startswith("share of the ceiling"))
        for figure in (drawn(ALL), drawn([*ALL, made.kernels(made.CPU)]))
    )
    assert len(native.collections) == len(both.collections) > 0


def test_what_a_backend_has_no_time_for_is_not_zero():
    record = made.eagle()
    record["timed"] += made.timed("backends", "vanilla", 0, "SUITE_PAGED", 5.0, context=32768)
    assert "— vanilla not run" in everything(drawn([record]))


def test_a_published_page_keeps_its_size_and_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path))
    figure, folder = drawn([]), tmp_path / "06_x"
    names = plots.publish(figure, "06_x", "answer")
    assert names == ["answer.png", "answer.pdf", "answer.svg"]
    first = [(folder / name).read_bytes() for name in names]
    plots.publish(figure, "06_x", "answer")
    assert first == [(folder / name).read_bytes() for name in names]
    assert b"/MediaBox [ 0 0 841.68 595.44 ]" in first[1]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_text_is_broken_to_a_width():
    lines = page.wrapped("one two three four five six seven", 0.9, 8)
    assert " ".join(lines) == "one two three four five six seven" and len(lines) > 2
    assert all(page.breadth(line, 8) <= 0.95 for line in lines)
