# SPDX-License-Identifier: Apache-2.0
"""What the scan reports, and the rules in the words of the reader."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SEVERITIES = ("note", "warning", "error")


@dataclass(frozen=True)
class Rule:
    """One kind of fault."""

    name: str
    title: str
    why: str


RULES = {
    rule.name: rule
    for rule in (
        Rule(
            "builtin-stand-in",
            "A builtin silently takes the place of a name that is bound only under a condition",
            "Where the condition fails, Python finds its builtin of that name instead. There is no NameError, so no "
            "linter for undefined names sees it; the failure comes later and names something else.",
        ),
        Rule(
            "conditional-name",
            "A name is bound only under a condition, and used where the condition may not hold",
            "The module imports without complaint; the NameError waits for the first call, on a machine that differs "
            "from the author's.",
        ),
        Rule(
            "availability-reads-preference",
            "A function that says whether something can be used depends on whether the user wants it",
            "Availability is a fact of the machine. Once a switch moves it, an explicit choice is refused although it "
            "would work, and code that is right to ask for availability goes astray.",
        ),
        Rule(
            "preference-gate",
            "A gate that speaks of availability asks for a preference",
            "A decorator or a list of what is allowed stands before explicit paths too. If it follows a switch, an "
            "explicit choice silently gets nothing, or is refused.",
        ),
        Rule(
            "positional-order",
            "Two functions are offered under one name with different positional order",
            "The same call puts its arguments into different parameters, depending on which function was imported. "
            "Tensors of like shape raise nothing.",
        ),
        Rule(
            "suppression",
            "A suppression that has no reason, names no rule, or suppresses nothing",
            "A suppression without a finding hides the next one.",
        ),
    )
}


@dataclass(frozen=True)
class Related:
    """Another line that belongs to a finding."""

    line: int
    text: str
    path: Path | None = None  # null: the same file


@dataclass(frozen=True)
class Finding:
    """One fault at one place."""

    rule: str
    severity: str
    path: Path
    line: int
    column: int  # from 1
    message: str
    mend: str
    related: tuple[Related, ...] = ()

    def at_least(self, severity: str) -> bool:
        return SEVERITIES.index(self.severity) >= SEVERITIES.index(severity)
