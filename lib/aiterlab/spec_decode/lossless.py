# SPDX-License-Identifier: Apache-2.0
"""Does speculative decoding give what the target alone gives? Two checks, and both must be able to fail.

Greedy: token by token against vanilla decoding. The first difference of a request is either a near-tie, which is listed
with its gap, or a fault; what follows it has another context and is not compared.

Sampled: at temperature 1, short continuations of the same prompts. Two tests, one band over all of them:

    continuation  counts of the first 1, 2, … tokens in both samples: chi-square for two samples
    next token    how often the token at one place was vanilla's likeliest, its second, …, against the probabilities
                  that vanilla told behind the same beginnings: all prompts together, no sampling error on its side

A prompt's first token comes from its prefill and passes no verifier, so continuations need two tokens or more. Sample
the two engines with different seeds: with the same one their first tokens agree by construction and are no evidence.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from aiterlab.spec_decode import chi_square
from aiterlab.spec_decode.chi_square import LEAST_EXPECTED, pool

if TYPE_CHECKING:
    from aiterlab.spec_decode.engine import Generation, Output

MANTISSA_BITS = {"bfloat16": 7, "float16": 10, "float32": 23}
# In 16 bits the last rounding of a logit is coarser than what the layers before it add, so another order of summation
# moves a logit to a neighbour at most: one spacing for each of the two that change places. In 32 bits nothing rounds
# that noise away: sums of about a thousand products in some ten layers differ by up to a hundred spacings each.
SPACINGS = {"bfloat16": 2, "float16": 2, "float32": 200}
LARGEST_LOGIT = 31.0  # logits of the likeliest tokens stay below 32 in the models used here
LEAST_COMPARED = 0.5  # share of the tokens; a check that near-ties cut short more than that shows nothing
_ONE_CELL = f"no two cells that are expected {LEAST_EXPECTED:g} times or more"
BAND = 1e-3  # chance that all tests together reject a right verifier


# Greedy


def near_tie_tolerance(dtype: str = "bfloat16", magnitude: float = LARGEST_LOGIT) -> float:
    """Return the largest gap between two logits that a right engine may turn around.

    A verify step multiplies K + 1 rows where a decode step multiplies one; the libraries sum in another order then, and
    logits of `magnitude` come out one representable number higher or lower (0.125 for bfloat16 between 16 and 32).
    """
    spacing = 2.0 ** (math.floor(math.log2(magnitude)) - MANTISSA_BITS[dtype])
    return SPACINGS[dtype] * spacing


@dataclass(frozen=True)
class Difference:
    """Where a request first leaves vanilla decoding; a token of None means that this side had ended."""

    request_id: str
    sample: int
    position: int
    vanilla_token: int | None
    other_token: int | None
    gap: float | None  # log-probability of vanilla's likeliest token less that of the other's, in vanilla's own step
    near_tie: bool
    reason: str


@dataclass(frozen=True)
class GreedyComparison:
    """Outcome of comparing one engine's greedy tokens with vanilla decoding's."""

    engine: str
    requests: int
    compared_tokens: int
    tokens: int
    tolerance: float
    differences: tuple[Difference, ...]

    @property
    def identical(self) -> int:
        return self.requests - len(self.differences)

    @property
    def near_ties(self) -> tuple[Difference, ...]:
        return tuple(one for one in self.differences if one.near_tie)

    @property
    def faults(self) -> tuple[Difference, ...]:
        return tuple(one for one in self.differences if not one.near_tie)

    @property
    def ok(self) -> bool:
        return not self.faults and self.compared_tokens > LEAST_COMPARED * self.tokens

    @property
    def verdict(self) -> str:
        """Say in one sentence what was found."""
        compared = f"{self.compared_tokens} of {self.tokens} tokens compared"
        if self.faults:
            first = self.faults[0]
            return (
                f"{self.engine}: different in {len(self.faults)} of {self.requests} requests, first in "
                f"{first.request_id} at token {first.position} ({first.reason}); {compared}"
            )
        if not self.ok:
            return f"{self.engine}: shows nothing, because near-ties end the comparison too early; {compared}"
        if self.near_ties:
            widest = max(one.gap for one in self.near_ties)
            return (
                f"{self.engine}: identical up to {len(self.near_ties)} near-ties in {self.requests} requests "
                f"(widest gap {widest:.3g}, tolerance {self.tolerance:.3g}); {compared}"
            )
        return f"{self.engine}: identical in all {self.requests} requests; {compared}"

    def __bool__(self) -> bool:
        return self.ok

    def table(self) -> pd.DataFrame:
        """List the first difference of each request that has one."""
        names = ["request", "sample", "token", "vanilla", "other", "gap", "tolerance", "near-tie", "reason"]
        rows = [
            (
                one.request_id,
                one.sample,
                one.position,
                one.vanilla_token,
                one.other_token,
                one.gap,
                self.tolerance,
                one.near_tie,
                one.reason,
            )
            for one in self.differences
        ]
        return pd.DataFrame(rows, columns=names).astype({"vanilla": "Int64", "other": "Int64", "gap": float})

    def row(self) -> dict:
        """Flat, for a record or a table of several engines."""
        gaps = [one.gap for one in self.near_ties]
        return {
            "engine": self.engine,
            "requests": self.requests,
            "identical": self.identical,
            "near_ties": len(self.near_ties),
            "different": len(self.faults),
            "widest_near_tie_gap": max(gaps, default=None),
            "tolerance": self.tolerance,
            "compared_tokens": self.compared_tokens,
            "tokens": self.tokens,
            "ok": self.ok,
            "verdict": self.verdict,
        }


def largest_shift(one: Generation, another: Generation) -> float:
    """Return how far the same token's log-probability lies apart in two runs of vanilla decoding, at most.

    Only places with the same context count: those up to where the two first differ. Two attention backends sum in
    another order in every layer, which moves logits by more than the last rounding; this measures by how much.
    """
    shift = 0.0
    for mine, others in _pairs(one, another):
        end = _first_difference(mine.token_ids, others.token_ids)
        for here, there in zip((mine.top_logprobs or ())[:end], (others.top_logprobs or ())[:end], strict=False):
            known = dict(there)
            shift = max(shift, *(abs(value - known.get(token, value)) for token, value in here))
    return shift


def compare_greedy(
    vanilla: Generation,
    other: Generation,
    *,
    dtype: str = "bfloat16",
    magnitude: float = LARGEST_LOGIT,
    shift: float = 0.0,
) -> GreedyComparison:
    """Compare greedy tokens request by request, up to the first difference of each.

    Args:
        vanilla: generated with `logprobs` of 5 or more, from which the gap of a difference is read.
        other: the same requests, the same number of tokens.
        dtype: in which the target computes its logits; decides with `magnitude` what counts as a near-tie.
        shift: by how much a logit was seen to move between the two engines' backends (`largest_shift`); two may change
            places that are twice that apart.
    """
    tolerance = max(near_tie_tolerance(dtype, magnitude), 2 * shift)
    differences, compared, tokens = [], 0, 0
    for mine, others in _pairs(vanilla, other):
        position = _first_difference(mine.token_ids, others.token_ids)
        tokens += len(mine.token_ids)
        compared += len(mine.token_ids) if position is None else position + 1
        if position is not None:
            differences.append(_difference(mine, others, position, tolerance))
    return GreedyComparison(other.engine, len(vanilla.outputs), compared, tokens, tolerance, tuple(differences))


def _pairs(vanilla: Generation, other: Generation) -> Iterable[tuple[Output, Output]]:
    by_key = {(one.request_id, one.sample): one for one in other.outputs}
    keys = [(one.request_id, one.sample) for one in vanilla.outputs]
    if not keys or set(keys) != set(by_key):
        odd = sorted(set(keys) ^ set(by_key))
        which = f"request {odd[0][0]}, sample {odd[0][1]} is in one of them alone" if odd else "both are empty"
        raise ValueError(f"{vanilla.engine} and {other.engine} did not run the same requests: {which}")
    return [(one, by_key[key]) for one, key in zip(vanilla.outputs, keys, strict=True)]


def _first_difference(mine: tuple[int, ...], others: tuple[int, ...]) -> int | None:
    for position, (one, another) in enumerate(zip(mine, others, strict=False)):
        if one != another:
            return position
    return None if len(mine) == len(others) else min(len(mine), len(others))


def _difference(mine: Output, others: Output, position: int, tolerance: float) -> Difference:
    tokens = [ids[position] if position < len(ids) else None for ids in (mine.token_ids, others.token_ids)]
    gap, reason = _gap(mine, position, tokens[1])
    near_tie = gap is not None and gap <= tolerance
    if gap is not None:
        reason = f"gap {gap:.3g} {'within' if near_tie else 'beyond'} {tolerance:.3g}"
    return Difference(mine.request_id, mine.sample, position, *tokens, gap, near_tie, reason)


def _gap(mine: Output, position: int, token: int | None) -> tuple[float | None, str]:
    """How much likelier vanilla held its likeliest token, or why that is not known."""
    if token is None or position >= len(mine.token_ids):
        return None, "one of the two ended here"
    if not mine.top_logprobs:
        return None, "vanilla was run without logprobs"
    listed = dict(mine.top_logprobs[position])
    highest = max(listed.values())
    if token not in listed:
        return (
            None,
            f"not among vanilla's {len(listed)} likeliest, so the gap is {highest - min(listed.values()):.3g} or more",
        )
    return highest - listed[token], ""


# Sampled


@dataclass(frozen=True)
class ChiSquare:
    """One test of one prompt: the statistic, its p-value, and how far apart the two distributions are.

    `distance` is the total variation distance over the test's cells; two right samples of this size are on average
    `distance_by_chance` apart. What could not be tested has None and a reason.
    """

    request_id: str  # "all prompts" in a next-token test
    test: str  # continuation, next token
    tokens: int  # of the continuation; in a next-token test, the place of the token, counted from 1
    samples: int  # of the other engine
    cells: int
    statistic: float | None
    freedom: int
    p_value: float | None
    distance: float | None
    distance_error: float | None  # one standard error
    distance_by_chance: float | None
    reason: str = ""


@dataclass(frozen=True)
class SampledComparison:
    """Outcome of comparing the distribution of sampled continuations with vanilla decoding's."""

    engine: str
    band: float
    tests: tuple[ChiSquare, ...]

    @property
    def tested(self) -> tuple[ChiSquare, ...]:
        return tuple(one for one in self.tests if one.p_value is not None)

    @property
    def adjusted(self) -> tuple[float, ...]:
        """The p-values of `tested` after Holm's correction: below the band, a difference that chance does not give."""
        return chi_square.holm(one.p_value for one in self.tested)

    @property
    def verified(self) -> bool:
        """Whether a token that passed the verifier was tested at all."""
        return any(one.tokens > 1 for one in self.tested)

    @property
    def ok(self) -> bool:
        return self.verified and min(self.adjusted) >= self.band

    @property
    def verdict(self) -> str:
        """Say in one sentence what was found."""
        if not self.verified:
            return f"{self.engine}: shows nothing, because no token behind the first could be tested; take more samples"
        smallest = min(self.adjusted)
        farthest = max(self.tested, key=lambda one: one.distance - one.distance_by_chance)
        return (
            f"{self.engine}: {'same' if self.ok else 'another'} distribution (smallest p {smallest:.2g} of "
            f"{len(self.tested)} tests after Holm, band {self.band:g}; largest distance {farthest.distance:.3f} ± "
            f"{farthest.distance_error:.3f} where chance gives {farthest.distance_by_chance:.3f})"
        )

    def __bool__(self) -> bool:
        return self.ok

    def table(self) -> pd.DataFrame:
        """List every test, adjusted p-values included."""
        table = pd.DataFrame([vars(one) for one in self.tests], columns=list(ChiSquare.__dataclass_fields__))
        table["p_adjusted"] = pd.Series(self.adjusted, index=table.index[table["p_value"].notna()], dtype=float)
        return table

    def row(self) -> dict:
        """Flat, for a record or a table of several engines."""
        distances = [one.distance for one in self.tested]
        return {
            "engine": self.engine,
            "tests": len(self.tested),
            "untested": len(self.tests) - len(self.tested),
            "verified": self.verified,
            "smallest_p_adjusted": min(self.adjusted, default=None),
            "band": self.band,
            "largest_distance": max(distances, default=None),
            "ok": self.ok,
            "verdict": self.verdict,
        }


def compare_sampled(vanilla: Generation, other: Generation, *, band: float = BAND) -> SampledComparison:
    """Test whether two engines draw their continuations from the same distribution.

    Args:
        vanilla: many samples of a few prompts at temperature 1, of 2 or 3 tokens; with `logprobs` (20, say) the
            next-token tests are made as well.
        other: the same prompts with a seed so far away that no sample of either shares its noise with one of the other.
        band: the p-value after Holm's correction below which the check fails.
    """
    mine, others = _by_request(vanilla), _by_request(other)
    if not mine or set(mine) != set(others):
        raise ValueError(f"{vanilla.engine} and {other.engine} did not sample the same prompts")
    tests, longest = [], max(len(one.token_ids) for one in vanilla.outputs)
    for request_id, outputs in mine.items():
        for tokens in range(1, longest + 1):
            counts = [Counter(one.token_ids[:tokens] for one in side) for side in (outputs, others[request_id])]
            tests.append(_continuation(request_id, tokens, *counts))
    if all(one.top_logprobs for one in vanilla.outputs):
        tests += [_next_token(place, mine, others) for place in range(longest)]
    return SampledComparison(other.engine, band, tuple(tests))


def _by_request(generation: Generation) -> dict[str, list[Output]]:
    requests = defaultdict(list)
    for one in generation.outputs:
        requests[one.request_id].append(one)
    return dict(requests)


def _continuation(request_id: str, tokens: int, mine: Counter, others: Counter) -> ChiSquare:
    names = sorted(mine | others)
    counts = np.array([[side[name] for name in names] for side in (mine, others)], dtype=float)
    sizes = counts.sum(1, keepdims=True)
    cells = pool(counts, counts.sum(0) * sizes.min() / sizes.sum())
    samples = int(sizes[1, 0])
    if cells.shape[1] < 2:
        return _untested(request_id, "continuation", tokens, samples, _ONE_CELL)
    expected = cells.sum(0) * sizes / sizes.sum()
    statistic = float(((cells - expected) ** 2 / expected).sum())
    shares = cells / sizes
    pooled = cells.sum(0) / sizes.sum()
    by_chance = chi_square.mean_distance(pooled * (1 - pooled) * (1 / sizes).sum())
    return _tested(
        (request_id, "continuation", tokens, samples, cells.shape[1]),
        (statistic, cells.shape[1] - 1),
        (*chi_square.distance(*shares, *sizes[:, 0]), by_chance),
    )


def _next_token(place: int, vanilla: Mapping[str, list[Output]], other: Mapping[str, list[Output]]) -> ChiSquare:
    """Compare how often the token at `place` had which rank with the sum of the probabilities that vanilla told.

    By rank, because every beginning has other tokens: one that a single sample has still counts. A verifier that
    accepts too much prefers what the draft proposes, which is mostly what ranks high.
    """
    told = {
        (request_id, one.token_ids[:place]): sorted(one.top_logprobs[place], key=lambda listed: -listed[1])
        for request_id, outputs in vanilla.items()
        for one in outputs
        if place < len(one.token_ids)
    }
    least = min(map(len, told.values()))
    ranks, chances = [], []
    for request_id, outputs in other.items():
        for one in outputs:
            listed = told.get((request_id, one.token_ids[:place])) if place < len(one.token_ids) else None
            if listed is not None:
                tokens, logprobs = zip(*listed[:least], strict=True)
                ranks.append(tokens.index(one.token_ids[place]) if one.token_ids[place] in tokens else least)
                chances.append(np.exp(logprobs))
    what = ("all prompts", "next token", place + 1, len(ranks))
    if not ranks:
        return _untested(*what, "vanilla made none of these beginnings")
    truth = np.array(chances)
    truth = np.column_stack([truth, np.maximum(0, 1 - truth.sum(1))])  # the last rank: whatever was not listed
    truth /= truth.sum(1, keepdims=True)
    observed, *truth = pool(np.vstack([np.bincount(ranks, minlength=least + 1), truth]), truth.sum(0))
    return _ranked(what, observed, np.array(truth))


def _ranked(what: tuple, observed: np.ndarray, truth: np.ndarray) -> ChiSquare:
    """Test counts against the sum of one draw from each row of `truth`, [samples, cells]."""
    if len(observed) < 2:
        return _untested(*what, _ONE_CELL)
    samples, expected = len(truth), truth.sum(0)
    covariance = np.diag(expected) - truth.T @ truth
    off = (observed - expected)[:-1]  # the last cell follows from the others
    statistic = float(off @ np.linalg.pinv(covariance[:-1, :-1], hermitian=True) @ off)
    distance = chi_square.distance(expected / samples, observed / samples, math.inf, samples)
    by_chance = chi_square.mean_distance(np.diag(covariance) / samples**2)
    return _tested((*what, len(observed)), (statistic, len(observed) - 1), (*distance, by_chance))


def _tested(what: tuple, statistic: tuple[float, int], distance: tuple[float, float, float]) -> ChiSquare:
    return ChiSquare(*what, *statistic, chi_square.tail(*statistic), *distance)


def _untested(request_id: str, test: str, tokens: int, samples: int, reason: str) -> ChiSquare:
    return ChiSquare(request_id, test, tokens, samples, 1, None, 0, None, None, None, None, reason)
