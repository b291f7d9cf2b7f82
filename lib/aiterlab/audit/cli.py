# SPDX-License-Identifier: Apache-2.0
"""`python -m aiterlab audit`: ask trees of vLLM on described machines, and hold the answers against the policy."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from aiterlab import paths, provenance, records, security
from aiterlab.audit import answer, matrix, narrow, report, statements, wording
from aiterlab.audit.judgement import Judgement, Verdict
from aiterlab.probes import Cell, Progress, pool
from aiterlab.trees import Tree, TreeError, get_all, releases
from aiterlab.trees.releases import ReleaseError

OK, BROKEN, USAGE, INCOMPLETE = 0, 1, 2, 3
ABOUT = """\
Ask the real code of vLLM which attention backend it chooses, on every described AMD GPU, with and without AITER, for
every position of its switch and every backend asked for by name; and hold the answers against vLLM's documented policy.
No GPU is needed: what a driver would answer is simulated, nothing else is.
"""
EPILOG = """\
examples:
  python -m aiterlab audit --tree path:. --fail-on broken --junit audit.xml --markdown audit.md
        what a pull request is held against, in a minute
  python -m aiterlab audit --releases 0.20.0..0.32.0 --markdown audit.md
        since when is a statement broken?
  python -m aiterlab audit --tree release:0.32.0 --arch gfx942 --switch 1
        one question: what is chosen there, and why?
  python -m aiterlab audit --tree regressed --arch gfx942 --switch unset,1 --explicit ROCM_AITER_FA
        one contrast: what does the switch change for an explicit choice?

a tree is release:X.Y.Z, regressed, hotfixed, path:DIR (a checkout of vLLM) or installed.
answers are kept, in the user's cache or in the folder that AITERLAB_RUN_DIR names; only what changed is asked again.

exit codes:
  0    no statement of the policy is broken, or --fail-on never
  1    a statement is broken
  2    bad input, or no tree could be had; nothing was asked
  3    nothing is broken as far as there are answers, but a tree had none, or an answer of a cold process differs
  130  interrupted; answers that were given are kept
"""


def add_parser(commands) -> None:
    """Add the command `audit`."""
    parser = commands.add_parser(
        "audit",
        help="what does vLLM choose, and does it agree with the policy?",
        description=ABOUT,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--tree", metavar="TREE", action="append", default=[], help="what to ask; repeat it for more")
    parser.add_argument(
        "--releases", metavar="FIRST..LAST|all", help="releases from the package index; either end may be left out"
    )
    narrow.add_options(parser)
    parser.add_argument("--exhaustive", action="store_true", help="every combination instead of every pair; takes long")
    parser.add_argument(
        "--fail-on", choices=("broken", "never"), default="broken", help="when to exit with a failure [broken]"
    )
    parser.add_argument("--junit", metavar="FILE", type=Path, help="write a test report for CI")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write a summary of less than 64 KB")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every judgement and every answer")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--resume", action="store_true", help="use the answers that are kept (the default)")
    kept.add_argument("--fresh", action="store_true", help="ask everything again")
    parser.add_argument(
        "--cold-sample",
        metavar="SHARE",
        type=_share,
        default=0.0,
        help="ask this share of the cells again, each in a new interpreter, and compare [0]",
    )
    parser.add_argument("--workers", metavar="N", type=int, help="processes at a time [one per usable core]")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask, judge, print and write; returns the exit code."""
    start = time.monotonic()
    os.environ.setdefault(paths.RUN_DIR_VARIABLE, str(paths.cache_dir() / "audit"))
    if options.exhaustive and narrow.narrowed(options):
        return _refuse("--exhaustive asks everything; it cannot be narrowed")
    try:
        names = [*releases.between(options.releases), *options.tree] if options.releases else options.tree
    except (ReleaseError, ValueError) as error:
        return _refuse(str(error))
    if not names:
        return _refuse("name what to ask: --tree path:. or --releases all, for example")
    with contextlib.redirect_stdout(sys.stderr), pool.started() as root:  # results alone go to standard output
        found = get_all(names)
        lacking = {name: str(tree) for name, tree in found.items() if isinstance(tree, TreeError)}
        trees = [tree for tree in found.values() if isinstance(tree, Tree)]
        for reason in lacking.values():
            print(reason)
        if not trees:
            return USAGE
        try:
            cells = [cell for tree in trees for cell in _cells(tree, options)]
        except ValueError as error:
            return _refuse(str(error))
        rows = pool.ask(cells, workers=options.workers, progress=Progress(), fresh=options.fresh, root=root)
        differing = _compare(cells, rows, options)
    judgements = statements.judge_trees(rows, lacking, list(found))
    if narrow.narrowed(options):
        print("\n\n".join([*map(answer.cell, rows), "the policy on these answers", *_by_tree(judgements)]))
    else:
        print(report.markdown(judgements))
    _write(options, judgements, rows)
    asked = sum(not row["reused"] for row in rows)
    print(f"{len(rows)} cells, {asked} asked now, {time.monotonic() - start:.0f} s", file=sys.stderr)
    return _exit_code(options, judgements, bool(differing))


def _cells(tree: Tree, options: argparse.Namespace) -> list[Cell]:
    if narrow.narrowed(options):
        return narrow.cells(tree, options)
    return matrix.exhaustive(tree) if options.exhaustive else matrix.default(tree)


def _compare(cells: Sequence[Cell], rows: Sequence[dict], options: argparse.Namespace) -> list[dict]:
    if not options.cold_sample:
        return []
    differing = pool.compare_cold(
        cells, rows, share=options.cold_sample, workers=options.workers, progress=Progress(what="cold cells")
    )
    for one in differing:
        print(f"a cold process answers otherwise: {one['fact']} is {one['cold']!r} there, {one['pooled']!r} here")
        print(f"  {wording.command([one])}")
    return differing


def _by_tree(judgements: Sequence[Judgement]) -> list[str]:
    trees = dict.fromkeys(judged.tree for judged in judgements)
    return [f"{tree}\n{answer.verdicts([judged for judged in judgements if judged.tree == tree])}" for tree in trees]


def _write(options: argparse.Namespace, judgements: Sequence[Judgement], rows: Sequence[dict]) -> None:
    for file, form in ((options.junit, report.junit), (options.markdown, report.markdown)):
        if file:
            records.atomic_write_text(file, security.scrub(form(judgements)))
    if options.json:
        whole = {
            "judgements": [judged.record() for judged in judgements],
            "rows": rows,
            "provenance": provenance.collect(),
        }
        records.atomic_write_text(options.json, records.dump_json(security.scrub_tree(whole)))


def _exit_code(options: argparse.Namespace, judgements: Sequence[Judgement], differing: bool) -> int:
    verdicts = {judged.verdict for judged in judgements}
    if options.fail_on == "never":
        return OK
    if Verdict.BROKEN in verdicts:
        return BROKEN
    return INCOMPLETE if differing or Verdict.UNKNOWN in verdicts else OK


def _refuse(why: str) -> int:
    print(f"python -m aiterlab audit: {why}", file=sys.stderr)
    return USAGE


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share between 0 and 1")
    return share
