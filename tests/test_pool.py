# SPDX-License-Identifier: Apache-2.0
"""The real pool on trees that are a few lines long: their `vllm` crashes, hangs or answers while it is imported."""

import contextlib
import functools
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from aiterlab import paths, security, trees
from aiterlab.machines import Machine
from aiterlab.machines.description import with_switch
from aiterlab.probes import EXPLICIT, Cell, Progress, answers, ask, pool, preload
from aiterlab.probes.reads import Forbidden, Reads
from aiterlab.suite import family
from aiterlab.trees import Tree

pytestmark = pytest.mark.slow  # three to five seconds each: server and cells import torch

NOTE = "import os, pathlib, sys, time\npathlib.Path(__file__).with_name('pids').open('a').write(f'{os.getpid()}\\n')\n"
BEHAVIOURS = {
    "answers": "",
    "crashes": "print('a last word', file=sys.stderr); os.abort()\n",
    "points": "print('at', __file__, file=sys.stderr)\n",
    "keeps": "raise OSError(os.environ['VLLM_CACHE_ROOT'])\n",
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
    """A cache of this file's own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cell(cache, tmp_path, monkeypatch):
    """Make cells whose answers are kept in a run of the test's own."""
    monkeypatch.setenv(paths.CACHE_VARIABLE, str(cache))
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path / "run"))
    monkeypatch.setattr(preload, "MODULES", ("torch",))  # what such cells import
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
    rows = ask(asked, workers=2, timeout_s=10, progress=lambda done, total, elapsed_s: seen.append((done, total)))
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
    assert 10 <= hung["seconds"] < 25
    assert not any(alive(pid) for c in asked for pid in pids(c))
    kept = [path for path in paths.cells_dir().iterdir() if path.suffix == ".json"]
    assert [json.loads(path.read_text())["platform"]["outcome"] for path in kept] == ["error", "error"]


def test_what_a_cell_prints_names_no_home(cell, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    ask([cell("points")], timeout_s=20)
    (log,) = paths.cells_dir().glob("*.log")
    assert "at ~/points-0/vllm/__init__.py" in log.read_text()
    assert security.scan_folder(paths.cells_dir()) == []


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
    monkeypatch.setattr(pool, "Server", None)
    assert ask([cell("answers")])[0]["reused"] is True
    monkeypatch.setattr(answers, "context", lambda: "other code")
    with pytest.raises(TypeError):
        ask([cell("answers")])


def test_a_root_may_be_started_before_it_is_known_what_to_ask(cell):
    with pool.started() as root:
        (row,) = ask([cell("answers")], timeout_s=20, root=root)
    assert (row["no_answer_reason"], root.process.returncode) == (None, 0)
    start = time.monotonic()
    with pool.started() as root:
        assert ask([cell("answers")], root=root)[0]["reused"] is True
    assert root.process.returncode == -signal.SIGKILL, "nobody waits for imports that are not wanted"
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    "behaviour, reason", [("crashes", "ended with status -6: a last word"), ("hangs", "timed out")]
)
def test_a_group_of_one_cell_is_its_process_and_is_asked_once(cell, behaviour, reason):
    asked = cell("answers")
    (asked.tree.source / "config.py").write_text(NOTE + BEHAVIOURS[behaviour])  # imported for the choice alone
    (row,) = ask([asked], timeout_s=4)
    assert (row["verdict"], row["facts"]) == ("no answer", {})
    assert row["no_answer_reason"].startswith(reason)
    began, chose = pids(asked)
    assert began == chose and not alive(began)


def test_ctrl_c_keeps_what_is_answered_and_leaves_no_process(cell):
    asked = [cell("answers"), cell("hangs"), cell("hangs", 1)]

    def interrupt(done, total, elapsed_s):
        assert wait_until(lambda: pids(asked[1]) and pids(asked[2]))
        raise KeyboardInterrupt

    before = family.descendants()
    with pytest.raises(KeyboardInterrupt):
        ask(asked, workers=3, timeout_s=60, progress=interrupt)
    hanging = pids(asked[1]) + pids(asked[2])
    assert len(hanging) == 2
    assert wait_until(lambda: not any(map(alive, hanging)))
    assert wait_until(lambda: not family.descendants() - before)
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


def test_what_vllm_keeps_on_disk_is_kept_for_one_machine_and_not_shared_with_a_new_interpreter(cell):
    one = cell("keeps")
    asked = [replace(one, machine=with_switch(one.machine, position), explicit=choice)
             for position in ("unset", "0") for choice in (None, EXPLICIT)]  # fmt: skip
    asked += [replace(one, machine=replace(one.machine, arch="gfx1100"))]
    pooled, cold = (
        [row["facts"]["platform"]["message"] for row in ask(asked, timeout_s=20, cold=cold)] for cold in (False, True)
    )
    assert pooled[0] == pooled[1] and pooled[2] == pooled[3]
    assert len({*pooled, *cold}) == 6


# A tree whose engine options tell what the process that reads them has met before, and leave traces of their own.
NOTED = "import os, pathlib; pathlib.Path(__file__).with_name('pids').open('a').write(f'{__name__} {os.getpid()}\\n')\n"
TELLING = {
    "__init__.py": "",
    "envs.py": """
import os
environment_variables = {"VLLM_ROCM_USE_AITER": lambda: os.getenv("VLLM_ROCM_USE_AITER", "0") == "1"}
def __getattr__(name):
    if name in environment_variables:
        return environment_variables[name]()
    raise AttributeError(name)
""",
    "platforms/__init__.py": """
from vllm import envs
USED = envs.VLLM_ROCM_USE_AITER
class current_platform:
    is_rocm = staticmethod(lambda: True)
    get_device_name = staticmethod(lambda: f"AITER {USED}")
""",
    "plain.py": NOTED,
    "switched.py": NOTED + "SEEN = os.environ.get('VLLM_ROCM_USE_AITER_MHA', 'unset')\n",
    "config.py": """
import contextlib, dataclasses
set_current_vllm_config = contextlib.nullcontext
@dataclasses.dataclass
class SpeculativeConfig:
    model: str
""",
    "engine/__init__.py": "",
    "engine/arg_utils.py": """
import dataclasses, os, sys, types
import vllm.plain
import vllm.switched
before = []
@dataclasses.dataclass(init=False)
class EngineArgs:
    attention_config: object = None
    def __init__(self, **options):
        before.append(1)
        told = [len(before), "stray" in sys.modules, os.environ.get("STRAY", "unset"), vllm.switched.SEEN]
        sys.modules["stray"], os.environ["STRAY"] = types.ModuleType("stray"), "set"
        raise OSError(told)
""",
}


def telling_cells(folder: Path, settings: int = 2) -> list[Cell]:
    """Cells of such a tree: three choices under each setting of the switches."""
    for name, text in TELLING.items():
        path = folder / "telling" / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    tree = Tree("telling", folder / "telling", folder / "telling" / "vllm", str(folder), "a test")
    switches = [
        {"VLLM_ROCM_USE_AITER": main} | ({} if part is None else {"VLLM_ROCM_USE_AITER_MHA": part})
        for part in (None, "0", "1", "2", "3", "4")
        for main in ("0", "1")
    ][:settings]
    return [
        Cell(tree, Machine(aiter=False, flash_attn=False, switches=setting), choice, drive=False)
        for setting in switches
        for choice in (None, "ONE", "OTHER")
    ]


def told(row: dict) -> str:
    return row["facts"]["selection"]["message"]


def importers(cells: list[Cell], module: str) -> set[str]:
    lines = (cells[0].tree.source / "pids").read_text().splitlines()
    return {line.partition(" ")[2] for line in lines if line.startswith(f"vllm.{module} ")}


def test_the_cells_of_a_group_share_a_beginning_and_nothing_else(cell, tmp_path):
    cells = telling_cells(tmp_path)
    rows = ask(cells, workers=1, timeout_s=20)
    assert {told(row) for row in rows} == {"[1, False, 'unset', 'unset']"}
    assert len(importers(cells, "plain")) == 2, "one import for each group"
    assert {row["began_with"]["answered"] for row in rows} == {0}
    states = [row["began_with"] for row in rows]
    for name, part in itertools.product(states[0], (states[:3], states[3:])):
        assert len({state[name] for state in part if name in state}) <= 1, name
    assert ["globals" in state for state in states] == [True, False, True] + [False] * 3, "the ends of one group"
    assert states[0]["environment"] != states[3]["environment"]


def test_what_reads_no_switch_is_imported_once_for_many_settings(cell, tmp_path):
    cells = telling_cells(tmp_path, settings=12)
    rows = ask(cells, workers=1, timeout_s=20)
    expected = [f"[1, False, 'unset', '{c.machine.switches.get('VLLM_ROCM_USE_AITER_MHA', 'unset')}']" for c in cells]
    assert [told(row) for row in rows] == expected
    names = [row["facts"]["platform"]["device_name"] for row in rows]
    assert names == [f"AITER {c.machine.switch == '1'}" for c in cells]
    # two scouts, two rounds of trying, and in each of two units a base for each value that the platform reads;
    # the module that reads another switch is tried once and left to the groups
    assert (len(importers(cells, "plain")), len(importers(cells, "switched"))) == (2 + 2 + 4, 12 + 1)
    assert len({row["began_with"]["root"] for row in rows}) == 1
    again = ask(cells, workers=1, timeout_s=20, fresh=True)
    assert len(importers(cells, "plain")) == 8 + 4, "what was learnt is kept"
    assert [row["facts"]["selection"]["message"] for row in again] == expected


def test_the_reads_of_an_import_decide_whether_it_can_be_shared(monkeypatch):
    monkeypatch.setenv("MOVED", "1")
    with Reads(["MOVED", "UNREAD"]) as reads:
        assert (os.environ.get("MOVED"), os.getenv("OTHER")) == ("1", None)
    os.environ["UNREAD"] = "x"
    assert (reads.raw, reads.everything, reads.holds()) == ({"MOVED": "1"}, False, True)
    monkeypatch.setenv("MOVED", "0")
    assert not reads.holds()
    monkeypatch.setenv("MOVED", "1")
    for deed in (lambda: dict(os.environ), lambda: os.environ.pop("UNREAD"), lambda: subprocess.run(["true"])):
        os.environ["UNREAD"] = "x"
        with Reads(["MOVED", "UNREAD"]) as reads:
            deed()
        assert (reads.everything, reads.holds()) == (True, "UNREAD" in os.environ), "only this very setting will do"
        os.environ["UNREAD"] = "y"
        assert not reads.holds()
    with pytest.raises(Forbidden, match="MOVED"), Reads(["MOVED"], forbid=True):
        os.environ.get("MOVED")
    for look in (lambda: importlib.import_module("aiter.ops"), lambda: find_spec("aiter")):
        with pytest.raises(Forbidden, match="looks for aiter"), Reads([]):
            look()
    os.environ.pop("UNREAD")


def test_machines_with_aiter_and_without_begin_in_one_base(cell, tmp_path):
    cells = telling_cells(tmp_path, settings=12)[::3]
    for file, text, more in (
        ("switched.py", "SEEN", "import importlib.util\nFOUND = importlib.util.find_spec('aiter') is not None\nSEEN"),
        ("engine/arg_utils.py", "told = [", "told = [vllm.switched.FOUND, "),
    ):
        path = cells[0].tree.source / file
        path.write_text(path.read_text().replace(text, more, 1))
    pairs = [replace(c, machine=replace(c.machine, aiter=present)) for c in cells for present in (False, True)]
    rows = ask(pairs, workers=1, timeout_s=20)
    assert [told(row).partition(",")[0] for row in rows] == ["[False", "[True"] * len(cells)
    assert len(importers(cells, "switched")) == len(pairs) + 1, "what looks for AITER is tried once, and left to groups"
    assert len(importers(cells, "plain")) < len(pairs)
    with_it, without = ({row["began_with"]["base"] for row in rows if row["aiter"] == a} for a in ("present", "absent"))
    assert with_it & without, "one base for both"


SABOTAGE = {
    "the group answers in itself": """
    if start is not None:
        run()
        return types.SimpleNamespace(wait=lambda limit_s: forks.Ending(0, False, 0.1, 1))
""",
    "a name of the tree is bound anew": """
    if start is not None:
        sys.modules["vllm.engine.arg_utils"].before = []
""",
    "a list of the tree grows": """
    if start is not None:
        sys.modules["vllm.engine.arg_utils"].before.append(1)
""",
    "the environment changes": """
    if start is not None:
        os.environ["STRAY"] = str(time.time())
""",
    "a module is imported": """
    if start is not None:
        sys.modules.setdefault(f"stray{time.time()}", types)
""",
    "a base changes between its groups": """
    if log is not None and start is None and "group" in log:
        os.environ["STRAY"] = str(time.time())
""",
    "a base binds a name of the tree anew": """
    if log is not None and start is None and "vllm.plain" in sys.modules:
        sys.modules["vllm.plain"].stray = []
""",
}
FAULTY_FORK = """
plain = forks.fork
def fork(run, log=None, start=None):
{}    return plain(run, log, start)
forks.fork = fork
"""
LEAKING_BASE = """
plain = nest._become_base
def become_base(*args):
    os.environ['STRAY'] = 'set'
    return plain(*args)
nest._become_base = become_base
"""
CAUGHT = {
    "the group answers in itself": "its process had answered 1 cells before",
    "a name of the tree is bound anew": "it did not begin with the globals",
    "a list of the tree grows": "it did not begin with the globals",
    "the environment changes": "it did not begin with the environment",
    "a module is imported": "it did not begin with the modules",
    "a base changes between its groups": "it did not begin with the base",
    "a base binds a name of the tree anew": "it did not begin with the base's globals",
}


@pytest.fixture
def sabotage(tmp_path, monkeypatch):
    """Have the server run with a faulty function; cold processes are not reached."""

    def use(code: str) -> None:
        script = tmp_path / "sabotage.py"
        script.write_text(
            "import os, runpy, sys, time, types\nfrom aiterlab.probes import forks, nest\n"
            f"{code}\nsys.argv = ['server']\nrunpy.run_module('aiterlab.probes.server', run_name='__main__')\n"
        )
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\nexec {sys.executable} {script}\n")
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))

    return use


@pytest.mark.parametrize("fault", SABOTAGE)
def test_a_pool_that_lets_state_leak_is_caught(cell, tmp_path, sabotage, fault):
    sabotage(FAULTY_FORK.format(SABOTAGE[fault]))
    rows = ask(telling_cells(tmp_path, settings=12 if "binds" in fault else 2), workers=1, timeout_s=20)
    reasons = [row["no_answer_reason"] for row in rows]
    assert reasons[0] is None, "the first cell began in order"
    assert any(f"not isolated: {CAUGHT[fault]}" in (reason or "") for reason in reasons)
    for row in rows:
        if row["no_answer_reason"] is None:
            assert row["verdict"] != "no answer"
        else:
            assert (row["verdict"], row["facts"]) == ("no answer", {})
    kept = [path for path in paths.cells_dir().iterdir() if path.suffix == ".json"]
    assert len(kept) == sum(reason is None for reason in reasons), "what does not count is not kept"


def test_a_cold_sample_shows_what_all_pooled_cells_have_wrong(cell, tmp_path, sabotage):
    cells = telling_cells(tmp_path)
    sabotage(LEAKING_BASE)
    rows = ask(cells, workers=2, timeout_s=20)
    differing = pool.compare_cold(cells, rows, share=0.3, seed=1, workers=2)
    assert len(differing) == 2, "a third of six cells"
    assert {entry["fact"] for entry in differing} == {"facts.selection.message"}
    assert {entry["pooled"] for entry in differing} == {"[1, False, 'set', 'unset']"}
    assert {entry["cold"] for entry in differing} == {"[1, False, 'unset', 'unset']"}


def test_an_exception_names_the_same_owner_in_the_pool_and_cold(cell, tmp_path):
    cells = telling_cells(tmp_path, settings=1)[:1]
    (cells[0].tree.source / "plain.py").write_text("this is no Python\n")
    rows = ask(cells, timeout_s=20)
    engine = rows[0]["facts"]["engine"]
    assert (engine["type"], engine["raised_in"]) == ("SyntaxError", "vllm")
    assert pool.compare_cold(cells, rows, share=1.0) == []


def test_a_group_that_fails_is_its_cells_rows_and_the_others_go_on(cell, tmp_path):
    cells = telling_cells(tmp_path, settings=4)
    source = cells[0].tree.source / "switched.py"
    source.write_text(source.read_text() + "if SEEN == '0': os.abort()\n")
    rows = ask(cells, workers=2, timeout_s=20)
    assert [row["no_answer_reason"] is None for row in rows] == [True] * 6 + [False] * 6
    assert {row["no_answer_reason"] for row in rows[6:]} == {"ended with status -6"}


def test_what_asks_for_a_part_of_the_machine_is_not_imported_before_there_is_one(cell, tmp_path, monkeypatch):
    for name, text in {
        "plainly": "import importlib.util\nFOUND = importlib.util.find_spec('flash_attn')\n",
        "on_the_way": "import plainly\n",
        "whatever": "try:\n    import flash_attn\nexcept:\n    pass\n",
        "harmless": "",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(answers.__file__).parents[2]}")
    names = ["on_the_way", "plainly", "whatever", "harmless"]
    with pool.Server(names, {}) as server:
        assert server.leave_out == "whatever", "it got over the refusal: a server without it is started"
    code = "import sys; from aiterlab.probes import preload; preload.import_all(sys.argv[1:]); print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    assert {"on_the_way", "plainly", "harmless"} & set(ended.stdout.split()) == set()
    ended = subprocess.run([sys.executable, "-c", code, *names[:2], "harmless"], capture_output=True, text=True)
    assert {*names} & set(ended.stdout.split()) == {"harmless"}


def test_what_cells_have_in_common_is_here_and_asks_for_no_part_of_a_machine():
    code = (
        "import sys; from aiterlab.probes import preload; spoilt_by = preload.import_all(preload.MODULES)\n"
        "print(spoilt_by, [name for name in preload.MODULES if name not in sys.modules], len(sys.modules) > 4000)"
    )
    environment = os.environ | pool._SERVER_ENVIRONMENT | pool._SIMULATION
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "None [] True"


def test_when_an_answer_was_given_is_part_of_its_row(cell):
    first, again = (ask([cell("answers")], timeout_s=20)[0] for _ in range(2))
    assert (first["reused"], again["reused"]) == (False, True)
    assert first["answered_utc"] == again["answered_utc"]
    assert ask([cell("answers")], timeout_s=20, fresh=True)[0]["reused"] is False


def test_nothing_of_the_working_folder_can_be_imported(cell, tmp_path, monkeypatch):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise SystemExit('the wrong triton')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(answers.__file__).parents[2]))
    assert [ask([cell("answers")], timeout_s=20, cold=cold)[0]["verdict"] for cold in (False, True)] == ["broken"] * 2


TREES = ("regressed", pytest.param("release:0.32.0", marks=pytest.mark.long))


@pytest.mark.parametrize("name", TREES)
def test_pooled_and_cold_answers_are_equal_on_real_trees(tmp_path, monkeypatch, name):
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path))
    machines = [Machine(arch=arch, aiter=aiter) for arch in ("gfx942", "gfx1100") for aiter in (True, False)]
    machines = [with_switch(machine, position) for machine in machines for position in ("unset", "0", "1")]
    machines.append(replace(machines[2], switches={**machines[2].switches, "VLLM_ROCM_USE_AITER_MHA": "0"}))
    cells = [Cell(trees.get(name), machine, choice, drive=False) for machine in machines for choice in (None, EXPLICIT)]
    rows = ask(cells)
    assert not [row["no_answer_reason"] for row in rows if row["no_answer_reason"]]
    assert pool.compare_cold(cells, rows, share=0.2, seed=len(name)) == []


def test_a_server_that_cannot_start_says_why(cell, monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nread line\necho 'no such luck' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(pool.ServerError, match=r"ended \(status 3\): no such luck"):
        ask([cell("answers")])


def test_the_context_follows_the_code_and_the_packages(monkeypatch, tmp_path):
    plain = answers.context()
    assert answers.context() == plain
    with monkeypatch.context() as patch:
        patch.setattr(answers, "versions", lambda: "torch==0")
        assert answers.context() != plain
    read = Path.read_bytes
    for name in ("policy.py", "drive.py", "rocminfo", "reference.py", "edits.py"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path, name=name: read(path) + b"#" * (path.name == name))
            assert answers.context() != plain, name


def test_progress_speaks_at_the_start_twice_a_minute_and_at_the_end(capsys):
    say = Progress(interval_s=30)
    for done, elapsed_s in ((2, 1), (3, 10), (4, 32), (5, 40), (6, 45)):
        say(done, 6, elapsed_s)
    assert capsys.readouterr().out.splitlines() == [
        "2 of 6 cells, 1 s",
        "4 of 6 cells, 32 s, about 31 s left",
        "6 of 6 cells, 45 s",
    ]


def test_one_worker_per_usable_core_by_default(cell, monkeypatch):
    used = []

    class Server:
        leave_out = None
        __init__ = lambda self, *args: None  # noqa: E731
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *args: None  # noqa: E731

        def carry_out(self, plan):
            used.append(plan.workers)
            for index in list(plan.todo):
                plan._done(index, answers.unasked(plan.asked[index][0], "a test"))

    monkeypatch.setattr(pool, "Server", Server)
    compiled = replace(cell("answers", 1).tree, compiled=True)
    _, row = ask([cell("answers"), Cell(cell("answers", 2).tree, Machine("native"), None)])
    assert (used, row["verdict"]) == ([len(os.sched_getaffinity(0))], "no answer")
    assert "no compiled extensions" in row["no_answer_reason"]
    used.clear()
    ask([cell("answers"), Cell(compiled, Machine("native"), None), Cell(compiled, Machine("native"), EXPLICIT)])
    assert used == [len(os.sched_getaffinity(0)), 1], "a native machine is one GPU, its cells take turns"
