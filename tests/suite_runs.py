# SPDX-License-Identifier: Apache-2.0
"""Lay out runs as the runner leaves them, out of the reference records, for the tests of what is shown of a run."""

import base64
import copy
import io
import json

from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image, ImageDraw

from aiterlab import paths
from aiterlab.suite import report, status
from aiterlab.suite.executed import publishable, write_executed
from aiterlab.suite.wording import reused_words

REFERENCE = paths.results_dir() / "reference"
FACTS = {
    "utc": "2026-11-27T10:00:00+00:00",
    "git_commit": "0123456789abcdef0123456789abcdef01234567",
    "git_dirty": False,
    "python": "3.11.7",
    "platform": "Linux",
    "cpu_model": "A processor",
    "cpu_usable_count": 2,
    "memory_bytes": 8 * 2**30,
    "accelerators": [],
    "versions": {"torch": "2.13.0"},
    "missing": {},
}
HOSTILE = (
    "<script>alert(1)</script><img src='https://evil.example/x.png'><img src=x onerror=alert(2)>"
    "<iframe src='https://evil.example'></iframe><a href='javascript:alert(3)'>go</a>"
    "<div style=\"background-image:url('https://evil.example/y.png');color:red\">styled</div>"
    "<link rel=stylesheet href='https://evil.example/z.css'><svg onload=alert(4)></svg>"
    "<style>@import url(https://evil.example/s.css); body{background:url(https://evil.example/b.png)}</style>"
)
STYLED = (
    '<style type="text/css">#T_1a_row0_col0 {background-color: #dff5e1;}</style><table id="T_1a" class="dataframe">'
    "<thead><tr><th>backend</th>" + "".join(f"<th>a_long_column_name_{i}</th>" for i in range(20)) + "</tr></thead>"
    '<tbody><tr><td id="T_1a_row0_col0">styled cell</td>' + "<td>0.000987</td>" * 20 + "</tr></tbody></table>"
)


def reference(stem, machine=""):
    """Return a reference record."""
    return json.loads((REFERENCE / machine / stem / "record.json").read_text())


def drawing(size=(900, 420)):
    """Return a figure as base64."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle((40, 40, size[0] // 2, size[1] - 40), fill="#0072B2")
    written = io.BytesIO()
    image.save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


def add_notebook(run_dir, stem, ending="ok", reason=None, *, record=None, error_cell=None, cells=None, **told):
    """Leave one notebook's folder: status, executed notebook, record if there is one, report and log."""
    folder = run_dir / stem
    folder.mkdir(parents=True, exist_ok=True)
    notebook = new_notebook(
        cells=cells
        or [
            new_markdown_cell("# Is it so?\n\nWe ask.\n\n## Measure"),
            new_code_cell("measure()", outputs=[new_output("stream", text="measured " + "x" * 300)]),
            new_markdown_cell("## Look\n\n### Table"),
            new_code_cell("table", outputs=[new_output("display_data", data={"text/html": STYLED})]),
            new_code_cell(
                "figure",
                outputs=[
                    new_output(
                        "display_data",
                        data={"image/png": drawing()},
                        metadata={"image/png": {"alt": "Error by provider"}},
                    )
                ],
            ),
            new_markdown_cell("## Finding"),
            new_code_cell("save()"),
        ]
    )
    outcome = status.NotebookStatus(stem, run_dir.name, "standard", {"workers": 2}, seconds=12.5, provenance=FACTS)
    outcome.started_utc = "2026-11-27T10:00:03+00:00"
    outcome.finding = (record or {}).get("finding")
    outcome.end(ending, reason)
    outcome.error_cell = error_cell
    outcome.cells = status.list_cells(notebook)
    for cell in outcome.cells if ending not in ("skipped", "setup-failed") else ():
        if error_cell is None or cell.number <= error_cell:
            cell.status, cell.seconds = (ending, 0.5) if cell.number == error_cell else ("ok", 0.25)
    outcome.stamp(notebook)
    outcome.save(folder)
    if told:
        facts = json.loads((folder / "status.json").read_text())
        (folder / "status.json").write_text(json.dumps(facts | told))
    if record is not None:
        (folder / "record.json").write_text(json.dumps(record))
    if ending != "skipped":
        write_executed(notebook, folder / "executed.ipynb")
        (folder / "log.txt").write_text("a log\n")
    report.write_report(publishable(notebook), folder)
    if words := reused_words(told or {}):
        report.say_reused(folder, words)
    return folder


def add_run(results, name, stems, *, ending="ok", **records):
    """Leave a run whose notebooks hold the reference records, or those given as `_01=record`."""
    run_dir = results / name
    run_dir.mkdir(parents=True)
    for stem in stems:
        add_notebook(run_dir, stem, record=records.get(f"_{stem[:2]}") or reference(stem))
    facts = {"run": name, "profile": "standard", "seconds": 60.0, "status": ending, "notebooks": list(stems)}
    (run_dir / "run.json").write_text(json.dumps(facts | {"provenance": FACTS}))
    return run_dir


def changed(record, **columns):
    """Return a copy of a record; `changed(record, cells__verdict={3: "works"})` sets one place of a column."""
    whole = copy.deepcopy(record)
    for path, value in columns.items():
        table, _, column = path.partition("__")
        if column:
            for index, item in value.items():
                whole[table][column][index] = item
        else:
            whole[table] = value
    return whole
