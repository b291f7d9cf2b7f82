#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run the notebooks and render what they found: the list of runs, and the command line."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from aiterlab import paths
from aiterlab.suite import runs, status
from aiterlab.suite.parameters import ParameterError
from aiterlab.suite.report import REPORT_NAME
from aiterlab.suite.runs import Plan, Row

PROFILES = ("smoke", "standard", "full")
DEFAULT_PROFILE = "standard"
EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130

STANDARD_TREES = ("release:0.15.1", "regressed", "release:0.16.0", "release:0.32.0")

ROWS = (
    Row(
        stem="01_reproduce_regression",
        minutes=5,
        needs="any CPU, 4 GB memory, network on the first run",
        profiles={
            "smoke": {
                "profile": "smoke",
                "architectures": ["gfx942"],
            },
            "standard": {},
            "full": {"profile": "full", "trees": ["release:0.15.0", *STANDARD_TREES, "release:0.17.0"]},
        },
    ),
    Row(
        stem="02_apply_fix",
        minutes=5,
        needs="any CPU, 4 GB memory, network on the first run",
        profiles={
            "smoke": {
                "profile": "smoke",
                "architectures": ["gfx942"],
            },
            "standard": {},
            "full": {"profile": "full"},
        },
    ),
)

EPILOG = """\
examples:
  python run_all.py                                  every notebook, profile standard
  python run_all.py --profile smoke                  the same checks on smaller questions, in minutes
  python run_all.py --list                           what there is, and every parameter with its default
  python run_all.py --only 02_apply_fix
  python run_all.py --only 01_reproduce_regression \\
      --set '01_reproduce_regression.trees=["regressed", "path:/src/vllm"]' \\
      --set 01_reproduce_regression.workers=4

each run leaves results/<run>/<notebook>/{report.html, record.json, executed.ipynb, status.json, log.txt, *.png};
results/latest leads to the newest run.

exit codes:
  0    every notebook ran to its end
  1    a notebook failed, ran out of time, or lost its kernel; the others were run all the same
  2    bad input: an unknown notebook, profile or parameter, or a value of the wrong type; nothing was started
  130  interrupted (Ctrl-C or SIGTERM); what had been found by then is written
"""


def main(argv: Sequence[str] | None = None, rows: Sequence[Row] = ROWS, notebooks: Path | None = None) -> int:
    """Run the command line and return its exit code; `rows` and `notebooks` default to the project's own."""
    options = _parser().parse_args(argv)
    only = [stem.strip() for names in options.only for stem in names.split(",") if stem.strip()]
    try:
        plans = runs.plan_runs(
            rows, notebooks or paths.notebooks_dir(), profile=options.profile, only=only, settings=options.set
        )
        if options.list:
            _print_list(plans)
            return EXIT_OK
        run_dir = runs.new_run_dir(options.results or paths.results_dir(), options.profile)
        runs.point_latest(run_dir)
    except (ParameterError, OSError) as error:
        print(f"run_all.py: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    outcomes: list[status.NotebookStatus] = []
    try:
        for outcome in runs.run_plans(plans, run_dir, options.profile, say=lambda line: print(line, flush=True)):
            outcomes.append(outcome)
    except KeyboardInterrupt:
        pass  # between two notebooks, or a second Ctrl-C: fewer outcomes than plans
    _print_table(plans, outcomes, run_dir)
    if len(outcomes) < len(plans) or outcomes[-1].status == status.INTERRUPTED:
        return EXIT_INTERRUPTED
    return EXIT_OK if all(outcome.ok for outcome in outcomes) else EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_all.py",
        description="Run the notebooks one after the other, each in a fresh kernel, and render a report of each.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--profile", default=DEFAULT_PROFILE, help=f"one of {', '.join(PROFILES)} (default: {DEFAULT_PROFILE})"
    )
    parser.add_argument(
        "--only", metavar="STEM", action="append", default=[], help="run only this; repeat it, or separate with commas"
    )
    parser.add_argument(
        "--set",
        metavar="STEM.name=value",
        action="append",
        default=[],
        help="set a parameter; the value is JSON, or a bare string where the parameter is a str; repeatable",
    )
    parser.add_argument("--list", action="store_true", help="list notebooks and parameters, and run nothing")
    parser.add_argument("--results", metavar="DIR", type=Path, help="where to put the run (default: results/)")
    return parser


def _print_list(plans: Sequence[Plan]) -> None:
    for plan in plans:
        print(f"{plan.row.stem}: {plan.title}\n  about {plan.row.minutes:g} min; needs {plan.row.needs}")
        for name, parameter in plan.parameters.items():
            print(f"    {name}: {parameter.annotation} = {plan.values[name]!r}  # {parameter.help}")


def _print_table(plans: Sequence[Plan], outcomes: Sequence[status.NotebookStatus], run_dir: Path) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
