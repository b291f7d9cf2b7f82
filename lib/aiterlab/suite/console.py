# SPDX-License-Identifier: Apache-2.0
"""What `run_all.py` prints: what there is to run, and how each notebook ended."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from aiterlab.suite import status
from aiterlab.suite.report import REPORT_NAME
from aiterlab.suite.runs import Plan


def prepare() -> None:
    """Make printing safe: a stream that is closed leads nowhere, a character that it cannot show is escaped."""
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        try:
            os.fstat(number)
        except OSError:  # or the next file that is opened would get the number, and be printed into
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:  # a forked kernel, which has files of its own, wants a stream for each
            stream = os.fdopen(number, mode, closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(line: str) -> None:
    """Print one line of progress at once, also into a pipe; the run outlives whoever reads it."""
    try:
        print(line, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def print_list(plans: Sequence[Plan]) -> None:
    """Print every notebook with its question, cost and parameters."""
    for plan in plans:
        print(f"{plan.row.stem}: {plan.title}\n  about {plan.row.minutes:g} min; needs {plan.row.needs}")
        for name, parameter in plan.parameters.items():
            print(f"    {name}: {parameter.annotation} = {plan.values[name]!r}  # {parameter.help}")


def print_table(plans: Sequence[Plan], outcomes: Sequence[status.NotebookStatus], run_dir: Path) -> None:
    """Print one line per plan: how it ended, what it found or why it failed, and where its report is."""
    table = Table("notebook", "status", "seconds", "finding, or first line of the error; report", box=box.SIMPLE)
    order = {plan.row.stem: place for place, plan in enumerate(plans)}
    for outcome in sorted(outcomes, key=lambda outcome: order[outcome.stem]):
        said = (outcome.finding if outcome.ok else outcome.reason) or "-"
        report = os.path.relpath(run_dir / outcome.stem / REPORT_NAME)
        ending = f"{outcome.status}, reused" if outcome.reused_from else outcome.status
        seconds = "-" if outcome.seconds is None else f"{outcome.seconds:.1f}"
        table.add_row(outcome.stem, ending, seconds, f"{said}\n{report}")
    for plan in plans:
        if plan.row.stem not in {outcome.stem for outcome in outcomes}:
            table.add_row(plan.row.stem, status.CELL_NOT_RUN, "-", "-")
    console = Console(markup=False, highlight=False)
    # A file or a pipe has no width; paths must stay whole there.
    console.width = console.width if console.is_terminal else 200
    with console.capture() as captured:
        console.print(table)
    say(captured.get())
