# SPDX-License-Identifier: Apache-2.0
"""Word a comparison as lines: what became worse, what became better, and why the rest could not be compared."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from aiterlab.suite.comparison import Comparison, Notebook
from aiterlab.suite.judgement import CellChange, Judgement, Verdict
from aiterlab.suite.markdown import Block, bullets, escape, table
from aiterlab.suite.metrics import Observation
from aiterlab.suite.wording import spread_words, value_words

_MOST_FACTS = 3  # of one changed cell
_MARKS = {Verdict.WORSE: "▼", Verdict.BETTER: "▲", Verdict.SAME: "=", Verdict.NOT_COMPARABLE: "?"}


@dataclass(frozen=True)
class Line:
    """One change: what it is about, both values, the verdict and its reason."""

    stem: str
    what: str
    before: str
    after: str
    verdict: Verdict
    reason: str


def lines_of(notebook: Notebook) -> list[Line]:
    """Return what changed in one notebook, the worst first; what is the same is only counted."""
    lines = [_metric_line(notebook.stem, judged) for judged in notebook.judgements if _is_change(judged.verdict)]
    lines += [_cell_line(notebook.stem, change) for change in notebook.cells]
    ending = notebook.ending
    if ending:
        lines.append(Line(notebook.stem, "ending", ending.before, ending.after, ending.verdict, ending.reason))
    order = list(Verdict)
    return sorted(lines, key=lambda line: order.index(line.verdict))


def obstacles_of(notebook: Notebook) -> list[tuple[str, int]]:
    """Return why metrics could not be compared, each reason with how many."""
    if notebook.obstacle:
        return [(notebook.obstacle, 1)]
    reasons = Counter(judged.reason for judged in notebook.judgements if judged.verdict is Verdict.NOT_COMPARABLE)
    return reasons.most_common()


def differences_of(comparison: Comparison, kind: str) -> list[tuple[str, str, str, str]]:
    """Return what differs in "parameters" or "environment": name, both values, and in which notebooks, by number.

    Most facts of an environment differ alike in every notebook, and stand in one line.
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    for notebook in comparison.notebooks:
        for name, values in getattr(notebook, kind).items():
            before, after = map(_json, values)
            found.setdefault((name, before, after), []).append(notebook.stem[:2])
    return [(*difference, " ".join(stems)) for difference, stems in found.items()]


def verdict_words(comparison: Comparison) -> str:
    """Return the verdict and the counts behind it in one line."""
    return f"{_MARKS[comparison.verdict]} {comparison.verdict}: {counts_words(comparison)}"


def counts_words(comparison: Comparison) -> str:
    """Return how many comparisons ended in each verdict."""
    counts = comparison.counts
    return ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in Verdict)


def findings_of(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Return the findings that are worded differently: notebook, before, after."""
    pairs = ((notebook.stem, *notebook.findings) for notebook in comparison.notebooks)
    return [(stem, before or "-", after or "-") for stem, before, after in pairs if before != after]


def to_blocks(comparison: Comparison, most: int, *, whole: bool = True) -> list[Block]:
    """Return the comparison as Markdown; at most `most` changes of each notebook, the rest counted.

    Args:
        whole: also parameters, environment and findings that differ; without them it is what a summary needs.
    """
    blocks = [Block([f"**{escape(verdict_words(comparison))}**"])]
    rows = []
    for notebook in comparison.notebooks:
        counts = notebook.counts
        asked, first, second = notebook.cell_counts
        cells = f"{asked - len(notebook.cells)} of {asked}" if asked else "-"
        alone = f"{first} / {second}" if first or second else "-"
        numbers = [str(counts[verdict]) for verdict in Verdict]
        rows.append([f"`{escape(notebook.stem)}`", *numbers, cells, alone])
    headers = ["notebook", *map(str, Verdict), "answers that agree", "asked in one alone"]
    blocks.append(table(headers, rows))
    for notebook in comparison.notebooks:
        lines = lines_of(notebook)
        if lines:
            shown = [_row(line) for line in lines[:most]]
            more = [f"… and {len(lines) - most} more changes."] if len(lines) > most else []
            title = f"Changes in {escape(notebook.stem)}"
            blocks.append(table(["", "what", *comparison.called, "why"], shown, title=title, tail=more))
    reasons = [
        f"`{escape(notebook.stem)}`: {escape(reason)} ({count})"
        for notebook in comparison.notebooks
        for reason, count in obstacles_of(notebook)[: most if whole else 3]
    ]
    if reasons:
        blocks.append(bullets("Not comparable", reasons))
    return blocks + (_difference_blocks(comparison) if whole else [])


def _difference_blocks(comparison: Comparison) -> list[Block]:
    blocks = []
    for title, kind in (("Parameters that differ", "parameters"), ("Environment that differs", "environment")):
        rows = [list(map(escape, difference)) for difference in differences_of(comparison, kind)]
        if rows:
            blocks.append(table(["name", *comparison.called, "notebooks"], rows, title=title))
    findings = [list(map(escape, found)) for found in findings_of(comparison)]
    if findings:
        blocks.append(table(["notebook", *comparison.called], findings, title="Findings that are worded differently"))
    return blocks


def _row(line: Line) -> list[str]:
    words = (line.what, line.before, line.after, line.reason)
    return [f"{_MARKS[line.verdict]} {line.verdict}", *(escape(text) for text in words)]


def _metric_line(stem: str, judged: Judgement) -> Line:
    words = [_observed(seen, judged.metric.unit) for seen in (judged.before, judged.after)]
    what = judged.metric.name.replace("_", " ")
    what += f": {judged.case_words}" if judged.case_words != "-" else ""
    return Line(stem, what, *words, judged.verdict, judged.reason)


def _cell_line(stem: str, change: CellChange) -> Line:
    sides = []
    for side in (1, 2):
        shown = [f"{fact[0].replace('_', ' ')}: {fact[side]}" for fact in change.facts[:_MOST_FACTS]]
        sides.append("; ".join(shown))
    more = len(change.facts) - _MOST_FACTS
    reason = change.reason + (f"; {more} more facts changed" if more > 0 else "")
    return Line(stem, change.case_words, *sides, change.verdict, reason)


def _observed(seen: Observation | None, unit: str) -> str:
    if seen is None or seen.value is None:
        return "-"
    spread = spread_words(seen)
    return f"{value_words(seen.value)} {unit}" + (f" ({spread})" if spread != "-" else "")


def _is_change(verdict: Verdict) -> bool:
    return verdict in (Verdict.WORSE, Verdict.BETTER)


def _json(value: Any) -> str:
    return "-" if value is None else json.dumps(value, ensure_ascii=False)
