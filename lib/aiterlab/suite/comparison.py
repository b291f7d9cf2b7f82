# SPDX-License-Identifier: Apache-2.0
"""Lay two sets of records side by side: a run, one notebook's folder, one record, or the reference records."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiterlab.records import RECORD_NAME
from aiterlab.suite import judgement, status
from aiterlab.suite.judgement import CALLED, REFERENCE, CellChange, Judgement, Verdict
from aiterlab.suite.parameters import unknown
from aiterlab.suite.results import LATEST_NAME, Entry, Run, led_to, read_entry, read_json, read_run, text

# Of such an ending no question was answered, for reasons that are not the code's.
_NOT_TRIED = (status.SKIPPED, status.INTERRUPTED, status.CELL_NOT_RUN)
_NOT_THE_ENVIRONMENT = frozenset({"utc", "missing"})


class SourceError(ValueError):
    """Something that is named for a comparison and cannot be one side of it; one line."""


@dataclass(frozen=True)
class Side:
    """What one side of a comparison offers."""

    name: str
    entries: Mapping[str, Entry]
    references: tuple[Mapping[str, Any], ...] = ()  # several machines' records of one notebook; the other side decides
    provenance: Mapping[str, Any] = field(default_factory=dict)  # of a run, for notebooks that left nothing themselves
    interrupted: bool = False  # a run that did not get to all that was planned
    by_choice: bool = True  # what it lacks was left out on purpose, by who named it or planned its run


@dataclass(frozen=True)
class Ending:
    """How one notebook ended in both sides, where that alone is worse or better: two alike endings are no finding."""

    before: str
    after: str
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Notebook:
    """One notebook in both sides."""

    stem: str
    obstacle: str | None = None  # why nothing of it can be compared, where its ending does not say so
    ending: Ending | None = None
    findings: tuple[str | None, str | None] = (None, None)
    parameters: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    environment: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    judgements: tuple[Judgement, ...] = ()
    cells: tuple[CellChange, ...] = ()
    cell_counts: tuple[int, int, int] = (0, 0, 0)  # asked in both, in the first alone, in the second alone

    @property
    def counts(self) -> Counter[Verdict]:
        """How many comparisons ended in which verdict: metrics, answers, and an ending that tells."""
        counts = Counter(judged.verdict for judged in self.judgements)
        counts.update(change.verdict for change in self.cells)
        counts[Verdict.SAME] += self.cell_counts[0] - len(self.cells)
        if self.ending:
            counts[self.ending.verdict] += 1
        return counts


@dataclass(frozen=True)
class Comparison:
    """Two sides, notebook by notebook."""

    first: str
    second: str
    notebooks: tuple[Notebook, ...]
    called: tuple[str, str] = CALLED  # in the heads of tables, and in reasons

    @property
    def counts(self) -> Counter[Verdict]:
        """The verdicts of all notebooks together."""
        return sum((notebook.counts for notebook in self.notebooks), Counter())

    @property
    def verdict(self) -> Verdict:
        """Worse if anything is; else better if anything is; same; not comparable if nothing could be compared."""
        order = (Verdict.WORSE, Verdict.BETTER, Verdict.SAME)
        return next((verdict for verdict in order if self.counts[verdict]), Verdict.NOT_COMPARABLE)


def find_side(name: str, results: Path) -> Side:
    """Return what `name` means: a run's folder or name, a notebook's folder, a record, `latest` or `reference`.

    Raises SourceError, in one line with the mend, if it means nothing.
    """
    if name == REFERENCE:
        return reference_side(results)
    path = Path(name)
    if not path.exists() and not path.is_absolute() and (results / name).exists():
        path = results / name
    path = led_to(path)
    if path.is_file():
        return _record_side(name, path)
    if not path.is_dir():
        known = [REFERENCE, LATEST_NAME, *(sorted(os.listdir(results)) if results.is_dir() else [])]
        raise SourceError(f"{unknown('no such run, folder or record', name, known)}")
    if (path / RECORD_NAME).is_file() or (path / status.STATUS_NAME).is_file():
        return Side(name, _by_stem(name, [path.resolve()]))
    run = read_run(path.resolve())
    if not run.entries:
        records = sorted(path.glob(f"*/{RECORD_NAME}"))
        if not records:
            raise SourceError(f"{name}: holds neither a run nor a record; name a folder that run_all.py has left")
        return Side(name, _by_stem(name, [record.parent for record in records]), by_choice=False)
    # What was planned is among the entries, whatever became of it; without a plan nobody knows what is lacking.
    planned = isinstance(run.facts.get("notebooks"), list)
    entries = {entry.stem: entry for entry in run.entries}
    return run_side(run, entries, by_choice=planned)


def run_side(run: Run, entries: Mapping[str, Entry], *, by_choice: bool = True) -> Side:
    """Return a run as one side of a comparison, with these of its notebooks."""
    interrupted = text(run.facts.get("status")) == status.INTERRUPTED
    return Side(run.name, entries, provenance=run.provenance, interrupted=interrupted, by_choice=by_choice)


def reference_side(results: Path) -> Side:
    """Return the reference records, those of every machine."""
    found = [read_json(path)[0] for path in sorted((results / REFERENCE).rglob(RECORD_NAME))]
    return Side(REFERENCE, {}, tuple(record for record in found if record))


def compare_sides(first: Side, second: Side) -> Comparison:
    """Compare what both sides have; raises SourceError if both are the reference."""
    if first.references and second.references:
        raise SourceError("the reference compared with itself is always the same; name a run for one side")
    stems = dict.fromkeys([*first.entries, *second.entries])
    sides = (first, second)
    known = any(side.references for side in sides)
    called = tuple(REFERENCE if side.references else "run" for side in sides) if known else CALLED
    return Comparison(first.name, second.name, tuple(_compare(stem, *sides, called) for stem in stems), called)


def _compare(stem: str, first: Side, second: Side, called: tuple[str, str]) -> Notebook:
    older, newer = (_entry(stem, side, other) for side, other in ((first, second), (second, first)))
    obstacle = _obstacle(older, called[0], first) or _obstacle(newer, called[1], second)
    if obstacle and newer and newer.ending in _NOT_TRIED and (newer.status or second.interrupted):
        return Notebook(stem, obstacle=obstacle)
    if obstacle:
        ending = _judge_record(older, newer, second, obstacle)
        return Notebook(stem, ending=ending) if ending else Notebook(stem, obstacle, _judge_ending(older, newer))
    before, after = older.record, newer.record
    stems = [text(record.get("stem")) for record in (before, after)]
    if stems[0] != stems[1]:
        return Notebook(stem, obstacle=f"records of two notebooks: {stems[0]} and {stems[1]}")
    return Notebook(
        stem,
        ending=_judge_ending(older, newer),
        findings=(text(before.get("finding")), text(after.get("finding"))),
        parameters=judgement.changed_parameters(before, after),
        environment=_changed_environment(before, after),
        judgements=tuple(judgement.judge_metrics(before, after, called)),
        cells=tuple(judgement.judge_cells(before, after)),
        cell_counts=judgement.count_cells(before, after),
    )


def _obstacle(entry: Entry | None, which: str, side: Side) -> str | None:
    if entry is None:
        return "the reference has no record of this class of machine" if side.references else f"not in the {which}"
    return f"record of the {which}: {entry.record_problem}" if entry.record is None else None


def _judge_record(older: Entry | None, newer: Entry | None, second: Side, reason: str) -> Ending | None:
    """Judge that only one side has a record: it is lost in the second, unless not tried there, or new in it."""
    if older and older.record is not None and (newer or not second.by_choice):
        verdict = Verdict.WORSE
    elif older and not older.ok and newer and newer.record is not None:
        verdict = Verdict.BETTER
    else:
        return None
    return Ending(_ending_words(older), _ending_words(newer), verdict, reason)


def _ending_words(entry: Entry | None) -> str:
    if entry is None:
        return "absent"
    # A record that lies alone does not say how its notebook ended.
    return "recorded" if entry.record is not None and not entry.status else entry.ending


def _judge_ending(older: Entry | None, newer: Entry | None) -> Ending | None:
    if not (older and newer and older.status and newer.status) or older.ok == newer.ok or newer.ending in _NOT_TRIED:
        return None
    return Ending(older.ending, newer.ending, Verdict.BETTER if newer.ok else Verdict.WORSE, "how the run ended")


def _entry(stem: str, side: Side, other: Side) -> Entry | None:
    if not side.references:
        return side.entries.get(stem)
    asked = other.entries[stem]
    record = asked.record or {"provenance": asked.status.get("provenance") or other.provenance}
    chosen = _reference_of(stem, record, side.references)
    # What became a reference had ended well.
    return Entry(stem, Path(REFERENCE), {"status": status.OK}, chosen) if chosen else None


def _reference_of(stem: str, record: Mapping[str, Any], references: Iterable[Mapping[str, Any]]) -> Mapping | None:
    """Choose the reference of the same machine, else of the same class; a described machine's answers fit any.

    A record with a card has measurements too, so it fits its own class of machine alone.
    """
    candidates = [reference for reference in references if reference.get("stem") == stem]
    machine, own = judgement.machine_of(record), judgement.accelerators_of(record)
    choices = (
        [found for found in candidates if machine and judgement.machine_of(found) == machine],
        [found for found in candidates if own is not None and judgement.accelerators_of(found) == own],
        [found for found in candidates if found.get("machine_simulated") is True and "card" not in found],
    )
    return next((found[0] for found in choices if found), None)


def _by_stem(name: str, folders: Iterable[Path]) -> dict[str, Entry]:
    """Read notebooks' folders, each under the stem that its files name: copies lie in folders of any name."""
    entries: dict[str, Entry] = {}
    for entry in map(read_entry, folders):
        stem = text((entry.record or entry.status).get("stem")) or entry.stem
        if stem in entries:
            raise SourceError(f"{name}: holds two records of {stem}; name one of them")
        entries[stem] = entry
    return entries


def _record_side(name: str, path: Path) -> Side:
    record, problem = read_json(path)
    if record is None:
        raise SourceError(f"{name}: {problem}; name a record.json that a notebook has saved")
    stem = text(record.get("stem"))
    if stem is None:
        raise SourceError(f"{name}: no record of a notebook: it names no stem")
    return Side(name, {stem: Entry(stem, path.parent, record=record)})


def _changed_environment(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    older, newer = (_flatten(record.get("provenance")) for record in (before, after))
    for flat, record in ((older, before), (newer, after)):
        flat["machine_simulated"] = record.get("machine_simulated")
    names = dict.fromkeys([*older, *newer])
    return {name: (older.get(name), newer.get(name)) for name in names if older.get(name) != newer.get(name)}


def _flatten(facts: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in (facts if isinstance(facts, Mapping) else {}).items():
        if not prefix and name in _NOT_THE_ENVIRONMENT:
            continue
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
