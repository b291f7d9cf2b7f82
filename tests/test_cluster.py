# SPDX-License-Identifier: Apache-2.0
"""The runner on a Ray cluster of four nodes, which this file starts on the loopback interface and ends again."""

import contextlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from suite_notebooks import write_notebook

import run_all
from aiterlab import paths
from aiterlab.suite import cli, cluster, runs, task
from aiterlab.suite.runs import Row

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'aiterlab[ray]'")
pytestmark = pytest.mark.slow

PROFILES = {"smoke": {}, "standard": {}, "full": {}}
HOST = "127.0.0.2"  # 127.0.0.1 Ray replaces by an address that others can reach
RECORD = "from aiterlab import records\nrecords.save_record({stem!r}, {{'n': {n}}}, parameters=None)"
# Ray takes a minute to believe that a node is gone, where a network may be slow.
IMPATIENT = {"health_check_period_ms": 500, "health_check_failure_threshold": 3, "health_check_initial_delay_ms": 0}


def row(stem, after=(), profile="smoke", **resources):
    return Row(stem, 1, "a CPU", PROFILES, after, memory_gb=0.1, resources={profile: {"cpu": 1, **resources}})


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Start a head without cores and three nodes, of which one declares `rocm`; two may be lost."""
    from ray._private.utils import get_ray_address_file
    from ray.cluster_utils import Cluster

    # Ray notes the head's address here without waiting for the process that makes the folder.
    Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
    before = set(psutil.Process().children(recursive=True))
    (client,) = free_ports(1)
    # The nodes have no checkout: what they run is what travelled.
    ours = str(paths.project_root())
    found = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if not part.startswith(ours)]
    # jsonschema's optional check of addresses builds a grammar at import: seconds in each of Ray's processes.
    quick = tmp_path_factory.mktemp("quick")
    (quick / "rfc3987_syntax.py").write_text("raise ImportError\n")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        started = Cluster()
        stack.callback(started.shutdown)

        def add(**resources):
            # Each node has its own folder, as machines have: in a shared one they lay out code over each other. Not
            # below pytest's, because the path of a socket is short.
            folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
            stack.callback(folder.cleanup)
            plain = {"node_ip_address": HOST, "object_store_memory": 80 * 2**20, "temp_dir": folder.name}
            return started.add_node(wait=False, **plain, **resources)

        with pytest.MonkeyPatch.context() as theirs:
            theirs.setenv("PYTHONPATH", os.pathsep.join([str(quick), *found]))
            add(num_cpus=0, include_dashboard=False, ray_client_server_port=client, _system_config=IMPATIENT)
            amd = add(num_cpus=2, resources={"rocm": 1})
            started.by_id = {node.node_id: node for node in (add(num_cpus=2), add(num_cpus=2), amd)}
        started.wait_for_nodes()
        patch.setenv("RAY_ADDRESS", started.address)
        started.quick = str(quick)
        started.amd, started.client = amd.node_id, f"ray://{HOST}:{client}"
        yield started
        started.shutdown()
        left = set(psutil.Process().children(recursive=True)) - before
        _, alive = psutil.wait_procs(left, timeout=10)
        assert [process.cmdline() for process in alive] == []


class Bench:
    def __init__(self, folder, capsys):
        self.notebooks, self.results, self.capsys = folder / "notebooks", folder / "results", capsys

    def add(self, stem, *cells):
        write_notebook(self.notebooks / f"{stem}.ipynb", "# Is it so?", *cells)

    def run(self, rows, *argv, on="ray"):
        argv = ["--profile", "smoke", "--on", on, "--results", str(self.results), *argv]
        code = run_all.main(argv, rows, self.notebooks)
        said = self.capsys.readouterr()
        return code, said.out, said.err

    def status(self, stem):
        return json.loads((self.results / "latest" / stem / "status.json").read_text())


@pytest.fixture
def bench(tmp_path, capsys):
    return Bench(tmp_path, capsys)


def test_a_graph_runs_there_and_everything_comes_back(nodes, bench, monkeypatch):
    monkeypatch.setenv("VLLM_ROCM_USE_AITER", "0")
    monkeypatch.setenv("VLLM_SECRET_TOKEN", "of no concern to others")
    show = "print(paths.models_dir().parent, sorted(name for name in os.environ if name[:5] == 'VLLM_'))"
    plot = "folder = paths.output_dir('01_first') / 'plots'\nfolder.mkdir()"
    write = "(folder / 'a.png').write_bytes(bytes(300_000)) + (paths.cells_dir() / 'a.json').write_text('{}')"
    opening = "import os\nfrom aiterlab import paths\nprint('heard')"
    bench.add("01_first", opening, RECORD.format(stem="01_first", n=7), show, plot, write)
    bench.add("02_amd", "import os\nprint('visible', repr(os.environ.get('CUDA_VISIBLE_DEVICES')))")
    reading = "n = records.load_record(paths.output_dir('03_reads').parent / '01_first' / 'record.json')['n']"
    reading += "\nassert (paths.cells_dir() / 'a.json').read_text() == '{}'"
    bench.add("03_reads", f"from aiterlab import paths, records\n{reading}", RECORD.format(stem="03_reads", n="n + 1"))
    rows = [row("01_first"), row("02_amd", rocm=1), row("03_reads", after=("01_first",))]
    code, out, err = bench.run(rows)
    assert (code, err) == (cli.EXIT_OK, "")
    latest = bench.results / "latest"
    for stem in ("01_first", "02_amd", "03_reads"):
        there = bench.status(stem)
        assert there["status"] == "ok" and there["node"]["attempts"] == 1 and there["node"]["id"] in nodes.by_id
        assert there["provenance"]["git_commit"] is not None and there["provenance"]["cpu_model"]
        assert {path.name for path in (latest / stem).iterdir()} >= {"executed.ipynb", "report.html", "log.txt"}
        assert f"{stem}  [1/" in out
    assert bench.status("02_amd")["node"]["id"] == nodes.amd
    assert bench.status("02_amd")["node"]["asked"] == {"cpu": 1, "memory": 1e8, "rocm": 1}
    assert json.loads((latest / "03_reads" / "record.json").read_text())["n"] == 8
    assert (latest / "01_first" / "plots" / "a.png").read_bytes() == bytes(300_000)
    log = (latest / "01_first" / "log.txt").read_text()
    there = re.search(r"^(/\S+) \['VLLM_ROCM_USE_AITER'\]$", log, re.MULTILINE).group(1)
    assert "heard" in log and not Path(there).is_relative_to(paths.project_root())  # the copy that travelled
    assert "visible ''" in (latest / "02_amd" / "log.txt").read_text()


def test_what_no_node_has_is_said_at_once_and_the_rest_runs(nodes, bench):
    bench.add("01_large", "print(1)")
    bench.add("02_small", "raise ValueError('told')")
    code, out, err = bench.run([row("01_large", tpu=1), row("02_small")], on=nodes.client)
    assert code == cli.EXIT_FAILED, err
    large = bench.status("01_large")
    assert large["status"] == "skipped" and large["reason"].startswith("no node of the cluster has cpu 1, 0.1 GB of")
    assert "tpu 1; its nodes have: cpu 0, " in large["reason"] and large["reason"] in re.sub(r"\s+", " ", out)
    assert bench.status("02_small")["reason"] == "ValueError: told"


def break_off(node):
    """Cut the connection to what runs on a node, which does not tell of it: Ray has to find out."""
    (raylet,) = (psutil.Process(one.process.pid) for one in node.all_processes["raylet"])
    raylet.suspend()
    for process in raylet.children():
        if "Remote" in " ".join(process.cmdline()):
            process.kill()
    time.sleep(0.5)  # for the runner to notice first, which it mostly does


@pytest.mark.parametrize("before", [lambda node: None, break_off], ids=["at once", "out of touch first"])
def test_a_lost_node_is_replaced_by_another_one(nodes, bench, before):
    bench.add("01_long", "print(1)", "import time\ntime.sleep(2)", RECORD.format(stem="01_long", n=1))
    lost = []

    def lose(line):
        if "[1/4]" in line and not lost:
            mark = re.search(r"on node (\w{8})", " ".join(said)).group(1)
            lost.extend(node for name, node in nodes.by_id.items() if name.startswith(mark))
            before(lost[0])
            threading.Thread(target=nodes.remove_node, args=(lost[0], False)).start()

    said = []
    plans = runs.plan_runs([row("01_long")], bench.notebooks, profile="smoke")
    with cluster.connect("ray", plans, profile="smoke") as found:
        run = runs.new_run(bench.results, "smoke")
        heard = lambda line: (said.append(line), lose(line))  # noqa: E731
        (ending,) = runs.run_plans(plans, run, heard, start=found.start)
    assert ending.ok and ending.node["attempts"] == 2 and ending.node["id"] != lost[0].node_id, said
    assert any(re.search(r"01_long  node \w+ died \(\w+\); attempt 2 of 3", line) for line in said), said
    assert (run.folder / "01_long" / "record.json").is_file()


PROGRAM = """
    import sys
    from pathlib import Path
    sys.path[:0] = [{root!r}]
    import run_all
    from aiterlab.suite.runs import Row
    row = Row("01_endless", 1, "a CPU", {{"smoke": {{}}}}, memory_gb=0.1, resources={{"smoke": {{"cpu": 1}}}})
    sys.exit(run_all.main(["--profile", "smoke", "--on", "ray", "--results", {results!r}], [row], Path({notebooks!r})))
"""


@contextlib.contextmanager
def endless(nodes, bench):
    """Run a notebook that never ends, with a child of its own, in another runner; yields it and those processes."""
    mark = bench.notebooks.parent / "pids"
    bench.add(
        "01_endless",
        f"""import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open({str(mark)!r}, "w").write(f"{{os.getpid()}} {{os.getppid()}} {{child.pid}} ")
time.sleep(600)""",
    )
    program = PROGRAM.format(root=str(paths.project_root()), results=str(bench.results), notebooks=str(bench.notebooks))
    command = [sys.executable, "-c", textwrap.dedent(program)]
    quick = os.environ | {"PYTHONPATH": os.pathsep.join([nodes.quick, os.environ.get("PYTHONPATH", "")])}
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quick)
    try:
        deadline = time.monotonic() + 60
        while not (mark.exists() and mark.read_text().endswith(" ")):
            assert time.monotonic() < deadline and runner.poll() is None
            time.sleep(0.05)
        there = [psutil.Process(int(pid)) for pid in mark.read_text().split()]
        yield runner, there
    finally:
        runner.kill()
        runner.communicate()


def test_an_interrupt_ends_what_runs_there(nodes, bench):
    with endless(nodes, bench) as (runner, there):
        runner.send_signal(signal.SIGINT)
        out, _ = runner.communicate(timeout=30)
        assert psutil.wait_procs(there, timeout=5)[1] == []
    assert runner.returncode == cli.EXIT_INTERRUPTED == 130
    ending = bench.status("01_endless")
    assert ending["status"] == "interrupted" and ending["cells"][-1]["status"] == "interrupted", out


def test_a_killed_runner_leaves_nothing_running_there(nodes, bench):
    with endless(nodes, bench) as (runner, there):
        runner.kill()
        assert psutil.wait_procs(there, timeout=20)[1] == []
    assert bench.status("01_endless")["status"] == "interrupted"


def test_no_cluster_is_one_line(bench, monkeypatch):
    bench.add("01_a", "print(1)")
    monkeypatch.setenv("RAY_ADDRESS", f"{HOST}:{free_ports(1)[0]}")
    for on, said in (("ray", "nobody listens at 127.0.0.2"), ("slurm", "write it as ray, or as ray://HOST:PORT")):
        code, out, err = bench.run([row("01_a")], on=on)
        assert code == cli.EXIT_BAD_INPUT == 2 and said in err and len(err.splitlines()) == 1 and out == ""
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = bench.run([row("01_a")])
    assert code == cli.EXIT_BAD_INPUT and "pip install 'aiterlab[ray]'" in err and len(err.splitlines()) == 1
    assert not bench.results.exists()


@pytest.mark.parametrize(
    ("looks", "out_of_touch", "interrupted", "verdict"),
    [
        ([True, True, False], True, False, "node 0123abcd died"),
        ([True] * 99, True, False, "its process on node 0123abcd does not answer"),
        ([True], True, True, "its process on node 0123abcd does not answer"),
        ([True], False, False, "its process on node 0123abcd died"),
        ([False], False, False, "node 0123abcd died"),
    ],
)
def test_who_is_out_of_touch_is_called_dead_when_ray_calls_it_dead(
    monkeypatch, looks, out_of_touch, interrupted, verdict
):
    node, looks = "0123abcdef", iter(looks)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": node, "Alive": next(looks)}])
    monkeypatch.setattr(task, "_VERDICT_S", 0.2)
    monkeypatch.setattr(task, "_TICK_S", 0.02)
    said = []
    sent = object.__new__(task.Task)
    sent.job, sent._say = SimpleNamespace(stem="01_a"), said.append
    sent._signals, sent._stop_by = queue.SimpleQueue(), 1.0 if interrupted else None
    assert sent._verdict(node, out_of_touch) == verdict
    assert said == (["01_a  lost touch with node 0123abcd; Ray has 0 s to say why"] if out_of_touch else [])


def test_a_notebook_that_measures_time_has_its_node_to_itself_and_a_stack_is_a_resource(bench, monkeypatch):
    there = [{"Alive": True, "Resources": {"CPU": cpus, "memory": 1e12, "GPU": 1, "rocm": 1}} for cpus in (8, 16)]
    monkeypatch.setattr(ray, "nodes", lambda: [*there, {"Alive": True, "Resources": {"CPU": 64, "memory": 1e12}}])
    one = Row("01_a", 1, "", PROFILES, measures_time="on a GPU", memory_gb=1, resources={"full": {"gpu": 1}})
    bench.add("01_a", "print(1)")
    (plan,) = runs.plan_runs([one], bench.notebooks, profile="full")
    sent = object.__new__(task.Task)
    sent._begun = False
    sent.wants = cluster._wants(plan, "full", "rocm")
    assert sent._asked() == {"cpu": 16, "memory": 1e9, "gpu": 1, "rocm": 0.001}
    sent.wants = cluster._wants(plan, "full", "cpu")
    assert sent._asked() == {"cpu": 2, "memory": 1e9}


@pytest.mark.parametrize(
    "name", ["/etc/x", "../x", "own/../x", "", "own", "own\\x", "own/a\0", "own/link/x", "other/x"]
)
def test_a_file_that_would_leave_the_results_is_refused(tmp_path, name):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "link").symlink_to(tmp_path)
    assert task.inside(tmp_path, "own/plots/a.png", ("own",)) == tmp_path / "own" / "plots" / "a.png"
    with pytest.raises(ValueError, match="none of the notebook's own"):
        task.inside(tmp_path, name, ("own",))
