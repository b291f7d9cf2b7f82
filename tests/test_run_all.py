# SPDX-License-Identifier: Apache-2.0
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from suite_notebooks import write_notebook

import run_all
from aiterlab.paths import notebooks_dir
from aiterlab.suite import bundle, cli, console, runs
from aiterlab.suite.runs import Row

SHOW = "print(names, workers)"


def rows_of(*stems, **profiles):
    return [Row(stem, 1, "a CPU", {"smoke": {}, "standard": {}, "full": {}, **profiles}) for stem in stems]


class Bench:
    """A folder with notebooks, and the command line run on it."""

    def __init__(self, folder, capsys):
        self.notebooks, self.results, self.capsys = folder / "notebooks", folder / "results", capsys

    def add(self, stem, *cells):
        return write_notebook(self.notebooks / f"{stem}.ipynb", "# Is it so?", *cells)

    def run(self, rows, *argv):
        code = run_all.main([*argv, "--results", str(self.results)], rows, self.notebooks)
        said = self.capsys.readouterr()
        return code, said.out, said.err


@pytest.fixture
def bench(tmp_path, capsys):
    return Bench(tmp_path, capsys)


def test_a_failure_does_not_stop_the_rest_and_is_told_at_the_end(bench):
    bench.add("01_bad", "raise ValueError('told')")
    bench.add("02_good", SHOW)
    code, out, _ = bench.run(rows_of("01_bad", "02_good"))
    assert code == cli.EXIT_FAILED == 1
    table = out[out.index("notebook ") :]
    latest = bench.results / "latest"
    run = bench.results / os.readlink(latest)
    assert "ValueError: told" in table and os.path.relpath(run / "01_bad" / "report.html") in table
    assert [line.split()[:2] for line in table.splitlines() if " 0" in line[:4]] == [
        ["01_bad", "failed"],
        ["02_good", "ok"],
    ]
    for stem in ("01_bad", "02_good"):
        assert {path.name for path in (latest / stem).iterdir()} >= {"executed.ipynb", "report.html", "status.json"}
    assert "01_bad  [2/2]" in out and "02_good  [1/2]" in out
    facts = json.loads((run / "run.json").read_text())
    assert facts["exit_code"] == 1
    began = [json.loads((run / stem / "status.json").read_text())["started_utc"] for stem in ("01_bad", "02_good")]
    assert facts["started_utc"] <= min(began), "the page tells when the run started, not when it was written down"


def test_profile_only_and_set_reach_the_notebook(bench):
    for stem in ("01_a", "02_b", "03_c"):
        bench.add(stem, SHOW)
    rows = rows_of("01_a", "02_b", "03_c", smoke={"workers": 5})
    options = ["--profile", "smoke", "--only", "03_c,01_a", "--set", '01_a.names=["x", "y"]', "--set", "01_a.workers=9"]
    code, _, _ = bench.run(rows, *options)
    assert code == cli.EXIT_OK == 0
    latest = bench.results / "latest"
    assert os.readlink(latest).endswith("Z-smoke")
    assert sorted(path.name for path in latest.iterdir() if path.is_dir()) == ["01_a", "03_c"]
    assert "['x', 'y'] 9\n" in (latest / "01_a" / "log.txt").read_text()
    assert "['a'] 5\n" in (latest / "03_c" / "log.txt").read_text()
    assert json.loads((latest / "01_a" / "status.json").read_text())["parameters"] == {
        "names": ["x", "y"],
        "workers": 9,
    }


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--only", "01_c"], "unknown notebook '01_c'; did you mean '01_a'?"),
        (["--only", "zzzz"], "there are: 01_a, 02_b"),
        (["--profile", "standart"], "unknown profile 'standart'; did you mean 'standard'?"),
        (["--set", "01_a.worker=2"], "unknown parameter 'worker'; did you mean 'workers'?"),
        (["--set", "01_c.workers=2"], "unknown notebook '01_c'"),
        (["--set", "01_a.workers=two"], "01_a.workers: 'two' is not JSON"),
        (["--set", "01_a.names=[1]"], "01_a.names[0]: input should be a valid string"),
        (["--set", "workers=2"], "write it as STEM.name=value"),
        (["--set", "01_a.workers"], "write it as STEM.name=value"),
        (["--only", "02_b", "--set", "01_a.workers=2"], "--only leaves 01_a out"),
        (["--at-once", "-1"], "--at-once: a number of notebooks, or 0 for cores + 1; got -1"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(bench, monkeypatch, argv, said):
    bench.add("01_a", SHOW)
    bench.add("02_b", SHOW)
    monkeypatch.setattr(runs, "run_plans", lambda *_, **__: pytest.fail("a notebook was started"))
    code, out, err = bench.run(rows_of("01_a", "02_b"), *argv)
    assert code == cli.EXIT_BAD_INPUT == 2
    assert said in err and len(err.splitlines()) == 1 and out == ""
    assert not bench.results.exists()


def torch_as(monkeypatch, *, hip=None, cuda=None, gpu=False):
    """Make torch say that it is another build, or that there is another machine around it."""
    import torch

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)


BUILDS = {"cpu": {}, "cuda": {"cuda": "13.0", "gpu": True}, "rocm": {"hip": "7.0", "gpu": True}}


@pytest.mark.parametrize("asked", ["cpu", "cuda", "rocm"])
@pytest.mark.parametrize("build", BUILDS)
def test_a_run_is_refused_in_another_environment_than_asked_for(bench, monkeypatch, asked, build):
    bench.add("01_a", SHOW)
    torch_as(monkeypatch, **BUILDS[build])
    code, out, err = bench.run(rows_of("01_a"), "--environment", asked, "--list")
    if asked == build:
        assert (code, err) == (0, "")
    else:
        assert code == cli.EXIT_BAD_INPUT == 2 and out == "" and len(err.splitlines()) == 1
        assert f"--environment {asked}" in err
    assert not bench.results.exists()


def test_the_reason_against_an_environment_says_what_is_missing(bench, monkeypatch):
    bench.add("01_a", SHOW)
    torch_as(monkeypatch, cuda="13.0")
    assert "finds no GPU; see environments/cuda" in bench.run(rows_of("01_a"), "--environment", "cuda")[2]
    assert "is built for cuda; see environments/rocm" in bench.run(rows_of("01_a"), "--environment", "rocm")[2]
    # PyPI's CUDA build without a GPU is the cpu stack
    assert bench.run(rows_of("01_a"), "--environment", "cpu", "--list")[0] == 0
    assert "unknown environment 'gpu'; did you mean 'cpu'?" in bench.run(rows_of("01_a"), "--environment", "gpu")[2]


def test_a_profile_is_checked_like_the_command_line(bench):
    bench.add("01_a", SHOW)
    code, _, err = bench.run(rows_of("01_a", standard={"workers": "many"}))
    assert code == 2 and "01_a.workers: input should be a valid integer" in err
    code, _, err = bench.run(rows_of("01_a", standard={"nope": 1}))
    assert code == 2 and "unknown parameter 'nope'" in err


def test_a_missing_notebook_or_a_broken_parameters_cell_is_bad_input(bench):
    code, _, err = bench.run(rows_of("01_gone"))
    assert code == 2 and "01_gone.ipynb: there is no such notebook" in err
    write_notebook(bench.notebooks / "02_odd.ipynb", parameters="x = 1")
    code, _, err = bench.run(rows_of("02_odd"))
    assert code == 2 and "02_odd.ipynb" in err and "only lines such as" in err


def test_a_results_folder_that_cannot_be_made_is_bad_input(bench):
    bench.add("01_a", SHOW)
    bench.results.write_text("a file")
    code, out, err = bench.run(rows_of("01_a"))
    assert code == 2 and str(bench.results) in err and len(err.splitlines()) == 1 and out == ""


def test_an_interrupt_between_notebooks_keeps_the_table(bench, monkeypatch):
    for stem in ("01_a", "02_b"):
        bench.add(stem, SHOW)
    run_plans = runs.run_plans

    def interrupt_the_second(plans, *arguments, **options):
        yield from run_plans(plans[:1], *arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run_plans", interrupt_the_second)
    code, out, _ = bench.run(rows_of("01_a", "02_b"))
    assert code == 130
    table = out[out.index("notebook ") :].splitlines()
    assert ["01_a", "ok"] in [line.split()[:2] for line in table]
    assert ["02_b", "not", "run"] in [line.split()[:3] for line in table]


@pytest.mark.parametrize(("module", "step"), [(console, "print_table"), (bundle, "write_bundle")])
def test_an_interrupt_while_a_run_is_summed_up_is_its_ending(bench, monkeypatch, module, step):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    bench.add("01_a", SHOW)
    monkeypatch.setattr(module, step, interrupt)
    assert bench.run(rows_of("01_a"))[0] == 130
    said = json.loads((bench.results / "latest" / "run.json").read_text())
    assert (said["status"], said["exit_code"]) == ("interrupted", 130) and said["seconds"] > 0


def test_the_list_shows_purpose_cost_and_parameters_and_runs_nothing(bench):
    bench.add("01_a", SHOW)
    code, out, _ = bench.run(rows_of("01_a"), "--list")
    assert code == 0 and not bench.results.exists()
    for fact in ("01_a: Is it so?", "about 1 min", "a CPU", "names: list[str] = ['a']  # what is asked"):
        assert fact in out


def test_help_teaches_with_examples_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as caught:
        run_all.main(["--help"])
    said = capsys.readouterr().out
    assert caught.value.code == 0
    for fact in (
        "examples:",
        "--set 01_reproduce_regression.workers=4",
        "exit codes:",
        "130",
        "--profile",
        "results/latest",
    ):
        assert fact in said


INTERRUPTED_RUN = """
import sys
from pathlib import Path
import run_all
from aiterlab.suite.runs import Row
rows = [Row("01_a", 1, "", {"standard": {}}), Row("02_b", 1, "", {"standard": {}}, after=("01_a",))]
sys.exit(run_all.main(["--results", sys.argv[2]], rows, Path(sys.argv[1])))
"""


def test_an_interrupt_ends_with_130_the_table_and_what_there_is(bench):
    bench.add("01_a", "import time\ntime.sleep(600)")
    bench.add("02_b", SHOW)
    command = [sys.executable, "-c", INTERRUPTED_RUN, str(bench.notebooks), str(bench.results)]
    root = str(Path(run_all.__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        # Lines arrive as they are said, though this is no terminal.
        said = [process.stdout.readline() for _ in range(3)]
        assert f"kernels of Python {platform.python_version()}, {sys.executable}" in said[0]
        assert "[1/2]" in said[2]
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == cli.EXIT_INTERRUPTED == 130
    rows = [line.split()[:3] for line in out.splitlines() if line.strip().startswith(("01_a  ", "02_b  "))]
    assert ["01_a", "interrupted"] in [row[:2] for row in rows] and ["02_b", "not", "run"] in rows
    folder = bench.results / "latest" / "01_a"
    assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
    assert (folder / "report.html").exists() and (folder / "executed.ipynb").exists()
    assert not (bench.results / "latest" / "02_b").exists()


def test_runs_of_one_second_get_folders_of_their_own(tmp_path):
    folders = {runs.new_run(tmp_path, "smoke").folder for _ in range(5)}
    assert len(folders) == 5 and all("Z-smoke" in folder.name for folder in folders)


def test_latest_follows_the_newest_run_and_is_never_absent(tmp_path, monkeypatch):
    first, second = (runs.new_run(tmp_path, "smoke").folder for _ in range(2))
    runs.point_latest(first)
    runs.point_latest(second)
    latest = tmp_path / "latest"
    assert latest.resolve() == second.resolve() and latest.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([first.name, second.name, "latest"])


def test_without_symbolic_links_latest_is_a_file_with_the_name(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    run = runs.new_run(tmp_path, "smoke").folder
    runs.point_latest(run)
    assert (tmp_path / "latest").read_text() == run.name + "\n"


def test_the_projects_rows_have_every_profile():
    assert len({row.stem for row in run_all.ROWS}) == len(run_all.ROWS)
    for row in run_all.ROWS:
        assert tuple(row.profiles) == cli.PROFILES


@pytest.mark.skipif(not notebooks_dir().is_dir(), reason="the project's notebooks are not here")
@pytest.mark.parametrize("profile", cli.PROFILES)
def test_the_projects_rows_fit_the_projects_notebooks(profile):
    plans = runs.plan_runs(run_all.ROWS, notebooks_dir(), profile=profile)
    assert [plan.row.stem for plan in plans] == sorted(path.stem for path in notebooks_dir().glob("*.ipynb"))
