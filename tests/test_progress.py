# SPDX-License-Identifier: Apache-2.0
"""How far the work is: lines in a log, one line in place in an open notebook."""

import io
import os

import nbformat
import pytest
from nbclient import NotebookClient

from aiterlab import paths
from aiterlab.progress import Progress

LOOP = """\
from aiterlab.progress import Progress
told = Progress(interval_s=1.0, what="steps")
for done in (1, 2, 3, 4):
    told(done, 4, done * 10.0)"""
LINES = [
    "1 of 4 steps, 10 s",
    "2 of 4 steps, 20 s, about 20 s left",
    "3 of 4 steps, 30 s, about 10 s left",
    "4 of 4 steps, 40 s",
]


def run_in_a_kernel(monkeypatch, **environment):
    """Run the loop in a real kernel with this environment; returns the executed notebook and what the kernel sent."""
    for name in ("JPY_SESSION_NAME", paths.RUN_DIR_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    sent = []

    class Client(NotebookClient):
        def process_message(self, message, *arguments):
            sent.append(message["msg_type"])
            return super().process_message(message, *arguments)

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(LOOP)])
    Client(notebook, kernel_name="python3", coalesce_streams=True).execute(env=os.environ | environment)
    return notebook, sent


def test_an_open_notebook_shows_one_line_that_changes_in_place(monkeypatch):
    notebook, sent = run_in_a_kernel(monkeypatch, JPY_SESSION_NAME="notebooks/01_x.ipynb")
    (output,) = notebook.cells[0].outputs
    assert (output.output_type, output.data) == ("display_data", {"text/plain": LINES[-1]})
    assert sent.count("display_data") == 1 and sent.count("update_display_data") == 3
    assert "widgets" not in notebook.metadata and not [kind for kind in sent if kind.startswith("comm")]


@pytest.mark.parametrize(
    "environment",
    [{}, {"JPY_SESSION_NAME": "notebooks/01_x.ipynb", paths.RUN_DIR_VARIABLE: "/tmp"}],
    ids=["papermill or nbconvert", "the runner, started from an open notebook"],
)
def test_elsewhere_a_kernel_prints_plain_lines(monkeypatch, environment):
    notebook, _ = run_in_a_kernel(monkeypatch, **environment)
    (output,) = notebook.cells[0].outputs
    assert (output.output_type, output.text.splitlines()) == ("stream", LINES)


def test_a_log_gets_a_line_twice_a_minute_and_the_last_one():
    stream = io.StringIO()
    told = Progress(stream=stream)
    for done in range(1, 101):
        told(done, 100, done * 1.0)
    assert [line.split(",")[1] for line in stream.getvalue().splitlines()] == [
        " 1 s",
        " 31 s",
        " 61 s",
        " 91 s",
        " 100 s",
    ]
