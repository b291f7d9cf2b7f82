# SPDX-License-Identifier: Apache-2.0
"""When did it change: since when and until when a statement is broken, and what two trees answer differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aiterlab.audit import reading, wording
from aiterlab.audit.judgement import Judgement, Statement, Verdict


@dataclass(frozen=True)
class Span:
    """Trees in a row that break one statement."""

    statement: Statement
    first: str
    last: str
    trees: int
    before: str | None  # the last tree in which it held, if there is one
    after: str | None  # the first tree in which it holds again; None: it is broken to the end

    @property
    def sentence(self) -> str:
        """The span in words."""
        since = f"since {self.first}" if self.before else f"from the first tree asked ({self.first})"
        if self.after:
            many = f" to {self.last}, {self.trees} trees" if self.trees > 1 else ""
            return f"{self.statement.name}: broken {since}{many}; holds again in {self.after}"
        return f"{self.statement.name}: broken {since} to the last tree asked ({self.last})"


def spans(judgements: Sequence[Judgement]) -> list[Span]:
    """Every run of broken verdicts, statement by statement; trees in the order in which they were judged.

    A tree without an answer, or to which the statement does not apply, neither ends a run nor extends it.
    """
    found = []
    for statement in dict.fromkeys(judged.statement for judged in judgements):
        run: list[str] = []
        before = None
        for judged in judgements:
            if judged.statement is not statement or judged.verdict not in (Verdict.HOLDS, Verdict.BROKEN):
                continue
            if judged.verdict is Verdict.BROKEN:
                run.append(judged.tree)
                continue
            if run:
                found.append(Span(statement, run[0], run[-1], len(run), before, judged.tree))
            run, before = [], judged.tree
        if run:
            found.append(Span(statement, run[0], run[-1], len(run), before, None))
    return found


@dataclass(frozen=True)
class Change:
    """Cells whose selection differs between two trees in the same way."""

    before: str  # what the earlier tree answered
    after: str
    rows: tuple[dict, ...]  # the cells, as rows of the later tree

    @property
    def sentence(self) -> str:
        """The change in words."""
        return f"{self.before} becomes {self.after} ({wording.where(self.rows)})"


def changes(rows: Sequence[dict], before: str, after: str) -> list[Change]:
    """What two trees answer differently to the same question, grouped by the answers; the largest group first."""
    answers = {
        tree: {_place(row): row for row in rows if row["tree"] == tree and reading.answered(row)}
        for tree in (before, after)
    }
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for place, row in answers[after].items():
        if (earlier := answers[before].get(place)) is None:
            continue
        if (old := outcome(earlier)) != (new := outcome(row)):
            groups.setdefault((row["selection"], old, new), []).append(row)
    found = [Change(old, new, tuple(changed)) for (_, old, new), changed in groups.items()]
    return sorted(found, key=lambda change: -len(change.rows))


def compared(rows: Sequence[dict], before: str, after: str) -> int:
    """How many questions both trees have answered."""
    places = [{_place(row) for row in rows if row["tree"] == t and reading.answered(row)} for t in (before, after)]
    return len(places[0] & places[1])


def outcome(row: dict) -> str:
    """A cell's selection in one word or two."""
    return (
        reading.chosen(row) or {reading.Ending.REFUSED: "refused", reading.Ending.FELL: "an error"}[reading.ending(row)]
    )


def _place(row: dict) -> tuple:
    return tuple(reading.place(row).items())
