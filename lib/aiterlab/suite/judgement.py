# SPDX-License-Identifier: Apache-2.0
"""Judge what changed between two records of one notebook: better, worse, same, or not comparable and why.

Two medians differ when they lie further apart than the metric's tolerance and their intervals from the 20th to the
80th percentile do not meet; a ratio alone is no verdict. Times of different machines are never compared, facts are;
and no time of a CPU with one in the reference: processors of one name differ in speed more than code does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from aiterlab.suite.metrics import (
    EVERY_PARAMETER,
    Better,
    Case,
    Metric,
    Observation,
    case_words,
    metrics_of,
    observe,
    rows_of,
)
from aiterlab.suite.results import mapping, text

REFERENCE = "reference"
CALLED = ("first", "second")  # the two sides, where neither is the reference
ANSWERED_BADLY = frozenset({"builtin trap", "broken", "an error", "wrong", "failed"})
UNANSWERED = frozenset({"no answer"})


class Verdict(StrEnum):
    """How the second record stands to the first."""

    WORSE = "worse"
    BETTER = "better"
    SAME = "same"
    NOT_COMPARABLE = "not comparable"


@dataclass(frozen=True)
class Judgement:
    """One metric in one case, in both records."""

    metric: Metric
    case_words: str
    before: Observation | None
    after: Observation | None
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class CellChange:
    """One row of a truth table that is answered differently: the facts that changed, each before and after."""

    case_words: str
    facts: tuple[tuple[str, str, str], ...]
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class TruthTable:
    """Where a record keeps answers, which columns make the question, and which one tells good answers from bad."""

    table: str
    keys: tuple[str, ...]
    verdict: str
    facts: tuple[str, ...] | None = None  # None: every column of words, except `_ABOUT_THE_ASKING`


_CELL_KEYS = ("tree", "arch", "aiter", "switch", "selection", "shuffle_switch")
_ABOUT_THE_ASKING = frozenset({"reused", "simulated", "stand_ins", "seconds", "peak_memory_bytes"})
_DECIDE_NOTHING = frozenset({"profile", "workers"})  # parameters that change no answer
_KERNEL_KEYS = ("workload", "dtype", "kv_dtype", "layout", "provider", "implementation")
TRUTH_TABLES = {
    "01_reproduce_regression": (TruthTable("cells", _CELL_KEYS, "verdict"),),
    "02_apply_fix": (
        TruthTable("cells", _CELL_KEYS, "verdict"),
        TruthTable("part_cells", _CELL_KEYS, "verdict"),
        TruthTable("steps", (*_CELL_KEYS[:-1], "step"), "outcome", ("outcome", "exception")),
    ),
    "03_audit_backend_selection": (TruthTable("answers", ("tree", "question"), "answer"),),
    "04_run_attention_kernels": (TruthTable("checks", _KERNEL_KEYS, "outcome", ("outcome",)),),
    "05_run_eagle_spec_decode": (
        TruthTable("greedy", ("task", "base", "engine"), "ok", ("ok",)),
        TruthTable("broken", ("task", "engine"), "as_it_should", ("as_it_should",)),
        TruthTable("served", ("task", "engine"), "ok", ("ok",)),
        TruthTable("ranks", ("task", "engine"), "ok", ("ok",)),
    ),
}


def judge_metrics(
    before: Mapping[str, Any], after: Mapping[str, Any], called: tuple[str, str] = CALLED
) -> Iterator[Judgement]:
    """Judge every metric that is declared for the notebook of these two records, which reasons call so."""
    apart = _machines_apart(before, after, REFERENCE in called)
    same_source = _same_sources(before, after)
    changed = changed_parameters(before, after)
    for metric in metrics_of(text(after.get("stem")) or ""):
        if not metric.compared:
            continue
        older = {seen.case: seen for seen in observe(metric, before)}
        newer = {seen.case: seen for seen in observe(metric, after)}
        every = metric.depends == EVERY_PARAMETER
        depends = [name for name in changed if name in metric.depends or (every and name not in _DECIDE_NOTHING)]
        for case in dict.fromkeys([*older, *newer]):
            old, new = older.get(case), newer.get(case)
            seen = new or old
            if all(side is None or side.value is None for side in (old, new)):
                continue  # missing in both, as it should be where nothing is measured
            obstacle = _obstacle(metric, old, new, apart, depends, called)
            verdict, reason = obstacle or _weigh(old, new, same_source(dict(case).get("tree")))
            yield Judgement(metric, case_words(seen.case), old, new, verdict, reason)


def judge_cells(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[CellChange]:
    """Yield the answers that changed, of the questions that both records asked."""
    same_source = _same_sources(before, after)
    for table in TRUTH_TABLES.get(text(after.get("stem")) or "", ()):
        older, newer = _answers(before, table), _answers(after, table)
        for case in [case for case in older if case in newer]:
            old, new = older[case], newer[case]
            names = table.facts or [name for name in old if name in new and name not in table.keys]
            facts = [(name, _said(old.get(name)), _said(new.get(name))) for name in names if _differs(old, new, name)]
            if facts:
                facts.sort(key=lambda fact: fact[0] != table.verdict)
                tree = dict(case).get("tree")
                verdict, reason = _weigh_answers(old.get(table.verdict), new.get(table.verdict), same_source(tree))
                yield CellChange(case_words(case), tuple(facts), verdict, reason)


def count_cells(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return how many questions both records asked, and how many the first alone and the second alone."""
    shared = first = second = 0
    for table in TRUTH_TABLES.get(text(after.get("stem")) or "", ()):
        older, newer = _answers(before, table), _answers(after, table)
        both = len(older.keys() & newer.keys())
        shared, first, second = shared + both, first + len(older) - both, second + len(newer) - both
    return shared, first, second


def changed_parameters(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the parameters that differ, each with both values."""
    older, newer = ((record.get("parameters") or {}) for record in (before, after))
    if not (isinstance(older, Mapping) and isinstance(newer, Mapping)):
        return {"parameters": (older, newer)}
    names = dict.fromkeys([*older, *newer])
    return {name: (older.get(name), newer.get(name)) for name in names if older.get(name) != newer.get(name)}


def accelerators_of(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the accelerators of a record's machine, which make its class: () for a CPU alone, None if not recorded."""
    facts, card = (mapping(record.get(name)) for name in ("provenance", "card"))
    if known := facts.get("accelerators"):
        return tuple(map(str, known))
    if card.get("device_kind") == "gpu":
        return (str(card.get("device_name")),)
    return () if known is not None or card.get("device_kind") == "cpu" else None


def machine_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what makes two machines one for a time: processor, usable cores and accelerators; () if not recorded."""
    facts = mapping(record.get("provenance"))
    if not facts.get("cpu_model"):
        return ()
    cores = facts.get("cpu_usable_count") or facts.get("cpu_count")
    return (*(accelerators_of(record) or ()), str(facts["cpu_model"]), f"{cores} cores")


def _machines_apart(before: Mapping[str, Any], after: Mapping[str, Any], reference: bool) -> str | None:
    older, newer = machine_of(before), machine_of(after)
    if not (older and newer):
        return "the machine is not recorded"
    if reference and not accelerators_of(after):
        return "a CPU's name does not tell its speed: its times are compared between your own runs only"
    return None if older == newer else f"another machine ({', '.join(older)}; {', '.join(newer)})"


def _obstacle(
    metric: Metric,
    old: Observation | None,
    new: Observation | None,
    apart: str | None,
    depends: Sequence[str],
    called: tuple[str, str],
) -> tuple[Verdict, str] | None:
    """Say what keeps the two from being compared, if anything."""
    reason = None
    if old is None or new is None:
        reason = f"only in the {called[old is None]}"
    elif metric.timed and apart:
        reason = apart
    elif depends:
        reason = f"other parameters: {', '.join(depends)}"
    elif old.value is None or new.value is None:
        missing = old if old.value is None else new
        reason = f"missing in the {called[missing is new]}: {missing.reason}"
    elif metric.timed and (old.low is None or new.low is None) and old.value != new.value:
        reason = "no spread recorded"
    elif metric.better is Better.WITHIN and (old.limit is None or new.limit is None):
        reason = "no limit recorded"
    return (Verdict.NOT_COMPARABLE, reason) if reason else None


def _weigh(old: Observation, new: Observation, same_source: bool) -> tuple[Verdict, str]:
    """Judge two values that can be compared."""
    better = old.metric.better
    if better is Better.WITHIN:
        before, after = old.value <= old.limit, new.value <= new.limit
        if before == after:
            return Verdict.SAME, "both within the limit" if after else "both beyond the limit"
        return (Verdict.BETTER, "now within the limit") if after else (Verdict.WORSE, "beyond the limit")
    if old.value == new.value:
        return Verdict.SAME, "equal"
    if better is Better.EXACT and same_source:
        return Verdict.WORSE, "has to be found again, and was not"
    change = (new.value - old.value) / abs(old.value) if old.value else None
    words = f"{change:+.1%}" if change is not None else f"from 0 to {new.value:g}"
    if change is not None and abs(change) <= old.metric.tolerance:
        return Verdict.SAME, f"{words}, tolerance {old.metric.tolerance:.0%}"
    if None not in (old.low, old.high, new.low, new.high) and old.low <= new.high and new.low <= old.high:
        return Verdict.SAME, f"{words}, within the spread"
    improved = (new.value > old.value) == (better is Better.HIGHER)
    return (Verdict.BETTER if improved else Verdict.WORSE), words


def _weigh_answers(old: Any, new: Any, same_source: bool) -> tuple[Verdict, str]:
    """Judge two answers to one question, by the column that tells good from bad."""
    if _is_none(old) or _is_none(new):
        if _is_none(old) and _is_none(new):
            return Verdict.NOT_COMPARABLE, "no answer in either"
        return (Verdict.BETTER, "answered now") if _is_none(old) else (Verdict.WORSE, "not answered any more")
    if _is_bad(new) and not _is_bad(old):
        return Verdict.WORSE, "answered badly now"
    if same_source:
        return Verdict.WORSE, "the same source answers differently"
    if _is_bad(old) and not _is_bad(new):
        return Verdict.BETTER, "answered well now"
    return Verdict.NOT_COMPARABLE, "another source, and neither answer is wrong"


def _is_none(answer: Any) -> bool:
    return answer is None or answer in UNANSWERED


def _is_bad(answer: Any) -> bool:
    return answer is False or answer in ANSWERED_BADLY


def _answers(record: Mapping[str, Any], table: TruthTable) -> dict[Case, Mapping[str, Any]]:
    rows = _unfold_answers(record) if table.table == "answers" else rows_of(record, table.table)
    return {tuple((key, _said(row.get(key), "")) for key in table.keys): row for row in rows}


def _unfold_answers(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Unfold the audit's compact answers: per tree one letter a question, a blank where it was not put."""
    questions, signs, answers = (record.get(key) for key in ("questions", "answer_signs", "answers"))
    if isinstance(questions, list) and isinstance(signs, Mapping) and isinstance(answers, Mapping):
        for tree, letters in answers.items():
            for question, sign in zip(questions, str(letters), strict=False):
                if sign != " ":
                    yield {"tree": tree, "question": str(question), "answer": signs.get(sign)}


def _differs(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> bool:
    before, after = old.get(name), new.get(name)
    # Numbers with a fraction are metrics, with tolerances of their own.
    if name in _ABOUT_THE_ASKING or isinstance(before, float) or isinstance(after, float):
        return False
    return before != after


def _same_sources(before: Mapping[str, Any], after: Mapping[str, Any]) -> Callable[[str | None], bool]:
    """Return a function that tells whether a tree (None: every tree) holds the same source in both records."""
    older, newer = ((record.get("trees") or {}) for record in (before, after))
    older, newer = (trees if isinstance(trees, Mapping) else {} for trees in (older, newer))

    def same(tree: str | None) -> bool:
        # A tree that no record describes is a variant of one that is, made by this project's own code.
        if tree is None:
            return all(older.get(name) == newer.get(name) for name in older.keys() & newer.keys())
        return tree in older and older.get(tree) == newer.get(tree) and not tree.startswith("hotfixed")

    return same


def _said(value: Any, missing: str = "-") -> str:
    if value is None:
        return missing
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
