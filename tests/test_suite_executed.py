# SPDX-License-Identifier: Apache-2.0
"""The executed copy: valid, short and harmless, whatever the cells sent."""

import json
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from aiterlab.suite import status
from aiterlab.suite.executed import (
    LIMIT_BYTES,
    MOST_OUTPUTS,
    SHOWN_BYTES,
    publishable,
    without_banners,
    write_executed,
)
from aiterlab.suite.report import render_report


def notebook_of(*outputs, source="1", **metadata):
    """Return a notebook of one cell that holds outputs as a kernel sent them, valid or not."""
    notebook = new_notebook(cells=[new_code_cell("")], metadata=metadata)
    notebook.cells[0].source = source
    notebook.cells[0].outputs = [nbformat.from_dict(output) for output in outputs]
    return notebook


def shown(**data):
    return {"output_type": "display_data", "metadata": {}, "data": data}


def written(notebook, tmp_path):
    """Write the copy; it must be strict JSON, valid, in UTF-8 and small."""
    path = tmp_path / "executed.ipynb"
    write_executed(notebook, path)
    text = path.read_bytes().decode("utf-8")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert len(text) < LIMIT_BYTES
    copy = nbformat.reads(text, as_version=4)
    nbformat.validate(copy)
    return copy


@pytest.mark.parametrize(
    "output",
    [
        {"output_type": "stream", "name": "stdout", "text": "a\ud800b"},
        {"output_type": "stream", "name": "nowhere", "text": ["a", "b"]},
        {"output_type": "stream", "name": "stdout", "text": 5},
        {"output_type": "error", "ename": None, "evalue": "\udfff", "traceback": None},
        {"output_type": "error", "ename": "E", "evalue": "", "traceback": "one line"},
        {"output_type": "no such kind", "data": 1},
        {"output_type": "execute_result", "data": {"text/plain": "1"}, "metadata": {}, "execution_count": "one"},
        {"output_type": "display_data", "data": None, "metadata": None},
        {"output_type": "display_data", "data": {"text/plain": 5}, "metadata": {"x": float("nan")}},
        shown(**{"application/json": {"x": [float("inf")]}}),
        shown(**{"application/javascript": "alert(1)"}),
        shown(**{"application/vnd.jupyter.widget-view+json": {"model_id": "x"}}),
        shown(**{"../../etc/passwd": "x", "text/\ud800": "y", "": "z"}),
        shown(**{"image/png": "iVBORw0K\ud800"}),
        shown(**{"image/png": {"not": "text"}}),
    ],
    ids=lambda output: json.dumps(output)[:60],
)
def test_whatever_a_cell_sends_is_written_and_valid(tmp_path, output):
    (cell,) = written(notebook_of(output, {"output_type": "stream", "name": "stdout", "text": "next"}), tmp_path).cells
    assert len(cell.outputs) == 2 and cell.outputs[1].text == "next"


def test_half_a_surrogate_pair_in_source_and_prose_is_replaced(tmp_path):
    notebook = notebook_of(source="x = '\ud800'")
    notebook.cells.append(new_markdown_cell("prose"))
    notebook.cells[1].source = "\udc00"
    assert [cell.source for cell in written(notebook, tmp_path).cells] == ["x = '\ufffd'", "\ufffd"]


def test_what_nothing_shows_is_left_out_and_named(tmp_path):
    both = shown(**{"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "a bar"})
    script = shown(**{"application/javascript": "alert(1)"})
    (cell,) = written(notebook_of(both, script, widgets={"state": {}}), tmp_path).cells
    assert cell.outputs[0].data == {"text/plain": "a bar"}
    assert "application/javascript" in cell.outputs[1].data["text/plain"] and "alert" not in str(cell.outputs[1])


def test_what_is_shown_stays(tmp_path):
    table = shown(**{"text/html": "<table></table>", "text/plain": "table"})
    figure = shown(**{"image/png": "iVBORw0K\nAAAA\n", "image/svg+xml": "<svg/>"}) | {
        "metadata": {"image/png": {"alt": "a"}}
    }
    result = new_output("execute_result", data={"text/plain": "7"}, execution_count=3)
    (cell,) = written(notebook_of(table, figure, result), tmp_path).cells
    assert [output.data for output in cell.outputs] == [table["data"], figure["data"], result.data]
    assert cell.outputs[1].metadata == {"image/png": {"alt": "a"}} and cell.outputs[2].execution_count == 3


def test_a_token_that_the_cut_would_halve_is_masked(tmp_path):
    token = "ghp_" + "aB3dE" * 8
    text = "x " * 4990 + token + " y" * 50_000
    (cell,) = written(notebook_of({"output_type": "stream", "name": "stdout", "text": text}), tmp_path).cells
    assert "ghp_" not in cell.outputs[0].text and "log.txt" in cell.outputs[0].text


def test_a_hundred_thousand_outputs_are_shortened_quickly(tmp_path):
    notebook = notebook_of()
    notebook.cells[0].outputs = [nbformat.from_dict(shown(**{"text/plain": str(n)})) for n in range(100_000)]
    began = time.process_time()
    (cell,) = written(notebook, tmp_path).cells
    assert time.process_time() - began < 10
    texts = [output.get("text") or output.data["text/plain"] for output in cell.outputs]
    assert len(texts) == MOST_OUTPUTS + 1 and (texts[0], texts[-1]) == ("0", "99999")
    assert f"{100_000 - MOST_OUTPUTS} outputs" in texts[MOST_OUTPUTS // 2]


def test_many_figures_lose_as_many_as_must_go(tmp_path):
    figures = [shown(**{"image/png": "A" * size}) for size in (400_000, 300_000, 350_000, 100_000)]
    (cell,) = written(notebook_of(*figures), tmp_path).cells
    assert [output.output_type for output in cell.outputs] == ["stream", *["display_data"] * 3]


def ended(word, reason, *, error_cell=None, cells=("1", "2", "3")):
    """Return a notebook that ended so, stamped with its status."""
    notebook = new_notebook(cells=[new_markdown_cell("# Q"), *map(new_code_cell, cells)])
    outcome = status.NotebookStatus("01_x", "run", "smoke", {})
    outcome.end(word, reason)
    outcome.error_cell, outcome.cells = error_cell, status.list_cells(notebook)
    outcome.stamp(notebook)
    return notebook


def test_the_copy_says_at_the_top_how_the_run_ended_and_below_which_cell(tmp_path):
    notebook = ended("timeout", "stopped after its budget of 60 s <b>", error_cell=2)
    copy = written(notebook, tmp_path)
    assert [cell.source for cell in copy.cells] == [
        "> **timeout**: stopped after its budget of 60 s \\<b\\>",
        "# Q",
        "1",
        "2",
        "> **timeout** in the cell above; what follows was not run.",
        "3",
    ]
    assert len(notebook.cells) == 4
    (tmp_path / "again").mkdir()
    assert len(written(copy, tmp_path / "again").cells) == 6
    assert without_banners(copy).cells == notebook.cells
    notebook.nbformat_minor = 4
    for cell in notebook.cells:
        del cell["id"]
    assert len(written(notebook, tmp_path).cells) == 6
    skipped = written(ended("skipped", "needs the record of 05_x"), tmp_path)
    assert [cell.source[:30] for cell in skipped.cells] == ["> **skipped**: needs the recor", "# Q", "1", "2", "3"]


@pytest.mark.parametrize("told", ["x", None, [1], {"alt": ["x"], "width": "wide"}])
def test_what_a_cell_says_of_its_figure_cannot_cost_the_report(tmp_path, told):
    figure = shown(**{"image/png": "iVBORw0K"}) | {"metadata": {"image/png": told, "other": "kept"}}
    notebook = notebook_of(figure)
    outcome = status.NotebookStatus("01_x", "run", "smoke", {})
    outcome.cells = status.list_cells(notebook)
    outcome.stamp(notebook)
    assert 'src="data:image/png;base64,iVBORw0K"' in render_report(publishable(notebook))
    assert written(notebook, tmp_path).cells[1].outputs[0].metadata["other"] == "kept"


def test_a_flood_of_figures_makes_no_report_that_nobody_can_open(tmp_path):
    figures = [shown(**{"image/png": "A" * 300_000}) for _ in range(MOST_OUTPUTS)]
    (cell,) = publishable(notebook_of(*figures)).cells
    sizes = [len(output.get("data", {}).get("image/png", "")) for output in cell.outputs]
    assert SHOWN_BYTES - 300_000 < sum(sizes) < SHOWN_BYTES
    assert "the report would be too large" in cell.outputs[sizes.index(0)].text


def test_a_copy_that_is_small_enough_is_left_alone():
    notebook = notebook_of(shown(**{"text/plain": "x"}))
    assert publishable(notebook) == notebook and publishable(notebook) is not notebook
