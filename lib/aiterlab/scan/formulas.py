# SPDX-License-Identifier: Apache-2.0
"""Exact propositional logic for conditions: two formulas are equal exactly if they are the same number.

A name is bound under one condition and used under another, and whether the second implies the first decides about a
finding. Guessing it from the text would be wrong too often, so conditions are kept as binary decision diagrams: a node
is a question (an atom) with one branch for yes and one for no, equal nodes are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import contextmanager

FALSE, TRUE = 0, 1
Formula = int


class TooComplex(Exception):
    """The conditions of one module need more nodes than can be afforded."""


class Formulas:
    """All formulas of one module."""

    def __init__(self, limit: int = 100_000) -> None:
        self.limit = limit
        self._nodes: list[tuple[int, Formula, Formula]] = [(-1, FALSE, FALSE), (-1, TRUE, TRUE)]
        self._known: dict[tuple[int, Formula, Formula], Formula] = {}
        self._chosen: dict[tuple[Formula, Formula, Formula], Formula] = {}
        self._places: dict[Hashable, int] = {}
        self.atoms: list[Hashable] = []  # in order of appearance, which is the order of questions in every diagram

    @contextmanager
    def allowance(self, more: int):
        """Let a part of the work make so many new formulas, and no more."""
        before, self.limit = self.limit, min(self.limit, len(self._nodes) + more)
        try:
            yield
        finally:
            self.limit = before

    def atom(self, key: Hashable) -> Formula:
        """The formula that holds exactly if this one question is answered yes."""
        if key not in self._places:
            self._places[key] = len(self.atoms)
            self.atoms.append(key)
        return self._node(self._places[key], TRUE, FALSE)

    def choose(self, condition: Formula, then: Formula, otherwise: Formula) -> Formula:
        if condition == TRUE or then == otherwise:
            return then
        if condition == FALSE:
            return otherwise
        if (then, otherwise) == (TRUE, FALSE):
            return condition
        key = (condition, then, otherwise)
        if (known := self._chosen.get(key)) is not None:
            return known
        place = min(self._nodes[part][0] for part in key if part > TRUE)
        yes, no = zip(*(self._branches(part, place) for part in key), strict=True)
        result = self._chosen[key] = self._node(place, self.choose(*yes), self.choose(*no))
        return result

    def both(self, *formulas: Formula) -> Formula:
        result = TRUE
        for formula in formulas:
            result = self.choose(result, formula, FALSE)
        return result

    def either(self, *formulas: Formula) -> Formula:
        result = FALSE
        for formula in formulas:
            result = self.choose(result, TRUE, formula)
        return result

    def negation(self, formula: Formula) -> Formula:
        return self.choose(formula, FALSE, TRUE)

    def support(self, formula: Formula) -> list[Hashable]:
        """The atoms that the formula depends on."""
        seen, places, waiting = set(), set(), [formula]
        while waiting:
            node = waiting.pop()
            if node > TRUE and node not in seen:
                seen.add(node)
                place, yes, no = self._nodes[node]
                places.add(place)
                waiting += (yes, no)
        return [self.atoms[place] for place in sorted(places)]

    def forget(self, formula: Formula, forgotten: Callable[[Hashable], bool]) -> Formula:
        """What is left of a formula for somebody who cannot see some atoms: it holds if any answer makes it hold."""
        for key in self.support(formula):
            if forgotten(key):
                formula = self.either(self.given(formula, key, True), self.given(formula, key, False))
        return formula

    def given(self, formula: Formula, key: Hashable, answer: bool) -> Formula:
        """The formula with one question answered."""
        place, memo = self._places[key], {}

        def replaced(node: Formula) -> Formula:
            at, yes, no = self._nodes[node]
            if node <= TRUE or at > place:
                return node
            if at == place:
                return yes if answer else no
            if node not in memo:
                memo[node] = self._node(at, replaced(yes), replaced(no))
            return memo[node]

        return replaced(formula)

    def toggled(self, formula: Formula, key: Hashable) -> Formula:
        """The formula as it would be with the answer to one question turned round."""
        return self.choose(self.atom(key), self.given(formula, key, False), self.given(formula, key, True))

    def example(self, formula: Formula) -> list[tuple[Hashable, bool]]:
        """The fewest answers that make a formula hold."""
        memo: dict[Formula, list | None] = {FALSE: None, TRUE: []}

        def shortest(node: Formula) -> list | None:
            if node not in memo:
                place, yes, no = self._nodes[node]
                found = [
                    [(self.atoms[place], answer), *rest]
                    for answer, branch in ((False, no), (True, yes))
                    if (rest := shortest(branch)) is not None
                ]
                memo[node] = min(found, key=len, default=None)
            return memo[node]

        return shortest(formula) or []

    def _branches(self, node: Formula, place: int) -> tuple[Formula, Formula]:
        at, yes, no = self._nodes[node]
        return (yes, no) if at == place else (node, node)

    def _node(self, place: int, yes: Formula, no: Formula) -> Formula:
        if yes == no:
            return yes
        key = (place, yes, no)
        if key not in self._known:
            if len(self._nodes) >= self.limit:
                raise TooComplex
            self._known[key] = len(self._nodes)
            self._nodes.append(key)
        return self._known[key]
