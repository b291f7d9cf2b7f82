# SPDX-License-Identifier: Apache-2.0
"""What the notebook shows of an audit: sentences, Markdown and tables, each made from answers and judgements."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby

import pandas as pd

from aiterlab.audit import history, matrix, reading, wording
from aiterlab.audit.compact import NO_ANSWER
from aiterlab.audit.findings import findings, newest
from aiterlab.audit.judgement import Judgement, Verdict
from aiterlab.audit.reading import Ending
from aiterlab.audit.statements import STATEMENTS
from aiterlab.audit.study import Audit
from aiterlab.policy import MAIN_SWITCH
from aiterlab.trees import Tree

_BREAK = "\u200b"  # nothing to see; a line may end there
_WIDTH = 88  # characters in a line of code of the report


def sources(found: Mapping[str, Tree | Exception]) -> pd.DataFrame:
    """Every tree that was named: what it is, or why it could not be had."""
    return pd.DataFrame(
        [
            {"tree": name, "what it is": tree.origin, "sha256 of its Python files": tree.fingerprint[:16]}
            if isinstance(tree, Tree)
            else {"tree": name, "what it is": f"not to be had: {tree}", "sha256 of its Python files": "–"}
            for name, tree in found.items()
        ]
    )


def policy() -> pd.DataFrame:
    """The statements and where each is from."""
    return pd.DataFrame([{"statement": s.name, "in words": s.sentence, "from": s.source} for s in STATEMENTS])


def told(judgements: Sequence[Judgement]) -> str:
    """The findings as Markdown: a heading in bold for each broken statement, one command for each finding."""
    parts = []
    for judged in judgements:
        if judged.verdict is not Verdict.BROKEN:
            continue
        many = f"{len(judged.violations)} of {wording.counted(judged.cases, 'case')}"
        parts.append(f"**{judged.statement.name}**, broken in {many}: {judged.statement.sentence}")
        parts += [
            f"- {finding.sentence}\n\n  ```\n  {_wrapped(finding.command)}\n  ```" for finding in findings([judged])
        ]
        parts.append(f"What can be done: {judged.statement.mend}. Source: {judged.statement.source}.")
    silent: dict[str, list[str]] = {}
    for judged in judgements:
        if judged.verdict is Verdict.UNKNOWN:
            silent.setdefault(judged.reason, []).append(judged.statement.name)
    parts += [f"No answer on **{wording.listed(names)}**: {reason}." for reason, names in silent.items()]
    return "\n\n".join(parts) or "No statement is broken."


def _wrapped(command: str) -> str:
    """A command over as many lines as a page is wide, still one for a shell."""
    lines = [""]
    for word in re.split(r" (?=--)", command):
        if len(lines[-1]) + len(word) > _WIDTH:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n      ".join(lines)


def headline(judgements: Sequence[Judgement], looked_at: str) -> str:
    """How many statements are broken in how many trees, and how many of them in one."""
    trees = {judged.tree for judged in judgements}
    broken = {judged.statement.name for judged in judgements if judged.verdict is Verdict.BROKEN}
    here = [j for j in judgements if j.tree == looked_at and j.verdict is Verdict.BROKEN]
    told = f"{len(broken)} of {len({judged.statement.name for judged in judgements})} statements are broken in"
    if len(trees) == 1:
        return f"{told} {looked_at}"
    return f"{told} at least one of {len(trees)} trees, {len(here)} in {looked_at}"


def default_over_time(outcomes: pd.DataFrame) -> str:
    """What the plainest machine of the documentation gets with the switch on, tree by tree."""
    taken = auto(outcomes)
    taken = taken[(taken["arch"] == matrix.SUPPORTED) & (taken["aiter"] == "present") & (taken["switch"] == "1")]
    runs = []
    for outcome, run in groupby(taken.itertuples(), key=lambda row: row.outcome):
        trees = [row.tree for row in run]
        runs.append(f"{outcome} in {trees[0]}" + (f" to {trees[-1]}" if len(trees) > 1 else ""))
    return f"{matrix.SUPPORTED} with {MAIN_SWITCH}=1: {', '.join(runs)}"


def auto(outcomes: pd.DataFrame) -> pd.DataFrame:
    """The cells in which nobody asked for anything: the plainest layer, no variable but the main switch."""
    plain = {"selection": "auto", "settings": "", "kind": "decoder", "role": "target", "head_size": "64"}
    plain |= {"dtype": "float16", "kv_cache_dtype": "auto", "block_size": "16"}
    return outcomes[(outcomes[list(plain)] == pd.Series(plain)).all(axis=1)]


def drill_down(rows: Sequence[dict], judgements: Sequence[Judgement]) -> pd.DataFrame:
    """One tree's answers, those that contradict a statement first: what was asked, what came and why, and where."""
    broken: dict[int, dict[str, None]] = {}
    for judged in judgements:
        for row in (row for violation in judged.violations for row in violation.rows):
            broken.setdefault(id(row), {})[judged.statement.name] = None
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((", ".join(broken.get(id(row), ())), row["kind"], row["role"], _answer(row)), []).append(row)
    return pd.DataFrame(
        [
            {
                "contradicts": names or "–",
                "asked for": wording.listed(dict.fromkeys(row["selection"] for row in same)),
                "answer": _breakable(answer),
                "where": _where(same),
            }
            for (names, *_, answer), same in sorted(groups.items(), key=lambda group: not group[0][0])
        ],
        columns=["contradicts", "asked for", "answer", "where"],
    )


def _answer(row: dict) -> str:
    """What came, and why as far as vLLM says it; equal for backends that were asked for and used, or refused alike."""
    if silent := reading.why_unanswered(row):
        return f"{NO_ANSWER}: {silent}"
    asked, selection = row["selection"], row["facts"]["selection"]
    if reading.ending(row) is not Ending.CHOSEN:
        listed = re.search(r"Reasons?: \[(.*)\]", selection["message"], re.S)  # the rest is the same each time
        reason = listed[1].replace("'", "") if listed else reading.reason(row)
        return f"{history.outcome(row)}: {reason.replace(asked, '…') if reading.is_explicit(row) else reason}"
    if reading.is_explicit(row):
        return "as asked" if asked in reading.names_of_chosen(row) else f"{reading.chosen(row)} instead"
    others = [name for name in selection.get("priorities") or () if name not in reading.names_of_chosen(row)]
    return f"{reading.chosen(row)}, before {wording.listed(others)}" if others else reading.chosen(row)


def _where(rows: Sequence[dict]) -> str:
    """The cells in words, for a table that says elsewhere what was asked for and has little room."""
    told = wording.where([{**row, "selection": "auto"} for row in rows])
    return _breakable(told.replace(f"; {MAIN_SWITCH} ", "; switch ").replace(MAIN_SWITCH, ""))


def _breakable(text: str) -> str:
    """Let a line end within NAME=VALUE, NAME(ARGUMENTS) and NAME.NAME, of which a table would become too wide."""
    return re.sub(r"(?<=[=(.])(?=\w)", _BREAK, text)


def changed(rows: Sequence[dict], before: str, after: str) -> str:
    """How many answers differ between two trees, in one sentence."""
    both, found = history.compared(rows, before, after), history.changes(rows, before, after)
    differ = sum(len(change.rows) for change in found)
    return f"{differ} of {both} questions put to {before} and {after} are answered by another selection"


def changes(rows: Sequence[dict], before: str, after: str) -> pd.DataFrame:
    """What two trees answer differently: the selection, and what the policy says about AITER beside it."""
    lines = [
        (f"chosen, asked for {change.rows[0]['selection']}", change.before, change.after, change.rows)
        for change in history.changes(rows, before, after)
    ]
    earlier, later = (
        {str(reading.place(row)): row for row in rows if row["tree"] == tree and reading.answered(row)}
        for tree in (before, after)
    )
    for what, say in _SAID.items():
        groups: dict[tuple[str, str], list[dict]] = {}
        for place in filter(earlier.__contains__, later):
            if (old := say(earlier[place])) != (new := say(later[place])):
                groups.setdefault((old, new), []).append(later[place])
        lines += [(what, old, new, same) for (old, new), same in groups.items()]
    return pd.DataFrame(
        [{"what": what, before: old, after: new, "where": _where(same)} for what, old, new, same in lines],
        columns=["what", before, after, "where"],
    )


def _available(row: dict) -> str:
    return {True: "yes", False: "no", None: "not said"}[reading.available(row)]


def _imported(row: dict) -> str:
    return "yes" if row["facts"].get("aiter_imports") else "no"


def _replaced(row: dict) -> str:
    unbound = row["facts"]["selection"].get("unbound") or ()
    return wording.listed(sorted({name["name"] for name in unbound if name["builtin"]})) or "none"


_SAID = {"AITER is available": _available, "AITER is imported": _imported, "builtins in place of names": _replaced}


def differing(audit: Audit) -> list[pd.DataFrame]:
    """What a new interpreter answered otherwise, as a table; none if nothing."""
    lines = [
        {"cell": wording.command([one]), "fact": one["fact"], "in the pool": one["pooled"], "alone": one["cold"]}
        for one in audit.differing
    ]
    return [pd.DataFrame(lines)] if lines else []


def pace(audit: Audit) -> pd.DataFrame:
    """How long a cell took, in the pool and in a new interpreter."""
    told = {"pool: forked where cells part": audit.pooled, "a new interpreter for each": audit.cold}
    return pd.DataFrame(
        [
            {
                "how": how,
                "cells asked": pace.cells,
                "seconds": round(pace.seconds, 1),
                "workers": pace.workers,
                "seconds a cell": "–" if pace.seconds_per_cell is None else round(pace.seconds_per_cell, 3),
            }
            for how, pace in told.items()
        ]
    )


def finding(audit: Audit, looked_at: str) -> str:
    """The audit in a few sentences: what the tree breaks, what began and ended among the trees, and the cold cells."""
    silent = sum(not reading.answered(row) for row in audit.rows)
    told = [newest(audit.judged(looked_at)), *moved(audit.judgements)]
    told += [f"{wording.counted(silent, 'cell')} of {len(audit.rows)} gave no answer."] if silent else []
    return " ".join([*told, audit.agreement()])


def moved(judgements: Sequence[Judgement]) -> list[str]:
    """Which statements broke after they had held, until when, and which held after they had been broken: sentences."""
    broke: dict[str, list[str]] = {}
    mended: dict[str, list[str]] = {}
    for span in history.spans(judgements):
        if span.before:
            broke.setdefault(span.first, []).append(
                span.statement.name + (f" (until {span.after})" if span.after else "")
            )
        elif span.after:
            mended.setdefault(span.after, []).append(span.statement.name)
    order = dict.fromkeys(judged.tree for judged in judgements)
    return [
        f"{how} {'; '.join(f'in {tree} {wording.listed(names[tree])}' for tree in order if tree in names)}."
        for how, names in (("Newly broken", broke), ("Mended", mended))
        if names
    ]
