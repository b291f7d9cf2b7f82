# SPDX-License-Identifier: Apache-2.0
"""The real pool on trees that are a few lines long: their `vllm` crashes, hangs or answers while it is imported."""

import contextlib
import functools
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from aiterlab import paths
from aiterlab.machines import Machine
from aiterlab.probes import EXPLICIT, Cell, Progress, ask, pool
from aiterlab.trees import Tree

pytestmark = pytest.mark.slow  # three to five seconds each: server and cells import torch

NOTE = "import os, pathlib, sys, time\npathlib.Path(__file__).with_name('pids').open('a').write(f'{os.getpid()}\\n')\n"
BEHAVIOURS = {
    "answers": "",
    "crashes": "print('a last word', file=sys.stderr); os.abort()\n",
    "exits": "os._exit(0)\n",  # says that all is well and leaves no answer
    "hangs": "time.sleep(600)\n",
    "spawns": "import subprocess\nchild = subprocess.Popen(['sleep', '600'])\n"
    "pathlib.Path(__file__).with_name('pids').open('a').write(f'{child.pid}\\n')\n",
    "tells": "raise OSError(sorted(n for n in sys.modules if n.partition('.')[0] in ('vllm', 'aiter', 'stray'))"
    " + [os.environ.get('STRAY', 'unset'), os.environ.get('VLLM_STRAY', 'unset')])\n",
    "strays": "import types; sys.modules['stray'] = types.ModuleType('stray'); os.environ['STRAY'] = 'set'\n",
}


def make_cell(folder: Path, behaviour: str, number: int = 0) -> Cell:
    """A cell of a tree that behaves as named; it writes down the processes that import it."""
    folder = folder / f"{behaviour}-{number}"
    (folder / "vllm").mkdir(parents=True, exist_ok=True)
    (folder / "vllm" / "__init__.py").write_text(NOTE + BEHAVIOURS[behaviour])
    tree = Tree(behaviour, folder, folder / "vllm", f"{behaviour}-{number}", "a test")
    return Cell(tree, Machine(aiter=False, flash_attn=False), None)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of this file's own, in which the pool has learnt already what such cells load."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(paths.CACHE_VARIABLE, str(folder))
        patch.setenv(paths.RUN_DIR_VARIABLE, str(folder / "run"))
        ask([make_cell(folder, "answers")], timeout_s=60)
    return folder


@pytest.fixture
def cell(cache, tmp_path, monkeypatch):
    """Make cells whose answers are kept in a run of the test's own."""
    monkeypatch.setenv(paths.CACHE_VARIABLE, str(cache))
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path / "run"))
    return functools.partial(make_cell, tmp_path)


def pids(cell: Cell) -> list[int]:
    file = cell.tree.source / "pids"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # an orphan's remains may wait for init
    return False


def wait_until(true, limit_s: float = 10.0) -> bool:
    end = time.monotonic() + limit_s
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


def test_a_crash_and_a_hang_are_rows_and_the_other_cells_go_on(cell):
    asked = [cell("answers"), cell("crashes"), cell("exits"), cell("hangs"), cell("answers", 1)]
    seen = []
    rows = ask(asked, workers=2, timeout_s=4, progress=lambda done, total, elapsed_s: seen.append((done, total)))
    assert [row["tree"] for row in rows] == [c.tree.name for c in asked]
    assert seen == [(n, 5) for n in range(1, 6)]
    first, crashed, empty, hung, last = rows
    for row in (first, last):
        assert row["facts"]["platform"]["message"] == "No module named 'vllm.platforms'"
        assert (row["verdict"], row["no_answer_reason"]) == ("broken", None)
    for row in (crashed, empty, hung):
        assert (row["verdict"], row["facts"]) == ("no answer", {})
    assert crashed["no_answer_reason"] == "ended with status -6: a last word"
    assert empty["no_answer_reason"].startswith("ended with status 0")
    assert hung["no_answer_reason"].startswith("timed out")
    assert 4 <= hung["seconds"] < 10
    assert not any(alive(pid) for c in asked for pid in pids(c))
    kept = [path for path in paths.cells_dir().iterdir() if path.suffix == ".json"]
    assert [json.loads(path.read_text())["platform"]["outcome"] for path in kept] == ["error", "error"]


def test_an_answer_is_kept_and_not_asked_again(cell):
    asked = [cell("answers"), cell("crashes")]
    before = ask(asked, timeout_s=20)
    assert [row["reused"] for row in before] == [False, False]
    again = ask([cell("answers")], timeout_s=20)
    assert again[0]["reused"] is True
    assert again[0]["facts"] == before[0]["facts"]
    assert len(pids(asked[0])) == 1
    ask(asked, timeout_s=20)
    assert (len(pids(asked[0])), len(pids(asked[1]))) == (1, 2), "only what has no answer is asked again"


def test_a_kept_answer_needs_no_server(cell, monkeypatch):
    ask([cell("answers")], timeout_s=20)
    monkeypatch.setattr(pool, "_Server", None)
    assert ask([cell("answers")])[0]["reused"] is True
    monkeypatch.setattr(pool, "_context", lambda: "other code")
    with pytest.raises(TypeError):
        ask([cell("answers")])


def test_ctrl_c_keeps_what_is_answered_and_leaves_no_process(cell):
    asked = [cell("answers"), cell("hangs"), cell("hangs", 1)]

    def interrupt(done, total, elapsed_s):
        assert wait_until(lambda: pids(asked[1]) and pids(asked[2]))
        raise KeyboardInterrupt

    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(KeyboardInterrupt):
        ask(asked, workers=3, timeout_s=60, progress=interrupt)
    hanging = pids(asked[1]) + pids(asked[2])
    assert len(hanging) == 2
    assert wait_until(lambda: not any(map(alive, hanging)))
    assert {child.pid for child in psutil.Process().children()} <= before
    assert ask(asked[:1])[0]["reused"] is True


def test_what_a_cell_started_ends_with_it(cell):
    (row,) = ask([cell("spawns")], timeout_s=20)
    assert row["verdict"] == "broken"
    probe, sleeper = pids(cell("spawns"))
    assert wait_until(lambda: not alive(sleeper) and not alive(probe))


def test_a_cell_sees_nothing_of_another_one_or_of_the_callers_switches(cell, monkeypatch):
    monkeypatch.setenv("VLLM_STRAY", "set")
    _, row = ask([cell("strays"), cell("tells")], workers=1, timeout_s=20)
    assert row["facts"]["platform"]["message"] == "['vllm', 'unset', 'unset']"


def test_a_server_that_cannot_start_says_why(cell, monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nread line\necho 'no such luck' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(pool.ServerError, match=r"ended \(status 3\): no such luck"):
        ask([cell("answers")])


def test_the_context_follows_the_code_and_the_packages(monkeypatch, tmp_path):
    plain = pool._context()
    assert pool._context() == plain
    with monkeypatch.context() as patch:
        patch.setattr(pool, "_versions", lambda: "torch==0")
        assert pool._context() != plain
    read = Path.read_bytes
    for name in ("policy.py", "drive.py", "rocminfo", "reference.py", "edits.py"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path, name=name: read(path) + b"#" * (path.name == name))
            assert pool._context() != plain, name


def test_progress_speaks_at_the_start_twice_a_minute_and_at_the_end(capsys):
    say = Progress(interval_s=30)
    for done, elapsed_s in ((2, 1), (3, 10), (4, 32), (5, 40), (6, 45)):
        say(done, 6, elapsed_s)
    assert capsys.readouterr().out.splitlines() == [
        "2 of 6 cells, 1 s",
        "4 of 6 cells, 32 s, about 32 s left",
        "6 of 6 cells, 45 s",
    ]


def test_one_worker_per_usable_core_by_default(cell, monkeypatch):
    used = []

    class Server:
        __init__ = lambda self, *args: None  # noqa: E731
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *args: None  # noqa: E731

        def answer(self, todo, workers, timeout_s, finish):
            used.append(workers)
            for index in todo:
                finish(index, {"loaded_modules": []})

    monkeypatch.setattr(pool, "_Server", Server)
    monkeypatch.setattr(pool._Preload, "scout", lambda self, cell, timeout_s: [])
    compiled = replace(cell("answers", 1).tree, compiled=True)
    _, row = ask([cell("answers"), Cell(cell("answers", 2).tree, Machine("native"), None)])
    assert (used, row["verdict"]) == ([len(os.sched_getaffinity(0))], "no answer")
    assert "no compiled extensions" in row["no_answer_reason"]
    used.clear()
    ask([cell("answers"), Cell(compiled, Machine("native"), None), Cell(compiled, Machine("native"), EXPLICIT)])
    assert used == [len(os.sched_getaffinity(0)), 1], "a native machine is one GPU, its cells take turns"
