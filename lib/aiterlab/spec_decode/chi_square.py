# SPDX-License-Identifier: Apache-2.0
"""Are two counts draws from one distribution? Chi-square with rare cells pooled, Holm's correction, distances."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

LEAST_EXPECTED = 5.0  # per cell, below which chi-square's distribution is not to be trusted


def pool(counts: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Merge the columns that are expected too rarely into one, and that into the rarest other if it still is too rare.

    Args:
        counts: [rows, cells]; sums over the merged cells come back.
        expected: [cells], how often each is expected where it is expected least. It must not depend on how the rows
            differ, or the test would not be one of their difference.
    """
    order = np.argsort(-expected, kind="stable")
    counts, expected = counts[:, order], expected[order]
    often = int((expected >= LEAST_EXPECTED).sum())
    if expected[often:].sum() < LEAST_EXPECTED:
        often -= 1
    often = max(often, 0)
    return np.concatenate([counts[:, :often], counts[:, often:].sum(1, keepdims=True)], axis=1)


def tail(statistic: float, freedom: int) -> float:
    """Return the chance of a larger chi-square."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def holm(p_values: Iterable[float]) -> tuple[float, ...]:
    """Adjust p-values so that any of them below a band has that band's chance in all tests together.

    The tests may depend on one another, as those of nested continuations do.
    """
    p_values = list(p_values)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return tuple(adjusted)


def distance(one: np.ndarray, another: np.ndarray, size: float, other_size: float) -> tuple[float, float]:
    """Total variation distance of two shares and its standard error.

    It is the difference of two proportions, those of the cells of which `one` has more, and so is its error.
    """
    more = one > another
    first, second = one[more].sum(), another[more].sum()
    error = math.sqrt(max(0.0, first * (1 - first)) / size + max(0.0, second * (1 - second)) / other_size)
    return float(first - second), error


def mean_distance(variances: np.ndarray) -> float:
    """Mean distance of what is equal, from the variance of each cell's difference (normal: mean |x| = σ √(2/π))."""
    return float(np.sqrt(variances * 2 / math.pi).sum() / 2)
