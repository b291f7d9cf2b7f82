# SPDX-License-Identifier: Apache-2.0
"""The command line of `run_all.py`: check everything first, run, say how it ended, and answer with an exit code."""

import argparse
import contextlib
import math
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import IO

from aiterlab import paths, provenance, security
from aiterlab.suite import bundle, compare, console, environment, pages, room, runs, schedule, signals, status
from aiterlab.suite.job import Job
from aiterlab.suite.parameter_file import read_parameter_file
from aiterlab.suite.parameters import ParameterError
from aiterlab.suite.runs import Row

PROFILES = ("smoke", "standard", "full")
DEFAULT_PROFILE = "standard"
_ROOM_BYTES = 1_000_000  # run.json, and what sums the run up
EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130

EPILOG = """\
examples:
  python run_all.py                                  every notebook, profile standard
  python run_all.py --profile smoke                  the same checks on smaller questions, in minutes
  python run_all.py --list                           what there is, and every parameter with its default
  python run_all.py --only 02_apply_fix
  python run_all.py --resume                         go on with the newest run: keep what is done and unchanged
  python run_all.py --resume --only 04_run_attention_kernels    with that one alone; the others stay as they are
  python run_all.py compare reference latest         what changed against the records in the repository
  python run_all.py --environment cuda --profile full --only 04_run_attention_kernels
  python run_all.py --only 01_reproduce_regression \\
      --set '01_reproduce_regression.trees=["regressed", "path:/src/vllm"]' \\
      --set 01_reproduce_regression.workers=4

each run leaves results/<run>/{index.html, summary.md, samples.csv, record.schema.json, run.json} and for each notebook
<notebook>/{report.html, record.json, executed.ipynb, status.json, log.txt, *.png}; results/latest leads to the newest.

a notebook ends as ok, failed, timeout, kernel-died, out-of-memory, skipped, interrupted or setup-failed.

exit codes:
  0    every notebook ran to its end
  1    a notebook of the run ended otherwise, the others were run all the same; or a result holds a secret
  2    bad input: an unknown notebook, profile or parameter, a value of the wrong type, another environment than asked
       for; nothing was started
  130  interrupted (Ctrl-C or SIGTERM); what had been found by then is written, --resume goes on

compare has its own: run_all.py compare --help
"""


def main(argv: Sequence[str] | None, rows: Sequence[Row], notebooks: Path | None = None) -> int:
    """Run the command line on these rows and return its exit code; `notebooks` defaults to the project's own folder."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["compare"]:
        return compare.main(argv[1:])
    options = _parser().parse_args(argv)
    console.prepare()
    results = options.results or paths.results_dir()
    only = [stem.strip() for names in options.only for stem in names.split(",") if stem.strip()]
    try:
        if options.at_once < 0:
            raise ParameterError(f"--at-once: a number of notebooks, or 0 for cores + 1; got {options.at_once}")
        if options.environment and not options.on:
            environment.require(options.environment)
        given = read_parameter_file(options.parameters, [row.stem for row in rows]) if options.parameters else {}
        run = runs.old_run(results, options.resume) if options.resume else None
        # What was asked for then holds unless it is asked for anew; --only then says with what to go on, now.
        asked = {
            "profile": options.profile or (run.profile if run else DEFAULT_PROFILE),
            "only": () if run and not run.only else tuple(dict.fromkeys((*(run.only if run else ()), *only))),
            "settings": tuple(dict.fromkeys((*(run.settings if run and not given else ()), *options.set))),
            "given": given or (run.given if run else {}),
        }
        plans = runs.plan_runs(_budgeted(rows, options), notebooks or paths.notebooks_dir(), **asked)
        chosen = runs.choose(plans, only)
        if options.list:
            console.print_list(plans)
            return EXIT_OK
        local_full = asked["profile"] == "full" and not options.on  # a node says for itself whether it can
        if local_full and (missing := provenance.missing_for_full(provenance.collect())):
            raise ParameterError(f"profile full: a number without its origin is none; missing: {'; '.join(missing)}")
        with _elsewhere(chosen, asked["profile"], options) as start:
            run = replace(run or runs.new_run(results, asked["profile"]), **asked)
            # SIGTERM means what Ctrl-C means, also while there is no notebook yet to pass it on to.
            terminable = signals.handled(signal.default_int_handler, (signal.SIGTERM,))
            with runs.held(run), terminable, room.reserved(run.folder, _ROOM_BYTES) as held:
                return _run(plans, chosen, run, options, held, start)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (ParameterError, OSError) as error:
        print(f"run_all.py: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


@contextlib.contextmanager
def _elsewhere(
    plans: Sequence[runs.Plan], profile: str, options: argparse.Namespace
) -> Iterator[Callable[[Job], schedule.Running] | None]:
    """Yield what starts a notebook on the cluster that was asked for; None on this machine."""
    if options.on is None:
        yield None
        return
    from aiterlab.suite import cluster

    with cluster.connect(options.on, plans, profile=profile, stack=options.environment) as found:
        yield found.start


def _run(
    plans: Sequence[runs.Plan],
    chosen: Sequence[runs.Plan],
    run: runs.Run,
    options: argparse.Namespace,
    held: IO[bytes],
    start: Callable[[Job], schedule.Running] | None,
) -> int:
    began = monotonic()
    run.save(plans, status.INTERRUPTED, None, None)
    runs.point_latest(run.folder)
    rest = [status.NotebookStatus.load(run.folder / plan.row.stem) for plan in plans if plan not in chosen]
    outcomes: list[status.NotebookStatus] = []
    say = console.say
    where = "the cluster's nodes" if start else f"Python {platform.python_version()}, {sys.executable}"
    say(f"{os.path.relpath(run.folder)}: kernels of {where}")
    problems: list[str] = []
    how = {"at_once": options.at_once, "fail_fast": options.fail_fast, "start": start}
    try:
        for outcome in runs.run_plans(chosen, run, say, **how):
            outcomes.append(outcome)
    except KeyboardInterrupt:
        pass  # a second Ctrl-C: fewer outcomes than plans
    except OSError as error:  # of what the notebooks share, such as the lock of a GPU
        problems.append(f"the run cannot go on: {error}")
    interrupted = len(outcomes) < len(chosen) or any(outcome.status == status.INTERRUPTED for outcome in outcomes)
    interrupted = interrupted and not problems
    outcomes += filter(None, rest)
    words = {outcome.status for outcome in outcomes} | ({status.INTERRUPTED} if len(outcomes) < len(plans) else set())
    ending = status.INTERRUPTED if status.INTERRUPTED in words else status.OK if words == {status.OK} else status.FAILED
    exit_code = EXIT_INTERRUPTED if interrupted else EXIT_OK if ending == status.OK else EXIT_FAILED
    seconds = round(monotonic() - began, 3)
    try:
        held.close()
        problems += _problems(lambda: run.save(plans, ending, exit_code, seconds), "run.json cannot be written")
        console.print_table(plans, outcomes, run.folder)
        unwritten = _problems(lambda: bundle.write_bundle(run.folder), "the index cannot be written")
        if not unwritten:
            say(os.path.relpath(run.folder / pages.INDEX_NAME))
        problems += unwritten
        problems += [f"do not show this around: {leak}" for leak in security.scan_folder(run.folder)]
    except KeyboardInterrupt:
        ending, exit_code = status.INTERRUPTED, EXIT_INTERRUPTED
    for problem in problems:
        say(problem)
    if problems and exit_code == EXIT_OK:
        ending, exit_code = status.FAILED, EXIT_FAILED
    with signals.handled(signal.SIG_IGN):  # it takes a moment, and what came last is known only now
        _problems(lambda: run.save(plans, ending, exit_code, seconds), "")
    return exit_code


def _problems(write: Callable[[], object], what: str) -> list[str]:
    """Write something; returns one line where that is not possible."""
    try:
        write()
    except OSError as error:
        return [f"{what}: {error}"]
    return []


def _budgeted(rows: Sequence[Row], options: argparse.Namespace) -> list[Row]:
    names = ("budget_minutes", "cell_budget_minutes")
    budgets = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if bad := [name for name, value in budgets.items() if not 0 < value < math.inf]:
        raise ParameterError(f"--{bad[0].replace('_', '-')}: minutes are a number above 0; got {budgets[bad[0]]}")
    return [replace(row, **budgets) for row in rows]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_all.py",
        description="Run the notebooks, each in a kernel of its own, and render what they found.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--profile", help=f"one of {', '.join(PROFILES)} (default: {DEFAULT_PROFILE})")
    parser.add_argument(
        "--only",
        metavar="STEM",
        action="append",
        default=[],
        help="run only this; repeat it, or separate with commas; with --resume the others of the run stay as they are",
    )
    parser.add_argument(
        "--set",
        metavar="STEM.name=value",
        action="append",
        default=[],
        help="set a parameter; the value is JSON, or a bare string where the parameter is a str; repeatable",
    )
    parser.add_argument(
        "--parameters", metavar="FILE", type=Path, help='a JSON file, {"STEM": {"name": value}}; --set wins over it'
    )
    parser.add_argument(
        "--environment",
        metavar="STACK",
        help="refuse to run unless this is the stack: cpu, cuda or rocm (default: any)",
    )
    parser.add_argument(
        "--on",
        metavar="CLUSTER",
        help="run on a Ray cluster that is there: ray (named by RAY_ADDRESS, or on this machine), or ray://HOST:PORT",
    )
    parser.add_argument("--list", action="store_true", help="list notebooks and parameters, and run nothing")
    parser.add_argument(
        "--resume",
        metavar="RUN",
        nargs="?",
        const=runs.LATEST_NAME,
        help="go on with a run (default: the newest): keep what is done and unchanged, run the rest",
    )
    parser.add_argument(
        "--at-once", metavar="N", type=int, default=0, help="notebooks at the same time (default: cores + 1)"
    )
    parser.add_argument(
        "--budget-minutes", metavar="N", type=float, help="stop a notebook after this long (default: its row's)"
    )
    parser.add_argument(
        "--cell-budget-minutes", metavar="N", type=float, help="and when one cell takes this long (default: its row's)"
    )
    parser.add_argument("--fail-fast", action="store_true", help="when one has failed, skip what has not begun")
    parser.add_argument("--results", metavar="DIR", type=Path, help="where to put the run (default: results/)")
    return parser
