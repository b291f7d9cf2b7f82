# SPDX-License-Identifier: Apache-2.0
"""What speed-up should speculative decoding give, and does the engine give it? Pure functions over measured parts.

A step with K draft tokens emits tau tokens and takes

    step(K) = draft(K) + verify(K + 1) + sample(K + 1) + host(K)            [ms]
    tau(K)  = 1 + sum over k of P(the first k draft tokens are accepted)    bonus token included
    speed-up(K) = tau(K) * step(0) / step(K)                                step(0): vanilla

tau takes vLLM's per-position rates, which are unconditional, so nothing is assumed about their independence. Parts come
from rounds with marks in them (`steps`); what is predicted is compared with rounds without. A K that was left out is
predicted from the others: the draft and the host on a line, since each draft token is one more pass of the same model;
verification and sampling between their neighbours, since they go in stairs.

Published acceptance, for targets without real weights: Llama-3.1-8B with its EAGLE and EAGLE-3 heads, chains in vLLM,
issue vllm-project/vllm#20780 (acceptance length for each K; the author's own numbers). Differences of neighbouring
lengths are the rates from the third position on. Only the sum of the first two is published (K = 1 is not): they are
split so that a second token is accepted after the first as often as a third after the second. That is an assumption.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PUBLISHED_SOURCE = "vllm-project/vllm#20780, Llama-3.1-8B; the split of the first two positions is assumed"
PUBLISHED_LENGTHS = {
    "eagle": {2: 2.10, 3: 2.29, 4: 2.39, 5: 2.43, 6: 2.45, 7: 2.47},
    "eagle3": {2: 2.36, 3: 2.79, 4: 3.08, 5: 3.32, 6: 3.46, 7: 3.54},
}


@dataclass(frozen=True)
class Components:
    """Where one step's time goes, in milliseconds."""

    draft_ms: float
    verify_ms: float
    sample_ms: float
    host_ms: float

    @property
    def step_ms(self) -> float:
        """The whole step."""
        return self.draft_ms + self.verify_ms + self.sample_ms + self.host_ms


@dataclass(frozen=True)
class Prediction:
    """What the model says about one K."""

    draft_tokens: int
    tokens_per_step: float
    components: Components
    speed_up: float
    worst_case: float  # speed-up when nothing is accepted
    iid_speed_up: float  # Leviathan's formula with the same tokens per step; host and sampling are left out there


def published_rates(method: str, draft_tokens: int) -> tuple[float, ...]:
    """Unconditional acceptance rates of the first `draft_tokens` positions; see the module's docstring.

    Raises:
        KeyError, ValueError: nothing is published for this method or so many tokens.
    """
    lengths = PUBLISHED_LENGTHS[method]
    if not 1 <= draft_tokens <= max(lengths):
        raise ValueError(f"{draft_tokens} draft tokens: published are 1 to {max(lengths)}")
    third = lengths[3] - lengths[2]
    # second / first = third / second, and first + second is published
    second = (math.sqrt(third**2 + 4 * third * (lengths[2] - 1)) - third) / 2
    rates = [lengths[2] - 1 - second, second]
    rates += [longer - shorter for shorter, longer in itertools.pairwise(lengths[k] for k in sorted(lengths))]
    return tuple(round(rate, 4) for rate in rates[:draft_tokens])


def expected_tokens(rates: Sequence[float]) -> float:
    """Tokens that a step emits on average, bonus token included, from unconditional rates per position.

    Raises:
        ValueError: rates that are no probabilities, or that increase: then they are conditional ones.
    """
    if any(not 0 <= rate <= 1 for rate in rates):
        raise ValueError(f"acceptance rates must be between 0 and 1, not {list(rates)}")
    if any(later > earlier + 1e-9 for earlier, later in itertools.pairwise(rates)):
        raise ValueError(f"rates {list(rates)} increase: unconditional ones cannot, k accepted tokens include k - 1")
    return 1 + sum(rates)


def expected_tokens_iid(acceptance: float, draft_tokens: int) -> float:
    """Tokens per step where every draft token is accepted with the same probability (arXiv 2211.17192)."""
    if acceptance == 1:
        return draft_tokens + 1.0
    return (1 - acceptance ** (draft_tokens + 1)) / (1 - acceptance)


def acceptance_iid(tokens_per_step: float, draft_tokens: int) -> float:
    """Find the independent acceptance that gives so many tokens per step."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if expected_tokens_iid(middle, draft_tokens) < tokens_per_step:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def speed_up_iid(acceptance: float, draft_tokens: int, draft_cost: float) -> float:
    """Speed-up by Leviathan et al.; `draft_cost` is a draft token's time over a target's step."""
    return expected_tokens_iid(acceptance, draft_tokens) / (draft_tokens * draft_cost + 1)


def line(points: Mapping[int, float]) -> tuple[float, float]:
    """Fit intercept and slope by least squares; a single point has slope 0."""
    x, y = list(points), list(points.values())
    if len(x) == 1:
        return y[0], 0.0
    slope, intercept = statistics.linear_regression(x, y)
    return intercept, slope


def between(points: Mapping[int, float], x: float) -> float:
    """Interpolate between neighbours; beyond the ends, on the line of the two nearest."""
    known = sorted(points)
    if len(known) == 1:
        return points[known[0]]
    right = min(max(next((i for i, k in enumerate(known) if k >= x), len(known) - 1), 1), len(known) - 1)
    a, b = known[right - 1], known[right]
    return points[a] + (points[b] - points[a]) * (x - a) / (b - a)


def fit(measured: Mapping[int, Components], draft_tokens: int) -> Components:
    """Say what a step with `draft_tokens` costs, from the parts measured at this K, or else at others.

    Args:
        measured: parts for each number of draft tokens; 0 is vanilla

    Raises:
        ValueError: no K above 0 among them.
    """
    if draft_tokens in measured:
        return measured[draft_tokens]
    drafted = {k: parts for k, parts in measured.items() if k}
    if not drafted:
        raise ValueError("a draft's cost needs at least one measured number of draft tokens")
    draft, draft_slope = line({k: parts.draft_ms for k, parts in drafted.items()})
    host, host_slope = line({k: parts.host_ms for k, parts in drafted.items()})
    return Components(
        draft_ms=draft + draft_slope * draft_tokens,
        verify_ms=between({k + 1: parts.verify_ms for k, parts in measured.items()}, draft_tokens + 1),
        sample_ms=between({k + 1: parts.sample_ms for k, parts in drafted.items()}, draft_tokens + 1),
        host_ms=host + host_slope * draft_tokens,
    )


def predict(measured: Mapping[int, Components], rates: Sequence[float], *, leave_out: bool = False) -> Prediction:
    """Predict the step with as many draft tokens as there are rates.

    Args:
        measured: parts for each number of draft tokens; 0 is vanilla and must be there
        leave_out: do without the parts that were measured at this very K

    Raises:
        ValueError: see `fit` and `expected_tokens`.
    """
    draft_tokens = len(rates)
    known = {k: parts for k, parts in measured.items() if not leave_out or k != draft_tokens}
    tokens, step, vanilla = expected_tokens(rates), fit(known, draft_tokens), measured[0].step_ms
    cost = step.draft_ms / draft_tokens / vanilla
    return Prediction(
        draft_tokens=draft_tokens,
        tokens_per_step=tokens,
        components=step,
        speed_up=tokens * vanilla / step.step_ms,
        worst_case=vanilla / step.step_ms,
        iid_speed_up=speed_up_iid(acceptance_iid(tokens, draft_tokens), draft_tokens, cost),
    )


def best(speed_ups: Mapping[int, float]) -> int | None:
    """Name the number of draft tokens that is fastest; 0 where none beats vanilla, None where there is nothing."""
    if not speed_ups:
        return None
    winner = max(speed_ups, key=lambda k: speed_ups[k])
    return winner if speed_ups[winner] > 1 else 0


def compare(
    measured: Mapping[int, Components], rates: Mapping[int, Sequence[float]], tokens_per_second: Mapping[int, float]
) -> list[dict[str, float | int | None]]:
    """Hold predictions against rounds without marks, one row for each K.

    Args:
        measured: parts from rounds with marks; 0 is vanilla
        rates: unconditional acceptance of each K's positions, of the rounds without marks
        tokens_per_second: of the rounds without marks; 0 is vanilla
    """
    rows = []
    for draft_tokens in sorted(k for k in tokens_per_second if k):
        found = tokens_per_second[draft_tokens] / tokens_per_second[0]
        prediction = predict(measured, rates[draft_tokens])
        others = {k for k in measured if k not in (0, draft_tokens)}
        blind = predict(measured, rates[draft_tokens], leave_out=True).speed_up if others else None
        parts = prediction.components
        rows.append(
            {
                "K": draft_tokens,
                "tokens_per_step": prediction.tokens_per_step,
                "draft_ms": parts.draft_ms,
                "verify_ms": parts.verify_ms,
                "sample_ms": parts.sample_ms,
                "host_ms": parts.host_ms,
                "predicted_speed_up": prediction.speed_up,
                "measured_speed_up": found,
                "relative_error": prediction.speed_up / found - 1,
                "left_out_speed_up": blind,
                "left_out_error": blind / found - 1 if blind is not None else None,
                "worst_case_speed_up": prediction.worst_case,
                "iid_speed_up": prediction.iid_speed_up,
            }
        )
    return rows
