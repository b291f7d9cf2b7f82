# SPDX-License-Identifier: Apache-2.0
"""One cell's answer for a reader: what was chosen, why, what it imported, and what the policy says to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from aiterlab.audit import reading, wording
from aiterlab.audit.judgement import Judgement, Verdict, by_sentence, smallest
from aiterlab.audit.reading import Ending
from aiterlab.policy import MAIN_SWITCH

_SIGNS = {Verdict.HOLDS: "holds ", Verdict.BROKEN: "BROKEN"}


def cell(row: dict) -> str:
    """All that one row says, one fact per line."""
    return "\n".join([_place(row), *(f"  {name:<12} {text}" for name, text in _facts(row))])


def verdicts(judgements: Sequence[Judgement]) -> str:
    """What the statements say that these answers speak to, with what contradicts them."""
    lines = []
    for judged in judgements:
        if judged.verdict not in _SIGNS:
            continue
        lines.append(f"  {_SIGNS[judged.verdict]} {judged.statement.name}: {judged.statement.sentence}")
        for what, violations in by_sentence(judged.violations).items():
            lines += [f"         {what}", f"           {smallest(violations).command}"]
        if judged.verdict is Verdict.BROKEN:
            lines.append(f"         what can be done: {judged.statement.mend}")
    silent = Counter(judged.reason for judged in judgements if judged.verdict is Verdict.UNKNOWN)
    for reason, number in silent.items():
        lines.append(f"  ?      {wording.counted(number, 'statement')} without an answer: {reason}")
    return "\n".join(lines or ["  no statement of the policy speaks to these cells"])


def error_line(error: dict) -> str:
    """An exception that a question ended in, in one line."""
    lines = [line.strip() for line in error["message"].splitlines() if line.strip()]
    return f"{error['type']}: {lines[0]}{_at(error)}" if lines else f"{error['type']}{_at(error)}"


def _at(error: dict) -> str:
    at = error.get("raised_at")
    return f" ({at['file']}:{at['line']})" if at else ""


def _place(row: dict) -> str:
    machine = [row["arch"], f"AITER {row['aiter']}", f"{MAIN_SWITCH} {row['switch']}"]
    machine += [f"{name}={value}" for name, value in reading.others(row)]
    pages = "vLLM's block size" if row["block_size"] is None else f"block size {row['block_size']}"
    layer = f"{row['role']}'s {row['kind']} layer, head size {row['head_size']}, {row['dtype']}"
    return f"{row['tree']} on {', '.join(machine)}; {layer}, KV cache {row['kv_cache_dtype']}, {pages}"


def _facts(row: dict) -> list[tuple[str, str]]:
    if silent := reading.why_unanswered(row):
        return [("no answer", silent)]
    facts = row["facts"]
    selection = facts["selection"]
    through = f" through {selection['asked_through']}" if selection.get("asked_through") else ""
    told = [("asked for", "nothing" if row["selection"] == "auto" else f"{row['selection']}{through}")]
    told += _ending(row, selection)
    if selection.get("priorities"):
        told.append(("candidates", ", ".join(selection["priorities"])))
    for name, reasons in (selection.get("refused") or {}).items():
        told.append(("left out", f"{name}: {', '.join(reasons)}"))
    told += _policy(facts.get("policy", {}))
    imports = [f"{entry['module']} at {entry['file']}:{entry['line']}" for entry in facts.get("aiter_imports", ())]
    told.append(("imports", "; ".join(dict.fromkeys(imports)) or "nothing of AITER"))
    for name in selection.get("unbound", ()):
        stands_in = f"; {name['value']} answers in its place" if name["builtin"] else ""
        told.append(("not bound", f"{name['name']}, used at {name['file']}:{name['line']}{stands_in}"))
    for name in facts.get("environment", {}).get("unknown") or ():
        told.append(("not known", f"{name}: nothing in this tree reads it"))
    return told


def _ending(row: dict, selection: dict) -> list[tuple[str, str]]:
    how = reading.ending(row)
    if how is Ending.CHOSEN and selection["outcome"] == "ok":
        return [("chosen", f"{selection['backend']} ({selection['backend_class']})")]
    if how is Ending.CHOSEN:
        return [("chosen", str(reading.chosen(row))), ("fell over", error_line(selection))]
    more = [line.strip() for line in selection["message"].splitlines() if line.strip()][1:]
    ended = "refused" if how is Ending.REFUSED else "fell over"
    return [(ended, error_line(selection)), *(("", line) for line in more)]


def _policy(policy: dict) -> list[tuple[str, str]]:
    if policy.get("outcome") != "ok":
        return [("policy", error_line(policy))] if policy else []
    words = {True: "yes", False: "no", None: "not asked in this tree"}
    features = wording.listed(policy["enabled_features"])
    return [
        ("available", words[policy["available"]]),
        ("preferred", words[policy["enabled"]] + (f": {features}" if policy["enabled"] and features else "")),
    ]
