# SPDX-License-Identifier: Apache-2.0
"""Sentences computed from judgements: what a maintainer should read first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from aiterlab.audit import wording
from aiterlab.audit.judgement import Judgement, Statement, Verdict, by_sentence, rows_of, smallest


@dataclass(frozen=True)
class Finding:
    """One way in which one tree breaks one statement."""

    tree: str
    statement: Statement
    what: str
    where: str
    command: str
    violations: int

    @property
    def sentence(self) -> str:
        """The finding as a sentence with its place."""
        first, rest = self.what[0], self.what[1:]
        return f"{first if '/' in self.what.split()[0] else first.upper()}{rest} ({self.where})."


def findings(judgements: Sequence[Judgement], tree: str | None = None) -> list[Finding]:
    """Every distinct finding, in the order of the statements, the most frequent first; of one tree if it is named."""
    return [
        Finding(
            judged.tree,
            judged.statement,
            what,
            wording.where(rows_of(violations)),
            smallest(violations).command,
            len(violations),
        )
        for judged in judgements
        if tree in (None, judged.tree)
        for what, violations in by_sentence(judged.violations).items()
    ]


def verdict(judgements: Sequence[Judgement]) -> str:
    """The audit in one sentence: how many statements each verdict was given, and which are broken where."""
    trees = list(dict.fromkeys(judged.tree for judged in judgements))
    if len(trees) == 1:
        return f"{trees[0]}: {_counts(judgements)}."
    clean = [tree for tree in trees if not _broken(judgements, tree)]
    worst = max(trees, key=lambda tree: len(_broken(judgements, tree)), default=None)
    told = f"{wording.counted(len(trees), 'tree')}: {_counts(judgements)}"
    if worst and _broken(judgements, worst):
        told += f"; {worst} breaks most ({len(_broken(judgements, worst))})"
    return f"{told}; nothing is broken in {wording.listed(clean)}." if clean else f"{told}."


def newest(judgements: Sequence[Judgement]) -> str:
    """What the last tree of the audit breaks, in one sentence."""
    if not judgements:
        return "Nothing was judged."
    tree = judgements[-1].tree
    broken = _broken(judgements, tree)
    if not broken:
        return f"{tree} breaks no statement."
    return f"{tree} breaks {wording.counted(len(broken), 'statement')}: {wording.listed(broken)}."


def _broken(judgements: Sequence[Judgement], tree: str) -> list[str]:
    return [j.statement.name for j in judgements if j.tree == tree and j.verdict is Verdict.BROKEN]


def _counts(judgements: Sequence[Judgement]) -> str:
    counts = Counter(judged.verdict for judged in judgements)
    words = [f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict]]
    return f"{wording.listed(words)} of {wording.counted(len(judgements), 'judgement')}"
