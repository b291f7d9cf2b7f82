# SPDX-License-Identifier: Apache-2.0
"""Break a run in every way that users meet, and ask that nothing is lost, nothing left running, and all of it true."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from bs4 import BeautifulSoup
from fault_runs import TABLE, WAYS, Bench, check_notebook, check_run

from aiterlab.suite import notebook_parameters, resume, status

pytestmark = pytest.mark.slow  # whole runs of the runner

SAVE = """\
from aiterlab.records import save_record
save_record({stem!r}, {{"finding": "It is so."}}, parameters=None)"""

DETACHED = """\
import mmap, os, signal, tempfile, time
tempfile.mkdtemp()
if os.fork() == 0:
    segment = os.open(f"/dev/shm/psm_{os.environ['FAULT_HARNESS_RUN']}", os.O_CREAT | os.O_RDWR)
    os.truncate(segment, mmap.PAGESIZE)
    memory = mmap.mmap(segment, mmap.PAGESIZE)
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if os.fork():
        os._exit(0)
    time.sleep(600)
time.sleep(0.3)"""

SWALLOWS = """\
import time
while True:
    try:
        time.sleep(600)
    except BaseException:
        pass"""

LIMITED = """\
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, resource.RLIM_INFINITY))"""

BYTES = r"""
import os, sys, ctypes
os.write(1, b"\xff\xfe half \xc3 of a character\n")
os.write(2, b"\xff\xfe half \xc3 of a character\n")
ctypes.CDLL(None).puts(b"\xff from C")
print("lone \udcff surrogate"); print("lone \ud800 surrogate", file=sys.stderr)"""

DISPLAYED = r"""
from IPython.display import HTML, Markdown, display
display(HTML("<b>lone \ud800</b>"), Markdown("\ud800"), {"text/plain": "\udfff"}, raw=False)
"\ud800\udcff" """

HOSTILE = r"""
import sys
from IPython.display import HTML, SVG, Javascript, Latex, Markdown, display
evil = "<script>alert(1)</script><img src=x onerror=alert(2)><a href='javascript:alert(3)'>x</a><iframe src=//e.org>"
display(HTML(evil), HTML("<style>@import '//e.org'</style>"), Markdown(evil), Latex(evil), Javascript("alert(4)"))
display(SVG("<svg xmlns='http://www.w3.org/2000/svg' onload='alert(5)'><script>alert(6)</script></svg>"))
display({"text/html": evil, "text/plain": evil, "application/javascript": "alert(7)"}, raw=True)
print(evil); print(evil, file=sys.stderr)
class Odd(Exception): pass
Odd.__name__ = evil
raise Odd("</pre>" + evil)"""

# stem: the cells after the parameters, how the row differs, the word, the states of the cells, the reason.
OK3 = ["ok", "ok", "ok"]
ENDINGS = {
    "good": (["1", "2"], {}, "ok", OK3, ""),
    "raises": (["raise ValueError('told')", "2"], {}, "failed", ["ok", "failed", "not run"], "ValueError: told"),
    "kernel_killed": (
        ["import os\nos.kill(os.getpid(), 9)", "2"], {}, "kernel-died", ["ok", "kernel-died", "not run"], "SIGKILL",
    ),
    "kernel_exits": (
        ["import os\nos._exit(3)", "2"], {}, "kernel-died", ["ok", "kernel-died", "not run"], "exit code 3",
    ),
    "segfault": (
        ["import ctypes\nctypes.string_at(0)", "2"], {}, "kernel-died", ["ok", "kernel-died", "not run"], "SIGSEGV",
    ),
    "never_ends": (
        ["1", "import time\ntime.sleep(600)", "2"], {"budget_minutes": 0.1},
        "timeout", ["ok", "ok", "timeout", "not run"], "budget of 6 s",
    ),
    "cell_budget": (
        ["1", "import time\ntime.sleep(600)", "2"], {"cell_budget_minutes": 0.05},
        "timeout", ["ok", "ok", "timeout", "not run"], "cell 3 .* budget of 3 s",
    ),
    "swallows_interrupts": (
        [SWALLOWS, "2"], {"cell_budget_minutes": 0.05}, "timeout", ["ok", "timeout", "not run"], "budget of 3 s",
    ),
    "detached_child": ([DETACHED, "2"], {}, "ok", OK3, ""),
    "detached_and_killed": (
        [DETACHED, "import os\nos.kill(os.getpid(), 9)"], {}, "kernel-died", ["ok", "ok", "kernel-died"], "SIGKILL",
    ),
    "child_left": (
        ["import subprocess\nsubprocess.run(['sh', '-c', 'sleep 600 &'])", "2"],
        {}, "ok", OK3, "",
    ),
    "memory_error": (
        [LIMITED, "x = bytearray(10**9)", "2"], {},
        "out-of-memory", ["ok", "ok", "out-of-memory", "not run"], "MemoryError",
    ),
    "odd_bytes": ([BYTES, "2"], {}, "ok", OK3, ""),
    "odd_display": ([DISPLAYED, "2"], {}, "ok", OK3, ""),
    "odd_traceback": (
        ["raise ValueError('half \\udcff \\ud800')", "2"], {}, "failed", ["ok", "failed", "not run"], "half",
    ),
    "hostile": ([HOSTILE, "2"], {}, "failed", ["ok", "failed", "not run"], ""),
}  # fmt: skip


# The others run through the same code whichever way their process was started.
SPAWNED = ("good", "kernel_killed", "kernel_exits", "never_ends", "swallows_interrupts", "detached_child", "child_left",
           "odd_bytes")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print("\n" + "\n".join(TABLE))


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Return one run for each way, of all notebooks that end by themselves, or by their budget."""

    @functools.cache
    def run(way):
        bench = Bench(tmp_path_factory.mktemp(way), way)
        for stem, (cells, row, *_) in ENDINGS.items():
            if way == "fork" or stem in SPAWNED:
                bench.add(stem, *cells, **row)
        return bench.run("--at-once", "4")

    return run


@pytest.fixture(params=WAYS)
def endings(request, run_of):
    return run_of(request.param)


@pytest.mark.parametrize(
    ("way", "stem"), [(way, stem) for way in WAYS for stem in ENDINGS if way == "fork" or stem in SPAWNED]
)
def test_every_ending_is_told_truly(run_of, way, stem):
    endings = run_of(way)
    _, _, word, cells, reason = ENDINGS[stem]
    check_notebook(endings.folder / stem, word, cells, reason, f"{stem} ({endings.bench.way})")
    assert any(line.split()[:2] == [stem, word] for line in endings.text.splitlines()), endings.text


def test_the_run_as_a_whole_is_told_truly(endings):
    check_run(endings, "failed", 1)


def test_what_had_to_be_killed_is_named(endings):
    stems = ("good", "detached_child", "child_left")
    left_over = {stem: status.NotebookStatus.load(endings.folder / stem).left_over for stem in stems}
    assert left_over["good"] == [] and len(left_over["detached_child"]) == 1
    (child,) = left_over["child_left"]
    assert "sleep 600" in child and "still alive" not in child


def test_undecodable_output_is_kept_readable(endings):
    log = (endings.folder / "odd_bytes" / "log.txt").read_text(encoding="utf-8")
    for said in (r"\ud800 surrogate", "half", "from C", "of a character"):
        assert said in log
    if "odd_display" not in endings.bench.rows:
        return
    page = (endings.folder / "odd_display" / "report.html").read_text(encoding="utf-8")
    assert r"lone \ud800" in page


def test_no_script_survives_in_any_page(endings):
    for file in endings.folder.rglob("*.html"):
        page = BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser")
        assert not page.find_all(["script", "iframe", "object", "embed", "base", "form", "link"]), file
        for tag in page.find_all(True):
            for name, value in tag.attrs.items():
                assert not name.lower().startswith("on"), (file, tag)
                assert "javascript:" not in str(value).lower(), (file, tag)
            assert "//e.org" not in str(tag.attrs)
        assert "@import" not in "".join(style.text for style in page.find_all("style"))


def test_a_broken_parameters_cell_starts_nothing(tmp_path):
    bench = Bench(tmp_path)
    bench.add("01_a", "1")
    bench.add("02_broken", "1", parameters="names: list[str] = [")
    run = bench.run()
    assert run.process.returncode == 2 and "02_broken" in run.text and len(run.lines) == 1
    assert not bench.results.exists() and run.left() == []


# ---- stopped from outside


def stoppable(tmp_path, way):
    """A run of which one notebook is done and two are busy until a file appears; one has a child that hides."""
    bench = Bench(tmp_path, way)
    flag = tmp_path / "go"
    busy = f"import pathlib, time\nwhile not pathlib.Path({str(flag)!r}).exists():\n    time.sleep(0.05)"
    pid = "import os, pathlib\nprint('kept')\npathlib.Path({!r}).write_text(str(os.getpid()))"
    bench.add("01_done", "1", SAVE.format(stem="01_done"))
    bench.add("02_busy", pid.format(str(tmp_path / "pid")) + "\n" + DETACHED, busy, "1")
    bench.add("03_busy", "1", busy, "1")
    bench.add("04_later", "1", after=("01_done", "02_busy"))
    run = bench.start("--at-once", "3")
    run.until(r"01_done  \[3/3\].*ok")
    for stem in ("02_busy", "03_busy"):
        # What the cells before have said is on the disk although the one that runs says nothing.
        run.until_true(lambda stem=stem: running(run.folder / stem) == 3, what=f"{stem} to be saved")
    kernel = psutil.Process(int((tmp_path / "pid").read_text()))
    worker = kernel.parent()
    return bench, flag, run, worker, worker.parent()


def running(folder):
    found = status.NotebookStatus.load(folder)
    stops = [cell.number for cell in found.cells if cell.status == status.INTERRUPTED] if found else []
    return stops[0] if stops else None


BUSY = ["ok", "ok", "{}", "not run"]
STOPS = {  # how: the word of 02_busy, of 03_busy, of 04_later and of the run, and exit codes told and returned
    "ctrl_c": ("interrupted", "interrupted", None, "interrupted", 130, 130),
    "ctrl_c_twice": ("interrupted", "interrupted", None, "interrupted", 130, 130),
    "sigterm": ("interrupted", "interrupted", None, "interrupted", 130, 130),
    "runner": ("interrupted", "interrupted", None, "interrupted", None, -9),
    "keeper": ("failed", "ok", "ok", "failed", 1, 1),
    "worker": ("failed", "ok", "ok", "failed", 1, 1),
    "runner_and_keeper": ("interrupted", "interrupted", None, "interrupted", None, -9),
    "runner_and_worker": ("interrupted", "interrupted", None, "interrupted", None, -9),
}
# Each takes two runs. The others say the same of code that these have run through.
OFTEN = {("ctrl_c_twice", "fork"), ("runner", "fork"), ("keeper", "fork"), ("runner_and_worker", "fork")}
OFTEN |= {("worker", "spawn")}


@pytest.mark.parametrize(
    ("how", "way"),
    [
        pytest.param(how, way, marks=() if (how, way) in OFTEN else pytest.mark.long, id=f"{how}-{way}")
        for how in STOPS
        for way in WAYS
    ],
)
def test_a_stop_from_outside_loses_nothing_and_resumes(tmp_path, how, way):
    bench, flag, run, worker, keeper = stoppable(tmp_path, way)
    if how == "sigterm":
        run.process.send_signal(signal.SIGTERM)
    elif how.startswith("ctrl_c"):
        run.process.send_signal(signal.SIGINT)
        if how == "ctrl_c_twice":
            time.sleep(0.3)
            run.process.send_signal(signal.SIGINT)
    else:
        victims = {"runner": run.process, "keeper": keeper, "worker": worker}
        for name in how.split("_and_"):
            victims[name].kill()
        if "runner" not in how:
            flag.touch()
    run.wait(60)
    busy, also_busy, later, word, told, returned = STOPS[how]
    check_run(run, word, told, returned, may_hold="runner" in how)
    case = f"{how} ({way})"
    folder = run.folder
    check_notebook(folder / "01_done", "ok", ["ok"] * 3, case=f"{case} 01_done")
    check_notebook(folder / "02_busy", busy, [one.format(busy) for one in BUSY], case=f"{case} 02_busy")
    assert "kept" in (folder / "02_busy" / "report.html").read_text()
    also = ["ok"] * 4 if also_busy == "ok" else [one.format(also_busy) for one in BUSY]
    check_notebook(folder / "03_busy", also_busy, also, case=f"{case} 03_busy")
    assert (folder / "04_later").exists() == (later is not None)

    flag.touch()
    again = bench.run("--resume")
    check_run(again, "ok", 0)
    assert again.folder == folder
    for stem in ("01_done", "02_busy", "03_busy", "04_later"):
        check_notebook(folder / stem, "ok", case=f"{case} --resume {stem}")
    # Of those that ended well one has left no record, without which nobody can tell what was found.
    assert re.findall(r"^(\w+)  unchanged since", again.text, re.MULTILINE) == ["01_done"]


# ---- what a result depends on


def test_resume_repeats_what_has_changed_and_says_what(tmp_path):
    bench = Bench(tmp_path)
    stems = ["same", "touched", "source", "parameter", "reads", "garbled_status", "cut_record", "failed"]
    for stem in stems:
        cell = "1 / names.index('a')" if stem == "failed" else SAVE.format(stem=stem)
        bench.add(stem, "1", cell, after=("source",) if stem == "reads" else ())
    first = bench.run("--at-once", "4")
    check_run(first, "failed", 1)
    since = check_notebook(first.folder / "same", "ok").ended_utc

    for stem in ("touched", "source"):
        path = bench.notebooks / f"{stem}.ipynb"
        text = path.read_text()
        if stem == "source":
            path.write_text(text.replace('"1"', '"1 + 1"'))
            assert path.read_text() != text
        os.utime(path, (1e9, 1e9))
    (first.folder / "garbled_status" / "status.json").write_bytes(b'{"key": "x", "cells": [\xff')
    record = first.folder / "cut_record" / "record.json"
    record.write_text(record.read_text()[:40])
    second = bench.run("--resume", "--set", "parameter.workers=2", "--at-once", "4")
    assert second.folder == first.folder
    check_run(second, "failed", 1)
    reasons = dict(re.findall(r"^(\w+)  runs again: (.*)$", second.text, re.MULTILINE))
    assert reasons.pop("cut_record").startswith("its record cannot be read")
    assert reasons == {
        "source": "changed since: notebook",
        "parameter": "changed since: parameters",
        "reads": "changed since: records read",
        "garbled_status": "not run yet",
        "failed": "it was failed",
    }
    for stem in ("same", "touched"):
        assert f"{stem}  unchanged since {since}" in second.text or stem == "touched"
        kept = check_notebook(first.folder / stem, "ok", case=f"--resume, {stem}")
        assert kept.reused_from == first.folder.name and kept.reused_since_utc == kept.ended_utc
        assert re.search(rf"{stem} +ok, reused", second.text)

    only = ("--resume", "--only", "same", "--set", "same.workers=1")
    assert "same  runs again: changed since: environment" in bench.run(*only, VLLM_ROCM_USE_AITER="0").text
    assert "same  unchanged since" in bench.run(*only, VLLM_ROCM_USE_AITER="0").text
    library = {"VLLM_ROCM_USE_AITER": "0", "FAULT_HARNESS_LIBRARY": "1"}
    assert "same  runs again: changed since: library" in bench.run(*only, **library).text


def test_to_go_on_with_one_leaves_the_others_of_the_run_as_they_are(tmp_path):
    bench = Bench(tmp_path)
    bench.add("01_a", SAVE.format(stem="01_a"))
    bench.add("02_b", "assert workers == 2", SAVE.format(stem="02_b"))
    bench.add("03_c", SAVE.format(stem="03_c"), after=("01_a",))
    first = bench.run("--set", "01_a.workers=3")
    check_run(first, "failed", 1)
    again = bench.run("--resume", "--only", "02_b", "--set", "02_b.workers=2")
    check_run(again, "ok", 0)
    assert again.folder == first.folder and "01_a" not in again.text.partition("notebook")[0]
    # What the first two asked for still holds, and 03 knows that its source is the one it has read.
    third = bench.run("--resume", "--only", "03_c")
    assert "03_c  unchanged since" in third.text
    whole = bench.run("--resume")
    check_run(whole, "ok", 0)
    assert whole.text.count("unchanged since") == 3
    bench.run("--resume", "--only", "01_a", "--set", "01_a.workers=4")
    assert "03_c  runs again: changed since: records read" in bench.run("--resume", "--only", "03_c").text
    bench.rows["02_b"]["memory_gb"] = 1e6  # there was enough once, and what is there needs none
    assert "02_b  unchanged since" in bench.run("--resume").text
    refused = bench.run("--resume", "--only", "01_x")
    assert refused.process.returncode == 2 and "did you mean '01_a'" in refused.text


@pytest.mark.parametrize("way", WAYS)
def test_a_notebook_that_is_spoilt_meanwhile_costs_nobody_else_anything(tmp_path, way):
    """An editor saves while a run is on: what it leaves then is half a notebook, or none."""
    bench = Bench(tmp_path, way)
    others = [bench.notebooks / f"{stem}.ipynb" for stem in ("02_gone", "03_half")]
    spoil = "from pathlib import Path\n" + "\n".join(
        f"Path({str(path)!r}).{what}" for path, what in zip(others, ("unlink()", "write_text('{')"), strict=True)
    )
    bench.add("01_a", spoil)
    for stem in ("02_gone", "03_half", "04_d"):
        bench.add(stem, "1", after=("01_a",))
    run = bench.run()
    check_run(run, "failed", 1)
    for stem in ("01_a", "04_d"):
        check_notebook(run.folder / stem, "ok", case=f"beside a spoilt one ({way})")
    for stem, said in (("02_gone", "there is no such notebook"), ("03_half", "not a notebook")):
        ending = status.NotebookStatus.load(run.folder / stem)
        assert ending.status == "setup-failed" and ending.ended_utc and said in ending.reason, (stem, ending)
        assert (run.folder / stem / "report.html").is_file()
        assert re.search(rf"{stem} +setup-failed", run.text), run.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trees", ["regressed", "hotfixed-without-1:path:vllm"]),
        ("trees", ["hotfixed:hotfixed:path:vllm"]),
        ("trees", ["installed"]),
        ("tasks", ["file:prompts.txt"]),
        ("runs", ["old"]),
        ("models", {"target": "mine"}),
    ],
)
def test_no_key_covers_what_lies_outside_of_the_project(name, value):
    assert resume.outside({"profile": "standard", name: value}) == name


def test_no_notebook_reads_outside_of_the_project_by_itself():
    for stem, model in notebook_parameters.MODELS.items():
        assert resume.outside(model().model_dump()) is None, stem


def test_a_result_that_runs_again_does_not_keep_the_old_ones_files(tmp_path):
    """Whoever reads its record afterwards must not get that of another question."""
    bench = Bench(tmp_path)
    bench.add("01_a", "assert workers == 1", SAVE.format(stem="01_a"))
    first = bench.run()
    check_notebook(first.folder / "01_a", "ok")
    again = bench.run("--resume", "--set", "01_a.workers=2")
    check_run(again, "failed", 1)
    outcome = check_notebook(first.folder / "01_a", "failed", case="fails when it runs again")
    assert outcome.finding is None and not (first.folder / "01_a" / "record.json").exists()
    assert (first.folder / "01_a" / "log.txt").read_text().count("=== [1]") == 1


@pytest.mark.parametrize(
    "garbage", [b"", b"null", b"[]", b'{"stem": 1}', b'{"cells": null}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_garbled_status_is_no_status(tmp_path, garbage):
    (tmp_path / "status.json").write_bytes(garbage)
    assert resume.reusable(tmp_path, {})[0] is None


@pytest.mark.parametrize("key", ["x", 5, [], {"notebook": 5}])
def test_a_status_with_a_garbled_key_is_no_status(tmp_path, key):
    whole = status.NotebookStatus(stem="a", run="r", profile="smoke", parameters={}, status="ok")
    whole.save(tmp_path)
    text = (tmp_path / "status.json").read_text()
    (tmp_path / "status.json").write_text(text.replace('"key": null', f'"key": {json.dumps(key)}'))
    assert resume.reusable(tmp_path, {"notebook": "5"})[0] is None


# ---- clocks

# Loaded into every program that is started, so into runner, worker and kernel.
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
static long calls;
int clock_gettime(clockid_t clock, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, at);
    if (clock == CLOCK_REALTIME) at->tv_sec = %s;
    return result;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec; at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""
ODD_CLOCKS = {
    "back": "at->tv_sec - 3600 * (++calls % 1000)",
    "on": "at->tv_sec + 3600 * ++calls",
    "still": "1800000000",
}


@pytest.fixture(scope="module")
def odd_clock(tmp_path_factory):
    """Return what builds a clock: one that is an hour further off at each look, or one that stands still."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("a clock is set with a library of our own, and there is no C compiler")
    folder = tmp_path_factory.mktemp("clock")

    def build(kind):
        (folder / f"{kind}.c").write_text(CLOCK % ODD_CLOCKS[kind])
        library = folder / f"{kind}.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / f"{kind}.c", "-ldl"], check=True)
        return str(library)

    return build


@pytest.mark.parametrize(("kind", "way"), [("back", "spawn"), ("on", "fork")])
def test_a_clock_that_is_set_changes_no_duration(tmp_path, kind, way, odd_clock):
    bench = Bench(tmp_path, way)
    bench.add("01_a", "import time\ntime.sleep(0.5)", "1", cell_budget_minutes=0.5, budget_minutes=2)
    run = bench.run(LD_PRELOAD=odd_clock(kind))
    check_run(run, "ok", 0)
    outcome = check_notebook(run.folder / "01_a", "ok", ["ok"] * 3, case=f"clock {kind} ({way})")
    assert 0.5 < outcome.cells[1].seconds < 30 and outcome.cells[1].seconds < outcome.seconds < 60
    notebook = nbformat.read(run.folder / "01_a" / "executed.ipynb", as_version=4)
    durations = [cell.metadata.papermill["duration"] for cell in status.code_cells(notebook)]
    assert 0.5 < durations[1] < 30 and min(durations) >= 0
    assert sum(durations) <= notebook.metadata.papermill["duration"] < 60


# ---- two at once


def test_two_runners_of_one_second_keep_out_of_each_others_way(tmp_path, odd_clock):
    bench = Bench(tmp_path)
    bench.add("01_a", "print('told')", SAVE.format(stem="01_a"))
    runs = [bench.start(LD_PRELOAD=odd_clock("still")) for _ in range(2)]
    for run in runs:
        run.wait(60)
    folders = sorted(path for path in bench.results.iterdir() if not path.is_symlink())
    assert len(folders) == 2 and folders[1].name == f"{folders[0].name}-2"
    for folder in folders:
        check_notebook(folder / "01_a", "ok", case="two runners at once")
        assert "told" in (folder / "01_a" / "log.txt").read_text()
    assert (bench.results / "latest").resolve() in folders
    assert [run.process.returncode for run in runs] == [0, 0] and all(run.left() == [] for run in runs)


@pytest.mark.parametrize("way", [pytest.param("fork", marks=pytest.mark.long), "spawn"])
def test_a_run_that_is_at_work_cannot_be_resumed(tmp_path, way):
    bench, flag, run, *_ = stoppable(tmp_path, way)
    refused = bench.run("--resume")
    assert refused.process.returncode == 2 and "another run_all.py is at work in this run" in refused.text
    assert len(refused.lines) == 1
    # Nor one whose runner is gone while its notebooks are still ending.
    for stopped in run.processes():
        if stopped.pid != run.process.pid:
            stopped.suspend()
    run.process.kill()
    run.wait(10)
    refused = bench.run("--resume")
    assert refused.process.returncode == 2 and "another run_all.py is at work in this run" in refused.text
    for stopped in run.processes():
        stopped.resume()
    check_run(run, "interrupted", None, -9, may_hold=True)
    flag.touch()
    check_run(bench.run("--resume"), "ok", 0)


# ---- too much, and too little


FLOODS = {
    "prints": "line = 'x' * 999\nwhile True:\n    print(line)",
    "displays": "big = 'z' * 10_000_000\nwhile True:\n    display(big)",
    "writes": "import os\nchunk = b'y' * 999 + b'\\n'\nwhile True:\n    os.write(1, chunk)",  # a minute
}


@pytest.mark.parametrize(
    ("stems", "way"),
    [
        (("prints", "displays"), "fork"),
        pytest.param(("prints", "displays"), "spawn", marks=pytest.mark.long),
        pytest.param(("writes",), "fork", marks=pytest.mark.long),
    ],
)
def test_endless_output_ends_its_notebook_and_fills_nothing(tmp_path, stems, way):
    bench = Bench(tmp_path, way)
    for stem in stems:
        bench.add(stem, FLOODS[stem], "2", budget_minutes=4)
    run = bench.start("--at-once", "3")
    run.watch_memory()
    run.wait(300)
    check_run(run, "failed", 1)
    for stem in stems:
        reason = "more than 64 MB of output in one cell"
        check_notebook(run.folder / stem, "failed", ["ok", "failed", "not run"], reason, f"{stem} forever ({way})")
        sizes = {path.name: path.stat().st_size for path in (run.folder / stem).iterdir()}
        assert sum(sizes.values()) < 150e6 and sizes["executed.ipynb"] < 1e6, sizes
    assert run.peak_bytes < 1.5e9, f"{run.peak_bytes / 1e9:.1f} GB: {run.peak_of}"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes for the results."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


FILL = """\
from aiterlab.paths import output_dir
with open(output_dir({stem!r}) / "big", "wb", buffering=0) as file:
    {how}"""


@pytest.mark.parametrize("way", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_a_disk_that_fills_up_is_told_of_and_nothing_is_half_written(tmp_path, small_disk, way):
    bench = Bench(tmp_path, way, small_disk / "results")
    bench.add("fills", FILL.format(stem="fills", how="while True:\n        file.write(bytes(1_000_000))"), "2")
    swallows = "import contextlib\n" + FILL.format(
        stem="swallows",
        how="with contextlib.suppress(OSError):\n        while True:\n            file.write(bytes(1_000_000))",
    )
    bench.add("swallows", swallows, "1", after=("fills",))
    run = bench.run("--at-once", "1")
    check_run(run, "failed", 1)
    check_notebook(run.folder / "fills", "failed", ["ok", "failed", "not run"], "No space left", f"disk fills ({way})")
    (run.folder / "fills" / "big").unlink()
    # What it needed was kept free for it, so it ends as if nothing were wrong; the next one finds no room to begin.
    assert re.search(r"swallows +setup-failed +.*No space left", run.text), run.text
    again = bench.run("--resume", "--only", "swallows")
    check_run(again, "failed", 1)  # the run, because of the other one, which stays as it was
    check_notebook(run.folder / "swallows", "ok", ["ok"] * 3, case=f"disk fills unnoticed ({way})")


@pytest.mark.parametrize("left", [0, 4_000_000])
def test_a_full_disk_begins_nothing(tmp_path, small_disk, left):
    bench = Bench(tmp_path, "fork", small_disk / "results")
    bench.add("01_a", "1")
    free = shutil.disk_usage(small_disk).free - left
    with open(small_disk / "big", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, free)
    run = bench.run()
    assert "No space left" in run.text and "Traceback" not in run.text and run.left() == []
    if left > 2_000_000:
        check_run(run, "failed", 1)
        check_notebook(run.folder / "01_a", "setup-failed", ["not run"] * 2, "No space left", "disk is full")
    else:
        assert run.process.returncode == 2 and len(run.lines) == 1
        assert list(bench.results.rglob("*.*")) == []


@pytest.mark.parametrize(
    ("shell", "said"),
    [('"$@" | head -1', 1), ('"$@" <&- >&- 2>&-', 0), ('"$@" > /dev/full', 0)],
    ids=["head", "closed", "full"],
)
def test_a_run_outlives_whoever_reads_its_lines(tmp_path, shell, said):
    bench = Bench(tmp_path)
    bench.add("01_a", "import time\ntime.sleep(0.5)", SAVE.format(stem="01_a"))
    bench.add("02_b", "1", after=("01_a",))
    run = bench.run(shell=f"set -o pipefail; {shell}")
    assert len(run.lines) == said, run.text
    check_run(run, "ok", 0)
    for stem in bench.rows:
        check_notebook(run.folder / stem, "ok", ["ok"] * len(status.NotebookStatus.load(run.folder / stem).cells))


def test_a_terminal_that_knows_ascii_only_is_no_reason_to_fail(tmp_path):
    bench = Bench(tmp_path)
    bench.add("01_a", "# Ist es schön?", "raise ValueError('größer als \\u2265 \\ud800')")
    run = bench.run(PYTHONIOENCODING="ascii")
    check_run(run, "failed", 1)
    check_notebook(run.folder / "01_a", "failed", ["ok", "failed"], "größer")


@pytest.fixture
def small_memory(tmp_path):
    """A control group with little memory: the way into it, as a bash line."""
    for folder, limit, procs in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "cgroup.procs"),
        (Path("/sys/fs/cgroup"), "memory.max", "cgroup.procs"),
    ):
        group = folder / f"aiterlab-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text("900000000")
            yield f'echo $$ > {group / procs} && exec "$@"'
            return
        except OSError:
            continue
        finally:
            group.rmdir()
    pytest.skip("no control group for memory can be made here")


@pytest.mark.parametrize("way", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_a_kernel_that_the_system_kills_for_want_of_memory_is_said_to_be_out_of_memory(tmp_path, small_memory, way):
    bench = Bench(tmp_path, way)
    greedy = "kept = []\nwhile True:\n    kept.append(bytearray(b'x' * 20_000_000))"
    bench.add("01_a", "1", greedy, "2", memory_gb=0.1)
    run = bench.run(shell=small_memory)
    check_run(run, "failed", 1)
    check_notebook(
        run.folder / "01_a",
        "out-of-memory",
        ["ok", "ok", "out-of-memory", "not run"],
        case=f"killed for memory ({way})",
    )


def test_what_a_container_has_no_memory_for_is_skipped(tmp_path, small_memory):
    bench = Bench(tmp_path)
    bench.add("01_a", "1", memory_gb=2)
    bench.add("02_b", "1", memory_gb=0.1)
    run = bench.run(shell=small_memory)
    check_run(run, "failed", 1)
    check_notebook(
        run.folder / "01_a", "skipped", ["not run"] * 2, "needs 2 GB of memory, and 0.[0-9] GB are free", "no room"
    )
    check_notebook(run.folder / "02_b", "ok", case="has room")
