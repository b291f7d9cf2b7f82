# SPDX-License-Identifier: Apache-2.0
import json
import os
import signal
import sys
import time

import nbformat
import psutil
import pytest
from bs4 import BeautifulSoup
from suite_notebooks import write_notebook

from aiterlab.suite import executed as executed_copy
from aiterlab.suite import execution, report, status, watch
from aiterlab.suite.executed import LIMIT_BYTES, publishable, write_executed
from aiterlab.suite.execution import Job, run_notebook

SAVE = """\
from aiterlab.records import save_record
save_record("01_x", {"finding": "It is so."}, parameters={"workers": workers})"""


def run(tmp_path, *cells, budget_s=60.0, heartbeat_s=60.0, overrides=None, say=None):
    """Run a notebook of these cells; returns its status, its results folder and the progress lines."""
    lines = []
    overrides = overrides or {}
    job = Job(
        notebook=write_notebook(tmp_path / "notebooks" / "01_x.ipynb", *cells),
        run_dir=tmp_path / "results" / "a-run",
        profile="smoke",
        parameters={"names": ["a"], "workers": 1, **overrides},
        overrides=overrides,
        budget_s=budget_s,
        provenance={"git_commit": "c0ffee", "versions": {}},
        heartbeat_s=heartbeat_s,
    )
    outcome = run_notebook(job, say=lambda line: (lines.append(line), say and say(line)))
    return outcome, job.folder, lines


CHILD = """\
import subprocess, sys, pathlib
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session={own})
pathlib.Path({path!r}).write_text(str(child.pid))"""


def gone(pid_file):
    try:
        return psutil.Process(int(pid_file.read_text())).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def executed(folder):
    return nbformat.read(folder / "executed.ipynb", as_version=4)


def cell_states(folder):
    return [cell["status"] for cell in json.loads((folder / "status.json").read_text())["cells"]]


def assert_truthful(outcome, folder, ending, cells):
    """The status file, the executed copy's own and papermill's metadata, and the report tell the same story."""
    saved = json.loads((folder / "status.json").read_text())
    assert (outcome.status, saved["status"]) == (ending, ending)
    assert cell_states(folder) == cells
    notebook = executed(folder)
    assert notebook.metadata.aiterlab["status"] == ending
    assert [cell.metadata.aiterlab["status"] for cell in status.code_cells(notebook)] == cells
    stop = cells.index(ending)
    after = [cell.metadata.papermill["status"] for cell in status.code_cells(notebook)][stop:]
    assert after == ["failed"] + ["not run"] * (len(cells) - stop - 1)
    page = (folder / "report.html").read_text()
    assert page.index(f"<strong>{ending}</strong>") < page.index("<main>")
    assert f'href="#cell-{stop + 1}"' in page


def test_a_good_run_leaves_everything_where_it_belongs(tmp_path, monkeypatch):
    seen = []

    def look(line):
        if "[1/" in line:
            seen.append(json.loads((tmp_path / "results/a-run/01_x/status.json").read_text())["status"])

    outcome, folder, _ = run(
        tmp_path,
        "# Is it so?",
        "## Measure",
        "# Count\nimport os, sys\nprint(sys.executable, workers)\nprint('to stderr', file=sys.stderr)",
        SAVE,
        overrides={"workers": 7},
        say=look,
    )
    assert (outcome.status, outcome.reason, outcome.finding) == ("ok", None, "It is so.")
    assert sorted(path.name for path in folder.iterdir()) == [
        "executed.ipynb",
        "log.txt",
        "record.json",
        "report.html",
        "status.json",
    ]
    assert json.loads((folder / "record.json").read_text())["parameters"] == {"workers": 7}
    log = (folder / "log.txt").read_text()
    assert f"{sys.executable} 7\n" in log and "to stderr\n" in log
    assert cell_states(folder) == ["ok"] * 4  # parameters, injected parameters, two cells
    # Until its end a run is "interrupted" on disk: a killed runner cannot correct it any more.
    assert seen == ["interrupted"]


def test_progress_is_one_line_per_cell_with_place_title_seconds_and_status(tmp_path):
    _, _, lines = run(tmp_path, "# Is it so?", "## Measure", "# Count\n1", "raise ValueError(3)", "2")
    assert len(lines) == 3
    assert lines[1].startswith("01_x  [2/4] Measure: Count  ") and lines[1].endswith(" s  ok")
    assert lines[2].startswith("01_x  [3/4] Measure  ") and lines[2].endswith(" s  failed")


def test_a_failing_cell_ends_the_run_truthfully(tmp_path):
    outcome, folder, _ = run(tmp_path, "1", "raise ValueError('first line\\nsecond line')", "print('never')")
    assert_truthful(outcome, folder, "failed", ["ok", "ok", "failed", "not run"])
    assert outcome.reason == "ValueError: first line"
    log = (folder / "log.txt").read_text()
    assert "Traceback" in log and "second line" in log and "\x1b" not in log
    assert status.code_cells(executed(folder))[2].outputs[0].ename == "ValueError"


def test_a_dead_kernel_is_not_called_completed(tmp_path):
    outcome, folder, _ = run(tmp_path, "import os\nos._exit(3)", "1", "2")
    assert_truthful(outcome, folder, "kernel-died", ["ok", "kernel-died", "not run", "not run"])
    assert "exit code 3" in outcome.reason


def test_a_dead_kernel_leaves_no_orphan(tmp_path):
    pid = tmp_path / "pid"
    outcome, _, _ = run(tmp_path, CHILD.format(own=False, path=str(pid)), "import os\nos._exit(3)")
    assert outcome.status == "kernel-died" and gone(pid)


def test_a_killed_kernel_names_the_signal_and_the_usual_reason(tmp_path):
    outcome, _, _ = run(tmp_path, "import os\nos.kill(os.getpid(), 9)")
    assert outcome.status == "kernel-died" and "SIGKILL" in outcome.reason and "memory" in outcome.reason


def test_a_crashed_kernels_last_words_are_in_the_log(tmp_path):
    outcome, folder, _ = run(tmp_path, "import ctypes\nctypes.string_at(0)")
    assert outcome.status == "kernel-died" and "SIGSEGV" in outcome.reason
    assert "Segmentation fault" in (folder / "log.txt").read_text()


def test_the_budget_stops_a_notebook_shows_where_and_leaves_no_process(tmp_path):
    pid = tmp_path / "pid"
    child = CHILD.format(own=False, path=str(pid))
    outcome, folder, _ = run(tmp_path, child, "import time\ntime.sleep(600)", "1", budget_s=8)
    assert_truthful(outcome, folder, "timeout", ["ok", "ok", "timeout", "not run"])
    assert outcome.reason == "stopped after its budget of 8 s" and outcome.seconds < 60
    # It was interrupted first, so that the executed copy shows the line that was running.
    assert status.code_cells(executed(folder))[2].outputs[0].ename == "KeyboardInterrupt"
    assert gone(pid)


def test_a_cell_that_ignores_the_interrupt_is_killed_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "GRACE_S", 0.5)
    pid = tmp_path / "pid"
    stubborn = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(600)"
    outcome, folder, _ = run(tmp_path, CHILD.format(own=True, path=str(pid)), stubborn, "1", budget_s=8)
    assert_truthful(outcome, folder, "timeout", ["ok", "ok", "timeout", "not run"])
    assert gone(pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_kernel_and_writes_what_there_is(tmp_path, number):
    sent = []

    def interrupt(line):
        if "still running" in line and not sent:
            sent.append(line)
            os.kill(os.getpid(), number)

    outcome, folder, _ = run(
        tmp_path, "print('kept')", "import time\ntime.sleep(600)", "1", heartbeat_s=0.4, say=interrupt
    )
    assert sent[0].startswith("01_x  [3/4] ")
    assert_truthful(outcome, folder, "interrupted", ["ok", "ok", "interrupted", "not run"])
    assert "kept" in (folder / "report.html").read_text()


def test_the_heartbeat_is_for_long_cells_only(tmp_path):
    _, _, lines = run(tmp_path, "1", "import time\ntime.sleep(1.0)", heartbeat_s=0.4)
    beats = [line for line in lines if "still running" in line]
    assert len(beats) == 2 and all("[3/3]" in line for line in beats)


def test_another_interpreters_kernel_is_refused_before_it_starts(tmp_path, monkeypatch):
    kernels = tmp_path / "share" / "kernels" / "python3"
    kernels.mkdir(parents=True)
    trace = tmp_path / "started"
    other = tmp_path / "bin" / "python"
    other.parent.mkdir()
    other.write_text(f"#!/bin/sh\ntouch {trace}\n")
    other.chmod(0o755)
    spec = {"argv": [str(other), "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "x"}
    (kernels / "kernel.json").write_text(json.dumps({**spec, "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))
    outcome, folder, _ = run(tmp_path, "1")
    assert outcome.status == "setup-failed"
    assert str(other) in outcome.reason and sys.executable in outcome.reason
    assert not trace.exists()
    assert cell_states(folder) == ["not run", "not run"]
    assert "<strong>setup-failed</strong>" in (folder / "report.html").read_text()


def test_secrets_and_the_home_directory_reach_no_artifact(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    monkeypatch.setenv("AITERLAB_HOME_FOR_TEST", "/home/someone")
    home = 'import os\nos.environ["AITERLAB_HOME_FOR_TEST"]'
    show = 'print(os.environ["HF_TOKEN"])\nos.environ["HF_TOKEN"], "hf_abcdefghijkl"'
    monkeypatch.setattr(execution, "kernel_environment", _environment_with_real_home(execution.kernel_environment))
    monkeypatch.setenv("HOME", "/home/someone")
    # A process that the notebook starts may be killed after the notebook's last look at its log.
    engine = """from aiterlab.paths import output_dir
(output_dir("01_x") / "engines").mkdir()
(output_dir("01_x") / "engines" / "server.log").write_text("/home/someone/lib.py:1: " + os.environ["HF_TOKEN"])"""
    stop = 'raise ValueError("/home/someone " + os.environ["HF_TOKEN"])'
    outcome, folder, _ = run(tmp_path, home, show, engine, stop)
    assert outcome.status == "failed" and outcome.cells[3].status == "ok"
    assert "lib.py:1" in (folder / "engines" / "server.log").read_text()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        text = path.read_text()
        assert "hf_abcdefghijkl" not in text and "/home/someone" not in text, path.name
    assert "(masked)" in (folder / "log.txt").read_text()


def _environment_with_real_home(original):
    real = os.environ["HOME"]
    return lambda run_dir: {**original(run_dir), "HOME": real}


def test_much_output_is_whole_in_the_log_and_short_in_the_copy(tmp_path):
    outcome, folder, _ = run(tmp_path, "for i in range(50_000):\n    print(i)")
    assert outcome.ok
    assert "\n25000\n" in (folder / "log.txt").read_text()
    assert (folder / "executed.ipynb").stat().st_size < 100_000
    text = status.code_cells(executed(folder))[1].outputs[0].text
    assert text.startswith("0\n1\n") and text.endswith("\n49999\n")
    assert "log.txt" in text and "\n25000\n" not in text


def test_the_executed_copy_stays_under_its_limit_and_loses_the_largest_output_only(tmp_path):
    outputs = [
        nbformat.v4.new_output("display_data", data={"image/png": "A" * size}, metadata={}) for size in (900, 2_000_000)
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=outputs)])
    write_executed(notebook, tmp_path / "executed.ipynb")
    kept = executed(tmp_path).cells[0].outputs
    assert (tmp_path / "executed.ipynb").stat().st_size < LIMIT_BYTES
    assert kept[0].data["image/png"] == "A" * 900 and "report.html" in kept[1].text
    assert notebook.cells[0].outputs[1].data["image/png"]


def test_publishing_drops_widget_state_and_leaves_pixels_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/home/al")
    data = {"image/png": "+/home/al/", "text/plain": "/home/al/x"}
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("display_data", data=data)])
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {"x": 1}})
    copy = publishable(notebook)
    assert "widgets" not in copy.metadata
    assert copy.cells[0].outputs[0].data == {"image/png": "+/home/al/", "text/plain": "~/x"}


def test_relative_import_paths_survive_the_kernels_working_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"lib{os.pathsep}/abs")
    environment = execution.kernel_environment(tmp_path)
    assert environment["PYTHONPATH"] == f"{os.path.abspath('lib')}{os.pathsep}/abs"
    assert environment["AITERLAB_RUN_DIR"] == str(tmp_path)


def test_a_report_that_cannot_be_rendered_is_a_failure_with_its_reason(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no template")

    monkeypatch.setattr(report, "write_report", refuse)
    outcome, folder, _ = run(tmp_path, "1")
    assert outcome.status == "failed" and "no template" in outcome.reason
    assert json.loads((folder / "status.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("ends_well", [True, False])
def test_an_output_that_takes_for_ever_to_render_leaves_a_page_without_it(tmp_path, monkeypatch, ends_well):
    monkeypatch.setattr(execution, "RENDER_S", 2.0)
    hostile = "from IPython.display import HTML, display\ndisplay(HTML('<p ' + 'a ' * 100_000 + '>'))"
    outcome, folder, _ = run(tmp_path, hostile, "2" if ends_well else "1 / 0")
    assert outcome.status == "failed"
    assert ("the report could not be written: TimeoutError: it took longer than 2 s" in outcome.reason) == ends_well
    page = BeautifulSoup((folder / "report.html").read_text(), "html.parser")
    assert page.header.strong.string == "failed" and outcome.reason in page.header.get_text()
    assert "a a a" not in page.main.get_text() and "HTML" in page.main.get_text()


def test_what_is_written_once_more_is_scrubbed_once_more(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SOME_API_TOKEN", "t0psecret-value")
    write, times = report.write_report, []

    def fail_once(*given):
        times.append(given)
        if len(times) == 1:
            raise RuntimeError("/home/someone has no t0psecret-value")
        return write(*given)

    monkeypatch.setattr(report, "write_report", fail_once)
    monkeypatch.setattr(execution, "kernel_environment", _environment_with_real_home(execution.kernel_environment))
    outcome, folder, _ = run(tmp_path, "1", overrides={"names": ["/home/someone/x"]})
    assert outcome.status == "failed" and len(times) == 2
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert "/home/someone" not in path.read_text() and "t0psecret" not in path.read_text(), path.name
    assert executed(folder).cells[0].source.startswith("> **failed**")


def test_an_output_that_cannot_be_made_fit_costs_neither_status_nor_page(tmp_path, monkeypatch):
    def deep(notebook):  # as JSON that json reads and nothing else does; really so deep, it would confuse Python 3.11
        if any(cell.get("outputs") for cell in notebook.cells):
            raise RecursionError
        return publishable(notebook)

    for module in (execution, executed_copy):
        monkeypatch.setattr(module, "publishable", deep)
    outcome, folder, _ = run(tmp_path, "1")
    assert outcome.status == "failed" and "the executed copy could not be written: RecursionError" in outcome.reason
    assert json.loads((folder / "status.json").read_text())["status"] == "failed"
    assert executed(folder).metadata.aiterlab["status"] == "failed"
    assert "<strong>failed</strong>" in (folder / "report.html").read_text()


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3", '{"cells": 1}'])
def test_a_notebook_that_is_gone_or_none_by_now_is_a_setup_that_failed(tmp_path, content):
    path = tmp_path / "01_x.ipynb"
    if content is not None:
        path.write_text(content)
    outcome = run_notebook(Job(path, tmp_path / "r", "smoke", {}, {}, 60, {}), say=lambda line: None)
    assert outcome.status == "setup-failed" and str(path) in outcome.reason and "\n" not in outcome.reason
    saved = json.loads((tmp_path / "r" / "01_x" / "status.json").read_text())
    assert saved["status"] == "setup-failed" and (tmp_path / "r" / "01_x" / "report.html").is_file()


@pytest.mark.parametrize(
    ("left_bytes", "left_over"), [(2**20, []), (3 * 2**30, ["3.0 GiB of GPU memory that nothing"])]
)
def test_gpu_memory_is_told_and_must_come_back(tmp_path, monkeypatch, left_bytes, left_over):
    before, marker = 5 * 2**30, tmp_path / "on the GPU"

    def used(numbers):
        assert numbers == ["0"]
        if not marker.exists():
            return before
        return before + int(marker.read_text())

    monkeypatch.setattr(watch.gpus, "visible", lambda: ["0"])
    monkeypatch.setattr(watch.host, "gpu_memory_used", used)
    for name, value in {"_MEMORY_INTERVAL_S": 0.1, "_MEMORY_SHARE": 1.0, "_GPU_FREED_S": 0.5}.items():
        monkeypatch.setattr(watch, name, value)
    file = f"__import__('pathlib').Path({str(marker)!r})"
    cells = (f"{file}.write_text(str(7 * 2**30))", "import time; time.sleep(2)", f"{file}.write_text('{left_bytes}')")
    outcome, folder, _ = run(tmp_path, *cells)
    assert outcome.ok and outcome.peak_gpu_memory_bytes == 7 * 2**30
    assert [words[: len(said)] for words, said in zip(outcome.left_over, left_over, strict=True)] == left_over
    assert "7.00 GiB" in (folder / "report.html").read_text()


def test_a_driver_that_answers_slowly_does_not_keep_the_watch_from_looking(tmp_path, monkeypatch):
    monkeypatch.setattr(watch.gpus, "visible", lambda: ["0"])
    monkeypatch.setattr(watch.host, "gpu_memory_used", lambda numbers: time.sleep(0.2) or 0)
    outcome, _, _ = run(tmp_path, "import time; time.sleep(1.5)")
    assert outcome.ok and outcome.peak_memory_bytes > 10_000_000 and outcome.peak_gpu_memory_bytes == 0


def test_skipped_and_allowed_cells_are_told_apart(tmp_path):
    path = write_notebook(tmp_path / "notebooks" / "01_x.ipynb", "1", "raise ValueError", "2")
    notebook = nbformat.read(path, 4)
    notebook.cells[1].metadata["tags"] = ["skip-execution"]
    notebook.cells[2].metadata["tags"] = ["raises-exception"]
    nbformat.write(notebook, path)
    job = Job(path, tmp_path / "r", "smoke", {}, {}, 60, {})
    outcome = run_notebook(job, say=lambda line: None)
    assert outcome.ok and [cell.status for cell in outcome.cells] == ["ok", "skipped", "ok", "ok"]


def test_titles_come_from_headings_comments_and_code():
    notebook = nbformat.v4.new_notebook()
    new_code, new_text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    notebook.cells = [
        new_code("x = 1"),
        new_code("# Only a comment\nx"),
        new_text("# Does `it` work?\n\ntext\n\n## Look at [it](https://e.org)\n\n```\n# no heading\n```"),
        new_code("x"),
        new_code("# Draw\nx"),
        new_code("   "),
    ]
    titles = [cell.title for cell in status.list_cells(notebook)]
    assert titles == ["x = 1", "Only a comment", "Look at it", "Look at it: Draw"]
    assert status.title_of(notebook, "01_x") == "Does it work?"


def test_no_process_pays_for_a_grammar_of_addresses(run_python):
    """nbformat takes two seconds longer where jsonschema finds the package that compiles it."""
    run_python("import sys, aiterlab.suite.cli, nbformat; assert 'lark' not in sys.modules; nbformat.validate")
