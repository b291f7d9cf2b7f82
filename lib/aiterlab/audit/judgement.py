# SPDX-License-Identifier: Apache-2.0
"""What a statement says about a tree, and the cells that contradict it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from aiterlab.audit import reading, wording


class Verdict(StrEnum):
    """What one tree makes of one statement."""

    HOLDS = "holds"
    BROKEN = "broken"
    NOT_APPLICABLE = "not applicable"  # no cell speaks to it
    UNKNOWN = "unknown"  # there are cells that would, and they have no answer


@dataclass(frozen=True)
class Violation:
    """A contradiction between a statement and one cell, or the few cells that show a contrast."""

    what: str  # a sentence without its place: violations with equal sentences are one finding
    rows: tuple[dict, ...]

    @property
    def command(self) -> str:
        """The command that shows this violation and nothing else."""
        return wording.command(self.rows)


@dataclass(frozen=True)
class Statement:
    """A sentence of the documented policy that can be held against a tree's answers."""

    name: str
    sentence: str
    check: Callable[[Sequence[dict]], Iterator[Violation | None]]  # one item for each case; None: the case agrees
    source: str
    mend: str  # what a maintainer can do
    without: str  # why it is not applicable to answers that hold no case

    @property
    def id(self) -> str:
        """The name as one word, for command lines."""
        return self.name.replace(" ", "-")


@dataclass(frozen=True)
class Judgement:
    """The verdict on one statement for one tree."""

    tree: str
    statement: Statement
    verdict: Verdict
    reason: str
    cases: int = 0
    violations: tuple[Violation, ...] = ()
    silent: str = ""  # how many cells have no answer, and why the first has none

    def record(self) -> dict:
        """Plain JSON, with the smallest command for each finding instead of all its cells."""
        return {
            "tree": self.tree,
            "statement": self.statement.name,
            "sentence": self.statement.sentence,
            "verdict": str(self.verdict),
            "reason": self.reason,
            "cases": self.cases,
            "source": self.statement.source,
            "findings": [
                {
                    "what": what,
                    "where": wording.where(rows_of(violations)),
                    "command": smallest(violations).command,
                    "violations": len(violations),
                }
                for what, violations in by_sentence(self.violations).items()
            ],
        }


def judge_one(tree: str, rows: Sequence[dict], statement: Statement) -> Judgement:
    """Hold one statement against all rows of one tree."""
    answered = [row for row in rows if reading.answered(row)]
    unanswered = [row for row in rows if not reading.answered(row)]
    results = list(statement.check(answered))
    violations = tuple(result for result in results if result is not None)
    silent = ""
    if unanswered:
        cells = f"{len(unanswered)} of {wording.counted(len(rows), 'cell')}"
        silent = f"no answer from {cells}: {reading.why_unanswered(unanswered[0])}"
    if violations:
        findings = len(by_sentence(violations))
        told = f"{wording.counted(findings, 'finding')} in {len(violations)} of {wording.counted(len(results), 'case')}"
        verdict = Verdict.BROKEN
    elif results:
        told, verdict = wording.counted(len(results), "case"), Verdict.HOLDS
    elif unanswered:
        told, verdict = "", Verdict.UNKNOWN
    else:
        told, verdict = statement.without, Verdict.NOT_APPLICABLE
    return Judgement(
        tree, statement, verdict, "; ".join(filter(None, [told, silent])), len(results), violations, silent
    )


def by_sentence(violations: Sequence[Violation]) -> dict[str, list[Violation]]:
    """Violations that say the same, the most frequent first."""
    groups: dict[str, list[Violation]] = {}
    for violation in violations:
        groups.setdefault(violation.what, []).append(violation)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def smallest(violations: Sequence[Violation]) -> Violation:
    """The plainest example: the fewest cells, on the plainest machine, with the plainest layer."""
    return min(violations, key=lambda found: (len(found.rows), [reading.weight(row) for row in found.rows]))


def rows_of(violations: Sequence[Violation]) -> list[dict]:
    """Every row behind some violations, once."""
    return list({id(row): row for found in violations for row in found.rows}.values())
