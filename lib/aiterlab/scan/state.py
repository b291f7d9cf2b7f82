# SPDX-License-Identifier: Apache-2.0
"""What is known at one point of a program: how it was reached, which names are bound, and what their values mean."""

from __future__ import annotations

import ast
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from aiterlab.scan.formulas import FALSE, TRUE, Formula, Formulas


@dataclass(frozen=True)
class Atom:
    """One question that the source leaves open."""

    kind: Literal["test", "none", "raises", "caught", "case"]
    text: str
    identity: Hashable = None  # which bindings the names in it refer to
    lasting: bool = field(
        default=True, compare=False
    )  # asked of the module or of `self`, so another function can ask it
    node: ast.AST | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False)
class Value:
    """A value as far as conditions care. Its formulas may be unknown, or follow from cases once asked for."""

    identity: Hashable  # equal for two uses of a name exactly if both see the same binding
    truthy: Formula | None = None
    none: Formula | None = None
    cases: tuple[tuple[Formula, Value | None], ...] = ()

    def same(self, other: Value) -> bool:
        mine, others = (self.identity, self.truthy, self.none), (other.identity, other.truthy, other.none)
        return self is other or (mine == others and self.cases is other.cases)

    def truth(self, formulas: Formulas, name: str, lasting: bool) -> tuple[Formula, Formula]:
        """When it is true, and when it is None."""
        if self.truthy is not None and self.none is not None:
            return self.truthy, self.none
        if self.cases:
            known = [value.truth(formulas, name, lasting) if value else (FALSE, FALSE) for _, value in self.cases]
            parts = list(zip((reach for reach, _ in self.cases), known, strict=True))
            truthy, none = (
                formulas.either(*(formulas.both(reach, answer[i]) for reach, answer in parts)) for i in (0, 1)
            )
            object.__setattr__(self, "truthy", truthy)
            object.__setattr__(self, "none", none)
            return truthy, none
        truthy = formulas.atom(Atom("test", name, self.identity, lasting))
        none = formulas.atom(Atom("none", f"{name} is None", self.identity, lasting))
        return truthy, formulas.both(formulas.negation(truthy), none)


@dataclass
class State:
    """One point of a program. `bound` and `values` mean something only where `reach` holds, and are never changed in
    place: many states share them."""

    reach: Formula = TRUE
    bound: dict[tuple, Formula] = field(default_factory=dict)  # of the module's names
    values: dict[tuple, Value] = field(default_factory=dict)  # of names, and of ("self", attribute)

    def under(self, formulas: Formulas, condition: Formula) -> State:
        """The same point on the branch where a condition holds."""
        return State(formulas.both(self.reach, condition), self.bound, self.values)

    def bind(self, key: tuple, value: Value) -> None:
        self.values = {**self.values, key: value}
        if key[0] == 0:
            self.bound = {**self.bound, key: TRUE}

    def unbind(self, key: tuple) -> None:
        self.bound = {**self.bound, key: FALSE}


def merge(formulas: Formulas, states: Iterable[State]) -> State:
    """The point where several branches meet again. Their `reach` exclude one another."""
    live = [state for state in states if state.reach != FALSE]
    if len(live) < 2:
        return live[0] if live else State(FALSE)
    merged = State(formulas.either(*(state.reach for state in live)), live[0].bound, live[0].values)
    if any(state.bound is not merged.bound for state in live):
        merged.bound = {}
        for key in _keys(state.bound for state in live):
            parts = [state.bound.get(key, FALSE) for state in live]
            merged.bound[key] = parts[0]
            if any(part != parts[0] for part in parts):
                cases = (formulas.both(state.reach, part) for state, part in zip(live, parts, strict=True))
                merged.bound[key] = formulas.either(*cases)
    if any(state.values is not merged.values for state in live):
        merged.values = {}
        for key in _keys(state.values for state in live):
            merged.values[key] = _merged_value([(state.reach, state.values.get(key)) for state in live])
    return merged


def _merged_value(cases: list[tuple[Formula, Value | None]]) -> Value:
    known = [value for _, value in cases if value is not None]
    if all(value.same(known[0]) for value in known):
        return known[0]
    identities = {value.identity for value in known}
    return Value(known[0].identity if len(identities) == 1 else frozenset(identities), cases=tuple(cases))


def _keys(mappings: Iterable[dict]) -> dict:
    return {key: None for mapping in mappings for key in mapping}
