# SPDX-License-Identifier: Apache-2.0
"""What the runner costs, and what it saves: beside nbclient alone, and beside papermill on the same notebooks.

    python -m aiterlab.suite.benchmark            cost of the command, per notebook and per cell, some minutes
    python -m aiterlab.suite.benchmark --whole    also every notebook at profile standard, both ways, in turns: an hour

A notebook costs what the whole command takes longer with one more of them: the fork of its kernel, its report and its
part of the bundle are in it. What is left is the command's own start and end.

The share of the cores that papermill keeps busy is the least that the ratio of a whole run can be: below it one would
have to do less, not to do it in a better order.

Every comparison is made in turns in one session, on results folders of their own, with the same downloads. The record
goes to `results/interactive/runner/record.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from aiterlab import host, paths, records

STEM, PROFILE = "runner", "standard"
FEW, MANY, CELLS = 2, 6, 100  # from two notebooks on the command imports torch for all of them
SHAPES = {"few": (FEW, 1), "many": (MANY, 1), "long": (MANY, 1 + CELLS)}  # notebooks, and cells of each
GOALS = {"whole_ratio": 0.6, "single_ratio": 1.05, "overhead_notebook_s": 0.5, "overhead_cell_s": 0.005}
_OTHERS = """
import sys
from pathlib import Path
from aiterlab.suite import cli, runs
notebooks = Path(sys.argv[1])
rows = [runs.Row(path.stem, 1, "", {"standard": {}}) for path in sorted(notebooks.glob("*.ipynb"))]
sys.exit(cli.main(sys.argv[2:], rows, notebooks))
"""
_PLAIN = {"kernel_name": "python3", "extra_arguments": ["--log-level=ERROR"]}
_PARAMETERS = "count: int = 1  # notebooks are told apart by nothing else"


def overhead(folder: Path, turns: int) -> dict[str, list[float]]:
    """Time notebooks that do nothing, one after another, under nbclient alone and under the whole command, in turns.

    Returns:
        Of every turn: `{nbclient,command}_{few,many,long}_s`, and `_busy` as `whole` has it.
    """
    measured: dict[str, list[float]] = {}
    for shape, (notebooks, cells) in SHAPES.items():
        for number in range(notebooks):
            _write(folder / shape / f"{number:02}_nothing.ipynb", cells)
    for _ in range(turns):
        for shape in SHAPES:
            with _timed(measured, f"nbclient_{shape}"):
                for path in (folder / shape).iterdir():
                    NotebookClient(nbformat.read(path, as_version=4), **_PLAIN).execute()
            with _timed(measured, f"command_{shape}"):
                _run_all(["--at-once", "1"], folder / "results", folder / shape)
    return measured


def whole(stems: Sequence[str], folder: Path, profile: str, turns: int) -> dict[str, list[float]]:
    """Time notebooks under papermill, one after another, and under the runner, in turns.

    Both start each time without an answer of an earlier turn; trees that were fetched stay.

    Returns:
        Of every turn: `{papermill,runner}_s`, and `{papermill,runner}_busy`, the share of the usable cores' time in
        which they computed.
    """
    measured: dict[str, list[float]] = {}
    for turn in range(turns):
        run_dir = folder / f"papermill-{turn}"
        with _timed(measured, "papermill"):
            for stem in stems:
                notebook = paths.notebooks_dir() / f"{stem}.ipynb"
                executed = run_dir / stem / "executed.ipynb"
                executed.parent.mkdir(parents=True)
                subprocess.run(
                    [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), str(executed)],
                    check=True,
                    cwd=notebook.parent,
                    env=os.environ | {paths.RUN_DIR_VARIABLE: str(run_dir)},
                    stderr=subprocess.DEVNULL,
                )
        with _timed(measured, "runner"):
            _run_all(["--profile", profile, "--only", ",".join(stems)], folder / "results")
    return measured


def summary(measured: dict[str, list[float]]) -> dict[str, float]:
    """Return what the goals are about; what was not measured is absent.

    What small notebooks cost is a difference of seconds, so it is told from the quickest turns: whatever disturbs one
    only adds to it, and nbclient now and then waits three seconds for a kernel that has ended. Ratios are of medians.
    """
    middle = {name: statistics.median(values) for name, values in measured.items()}
    quickest = {name: min(values) for name, values in measured.items()}
    found = {}
    if "command_few_s" in measured:
        notebook_s, cell_s = _each(quickest, "command")
        plain_notebook_s, plain_cell_s = _each(quickest, "nbclient")
        found["command_start_s"] = quickest["command_few_s"] - FEW * notebook_s
        found["overhead_notebook_s"] = notebook_s - plain_notebook_s
        found["overhead_cell_s"] = cell_s - plain_cell_s
    for name in ("whole", "single"):
        if f"{name}_runner_s" in middle:
            found[f"{name}_ratio"] = middle[f"{name}_runner_s"] / middle[f"{name}_papermill_s"]
            found[f"{name}_least_ratio"] = middle[f"{name}_papermill_busy"]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m aiterlab.suite.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5, help="of the small notebooks (default: 5)")
    parser.add_argument(
        "--whole", action="store_true", help="also every notebook, under papermill and under the runner"
    )
    parser.add_argument("--whole-turns", type=int, default=1, help="of those (default: 1)")
    parser.add_argument(
        "--single", metavar="STEM", default="04_run_attention_kernels", help="the notebook that runs alone"
    )
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="aiterlab-") as name:
        folder = Path(name)
        measured = overhead(folder, options.turns)
        if options.whole:
            stems = sorted(path.stem for path in paths.notebooks_dir().glob("[0-9]*.ipynb"))
            for what, chosen in (("single", [options.single]), ("whole", stems)):
                found = whole(chosen, folder / what, PROFILE, options.whole_turns)
                measured |= {f"{what}_{key}": values for key, values in found.items()}
    said = summary(measured)
    for name, value in said.items():
        goal = GOALS.get(name)
        verdict = "" if goal is None else f" (goal: at most {goal:g}, {'reached' if value <= goal else 'missed'})"
        print(f"{name}: {value:.4g}{verdict}")
    record = {"finding": "; ".join(f"{name} {value:.3g}" for name, value in said.items()), **said, **measured}
    print(records.save_record(STEM, record, parameters=vars(options)))


@contextlib.contextmanager
def _timed(measured: dict[str, list[float]], what: str) -> Iterator[None]:
    """Add how long something took, and which share of the usable cores was busy meanwhile; say so as well."""
    began, computed = time.monotonic(), _computed_s()
    yield
    took = time.monotonic() - began
    busy = (_computed_s() - computed) / (took * host.usable_cores())
    measured.setdefault(f"{what}_s", []).append(took)
    measured.setdefault(f"{what}_busy", []).append(busy)
    print(f"{what}: {took:.1f} s, {busy:.0%} of the cores busy", file=sys.stderr, flush=True)


def _computed_s() -> float:
    """Return how long the cores that this process may use have computed, whatever for."""
    cores = psutil.cpu_times(percpu=True)
    mine = [cores[number] for number in os.sched_getaffinity(0)]
    return sum(core.user + core.nice + core.system + core.irq + core.softirq for core in mine)


def _each(seconds: dict[str, float], who: str) -> tuple[float, float]:
    """Return what one notebook more takes, and one cell more."""
    few, many, long = (seconds[f"{who}_{shape}_s"] for shape in SHAPES)
    return (many - few) / (MANY - FEW), (long - many) / (MANY * CELLS)


def _write(path: Path, cells: int) -> None:
    notebook = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}})
    notebook.cells = [new_code_cell(_PARAMETERS, metadata={"tags": ["parameters"]})]
    notebook.cells += [new_code_cell(f"count + {number}") for number in range(cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def _run_all(arguments: list[str], results: Path, notebooks: Path | None = None) -> None:
    """Run the command line in a process of its own, on the project's notebooks or others."""
    program = [str(paths.project_root() / "run_all.py")] if notebooks is None else ["-c", _OTHERS, str(notebooks)]
    command = [sys.executable, *program, *arguments, "--results", str(results)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=paths.project_root())


if __name__ == "__main__":
    main()
