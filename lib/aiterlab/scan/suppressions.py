# SPDX-License-Identifier: Apache-2.0
"""`# aiterlab: allow RULE because REASON` accepts the finding on its line, or below it if the line is its own."""

from __future__ import annotations

import io
import re
import tokenize
from dataclasses import dataclass

from aiterlab.scan.findings import RULES, Finding
from aiterlab.scan.project import Source

_FORM = re.compile(r"aiterlab:\s*allow\b(.*?)(?:\bbecause\b(.*))?$")
_MARK = "aiterlab:"


@dataclass(frozen=True)
class Suppression:
    """One comment."""

    line: int  # where the comment stands
    target: int  # the line it speaks of
    rules: tuple[str, ...]
    reason: str
    fault: str = ""


def read(source: Source) -> list[Suppression]:
    """The suppressions of one file, also those that are wrong."""
    if _MARK not in source.text:
        return []
    found, lines = [], source.text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type != tokenize.COMMENT or _MARK not in token.string:
            continue
        line = token.start[0]
        alone = not lines[line - 1][: token.start[1]].strip()
        target = line
        if alone:  # it speaks of the next line of code
            target = next((n for n in range(line + 1, len(lines) + 1) if lines[n - 1].strip() and
                           not lines[n - 1].lstrip().startswith("#")), line)  # fmt: skip
        match = _FORM.search(token.string.strip())
        rules = tuple(re.split(r"[,\s]+", match[1].strip())) if match and match[1].strip() else ()
        reason = (match[2] or "").strip() if match else ""
        unknown = [rule for rule in rules if rule not in RULES]
        fault = (
            "names no rule" if not rules
            else f"names no such rule: {', '.join(unknown)} (there are {', '.join(RULES)})" if unknown
            else "gives no reason (`because …`)" if not reason
            else ""
        )  # fmt: skip
        found.append(Suppression(line, target, rules, reason, fault))
    return found


def apply(source: Source, findings: list[Finding]) -> tuple[list[Finding], list[tuple[Finding, str]]]:
    """Split findings into those that stand, faults of the suppressions included, and those accepted for a reason."""
    suppressions = read(source)
    standing, accepted, used = [], [], set()
    for finding in findings:
        lines = {finding.line, *(related.line for related in finding.related if related.path is None)}
        match = next((s for s in suppressions if not s.fault and finding.rule in s.rules and s.target in lines), None)
        if match is None:
            standing.append(finding)
        else:
            used.add(match)
            accepted.append((finding, match.reason))
    for suppression in suppressions:
        if suppression.fault or suppression not in used:
            fault = suppression.fault or f"suppresses nothing ({', '.join(suppression.rules)})"
            mend = "write `# aiterlab: allow RULE because REASON`" if suppression.fault else "remove it"
            standing.append(
                Finding("suppression", "warning", source.path, suppression.line, 1, f"this suppression {fault}", mend)
            )
    return standing, accepted
