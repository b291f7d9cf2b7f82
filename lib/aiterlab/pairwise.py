# SPDX-License-Identifier: Apache-2.0
"""How few combinations of settings show every pair of settings? Faults in kernels rarely need three at once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations, product


def cover(options: Mapping[str, Sequence[Hashable]]) -> list[dict[str, Hashable]]:
    """Choose rows, one value per option, so that each pair of values of two options stands in at least one row.

    Greedy and without chance: each row starts from the first pair that is still missing and takes, option by option,
    the value that adds the most missing pairs with what the row has.
    """
    names = list(options)
    missing = {
        ((one, a), (other, b)): None  # a dict, to keep the order
        for one, other in combinations(names, 2)
        for a, b in product(options[one], options[other])
    }
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for name in sorted(names, key=lambda name: -len(options[name])):
            if name not in row:
                trials = [row | {name: value} for value in options[name]]
                row = max(trials, key=lambda trial: len(missing.keys() & _pairs(trial, names)))
        for pair in _pairs(row, names):
            missing.pop(pair, None)
        rows.append({name: row[name] for name in names})
    return rows


def _pairs(row: Mapping[str, Hashable], names: Sequence[str]) -> set:
    """Every pair of settings in a row, which may still lack some options."""
    return set(combinations([(name, row[name]) for name in names if name in row], 2))
