# SPDX-License-Identifier: Apache-2.0
"""`python -m aiterlab bisect`: which commit of a local clone broke a statement of the policy?"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from aiterlab import paths
from aiterlab.audit import answer, matrix, narrow
from aiterlab.audit.bisect import Answer, bisect
from aiterlab.audit.judgement import Judgement, Statement, Verdict, by_sentence, judge_one, rows_of, smallest
from aiterlab.audit.statements import STATEMENTS
from aiterlab.probes import Cell, pool
from aiterlab.trees import Tree

FOUND, NOT_FOUND, USAGE = 0, 1, 2
ABOUT = """\
Find the commit that broke a statement of the policy, in a local clone of vLLM. git's own bisect chooses the commits, in
a temporary worktree; the clone's files and branches, and a bisect under way in it, stay as they are. The bad end is
asked the whole default matrix, or what the narrowing options describe; all others the cells that contradict there.
"""
EPILOG = """\
examples:
  python -m aiterlab bisect ~/src/vllm --good v0.15.0 --bad main --statement availability
  python -m aiterlab bisect ~/src/vllm --good v0.18.0 --bad v0.19.0 --statement documented-default \\
      --arch gfx942 --switch 1

statements:
{statements}

exit codes:
  0    the first bad commit was found
  1    it was not: several commits are left, none of which could be asked
  2    bad input: no such commit or statement, or an end that does not answer as it should
  130  interrupted; the worktree is removed, and answers that were given are kept
"""


def add_parser(commands) -> None:
    """Add the command `bisect`."""
    listed = "\n".join(f"  {statement.id:<24} {statement.sentence}" for statement in STATEMENTS)
    parser = commands.add_parser(
        "bisect",
        help="which commit of a local clone broke a statement?",
        description=ABOUT,
        epilog=EPILOG.format(statements=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("repository", metavar="CLONE", type=Path, help="a folder in a git clone of vLLM")
    parser.add_argument("--good", metavar="REV", required=True, help="a commit in which the statement holds")
    parser.add_argument("--bad", metavar="REV", required=True, help="a later one in which it is broken")
    parser.add_argument("--statement", metavar="NAME", required=True, type=_statement, help="one of those listed below")
    narrow.add_options(parser)
    parser.add_argument("--workers", metavar="N", type=int, help="processes at a time [one per usable core]")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Search, say each step on standard error and the result on standard output; returns the exit code."""
    os.environ.setdefault(paths.RUN_DIR_VARIABLE, str(paths.cache_dir() / "audit"))
    try:
        found = bisect(
            paths.as_typed(str(options.repository)),
            options.good,
            options.bad,
            Contradiction(options),
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except ValueError as error:  # BisectError, or a layer that there is not
        print(f"python -m aiterlab bisect: {error}", file=sys.stderr)
        return USAGE
    print(found)
    return FOUND if found.first_bad else NOT_FOUND


class Contradiction:
    """The question of a search: is the statement broken on the cells that contradicted it at the bad end?"""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.statement = options, options.statement
        self.cells: list[Cell] | None = None  # known once the bad end has answered

    def __call__(self, tree: Tree) -> Answer:
        first = self.cells is None
        cells = self._all(tree) if first else [replace(cell, tree=tree) for cell in self.cells]
        rows = pool.ask(cells, workers=self.options.workers)
        judged = judge_one(tree.name, rows, self.statement)
        if first:
            self.cells = _contradicting(cells, rows, judged) or cells
        if accident := next(filter(None, map(_accident, rows)), None):
            return Answer("skip", accident)
        if judged.verdict is Verdict.BROKEN:
            return Answer("bad", next(iter(by_sentence(judged.violations))))
        return Answer("good" if judged.verdict is Verdict.HOLDS else "skip", f"{judged.verdict}: {judged.reason}")

    def _all(self, tree: Tree) -> list[Cell]:
        return narrow.cells(tree, self.options) if narrow.narrowed(self.options) else matrix.default(tree)


def _contradicting(cells: Sequence[Cell], rows: Sequence[dict], judged: Judgement) -> list[Cell]:
    """The plainest example of each finding: what every other commit is asked."""
    plainest = [smallest(violations) for violations in by_sentence(judged.violations).values()]
    wanted = {id(row) for row in rows_of(plainest)}
    return [cell for cell, row in zip(cells, rows, strict=True) if id(row) in wanted]


def _accident(row: dict) -> str | None:
    """Why a row says nothing about the statement: it has no answer, or its commit does not even import."""
    if row["no_answer_reason"]:
        return row["no_answer_reason"]
    for question in (row["facts"]["platform"], row["facts"]["policy"]):
        if question["outcome"] != "ok":
            return answer.error_line(question)
    return None


def _statement(name: str) -> Statement:
    for statement in STATEMENTS:
        if name == statement.id:
            return statement
    raise argparse.ArgumentTypeError(f"unknown statement {name!r}; known: {', '.join(one.id for one in STATEMENTS)}")
