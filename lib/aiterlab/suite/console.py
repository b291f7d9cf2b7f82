# SPDX-License-Identifier: Apache-2.0
"""What `run_all.py` prints: what there is to run, and how each notebook ended."""

import os
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from aiterlab.suite import status
from aiterlab.suite.report import REPORT_NAME
from aiterlab.suite.runs import Plan


def print_list(plans: Sequence[Plan]) -> None:
    """Print every notebook with its question, cost and parameters."""
    for plan in plans:
        print(f"{plan.row.stem}: {plan.title}\n  about {plan.row.minutes:g} min; needs {plan.row.needs}")
        for name, parameter in plan.parameters.items():
            print(f"    {name}: {parameter.annotation} = {plan.values[name]!r}  # {parameter.help}")


def print_table(plans: Sequence[Plan], outcomes: Sequence[status.NotebookStatus], run_dir: Path) -> None:
    """Print one line per plan: how it ended, what it found or why it failed, and where its report is."""
    table = Table("notebook", "status", "seconds", "finding, or first line of the error; report", box=box.SIMPLE)
    for outcome in outcomes:
        said = (outcome.finding if outcome.ok else outcome.reason) or "-"
        report = os.path.relpath(run_dir / outcome.stem / REPORT_NAME)
        table.add_row(outcome.stem, outcome.status, f"{outcome.seconds:.1f}", f"{said}\n{report}")
    for plan in plans[len(outcomes) :]:
        table.add_row(plan.row.stem, status.CELL_NOT_RUN, "-", "-")
    console = Console(markup=False, highlight=False)
    # A file or a pipe has no width; paths must stay whole there.
    console.width = console.width if console.is_terminal else 200
    console.print(table)
