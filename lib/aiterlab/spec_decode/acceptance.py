# SPDX-License-Identifier: Apache-2.0
"""How many tokens does a step give? Acceptance by method, number of draft tokens, task and temperature.

    acceptance length     tokens per step, the target's own (bonus) token included: 1 + accepted / drafts, 1 to K + 1
    rate at a position    share of all drafts of which the tokens up to this position were accepted (vLLM's convention:
                          unconditional, so that acceptance length = 1 + the sum of the rates)
    conditional rate      the same among the drafts accepted up to the position before

Two countings are held against each other: vLLM's counters, which count what the verifier accepted, and the tokens that
each step really gave. They differ by what the end of a request cut off (`max_tokens`, or a stop token amid the draft),
at most K tokens per request; anything else is a fault of one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from aiterlab.spec_decode.engine import Generation

RESAMPLES = 2000
LEVEL = 0.95
LEAST_REQUESTS = 5  # fewer say too little about how requests differ


@dataclass(frozen=True)
class Acceptance:
    """What one method accepted in one task at one temperature."""

    method: str
    draft_tokens: int  # K
    task: str
    temperature: float
    requests: int
    drafts: int
    drafted: int
    accepted: int
    per_position: tuple[int, ...]
    steps_by_tokens: tuple[int, ...]  # steps that gave 1, 2, … K + 1 tokens
    length_low: float | None
    length_high: float | None
    reason: str  # why there is no interval; empty if there is one

    @property
    def length(self) -> float | None:
        return 1 + self.accepted / self.drafts if self.drafts else None

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted share of the draft tokens."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def rates(self) -> tuple[float, ...] | None:
        return tuple(count / self.drafts for count in self.per_position) if self.drafts else None

    @property
    def conditional_rates(self) -> tuple[float | None, ...] | None:
        return conditional(self.drafts, self.per_position) if self.drafts else None

    @property
    def steps(self) -> int:
        return sum(self.steps_by_tokens)

    @property
    def tokens_per_step(self) -> float | None:
        """Mean of the histogram: what was kept, the ends of requests and steps without a draft included."""
        tokens = sum(number * steps for number, steps in enumerate(self.steps_by_tokens, 1))
        return tokens / self.steps if self.steps else None

    @property
    def cut_tokens(self) -> int:
        """Accepted tokens that no request kept: the counters' less the histogram's."""
        kept = sum(number * steps for number, steps in enumerate(self.steps_by_tokens))
        return self.accepted - kept

    @property
    def disagreement(self) -> str:
        """Say how the counters and the histogram contradict each other; empty if they do not."""
        if self.drafts > self.steps:
            return f"{self.drafts} drafts counted, but only {self.steps} steps seen"
        if self.accepted != sum(self.per_position):
            return f"{self.accepted} tokens accepted, but {sum(self.per_position)} over all positions"
        most = self.draft_tokens * self.requests
        if not 0 <= self.cut_tokens <= most:
            return (
                f"{self.accepted} tokens accepted and {self.accepted - self.cut_tokens} given beyond one per step; "
                f"ends of requests explain 0 to {most} of the difference"
            )
        return ""

    def row(self) -> dict:
        """Flat, for a record, a table or a figure."""
        return {
            "method": self.method,
            "draft_tokens": self.draft_tokens,
            "task": self.task,
            "temperature": self.temperature,
            "requests": self.requests,
            "drafts": self.drafts,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_length": self.length,
            "acceptance_length_low": self.length_low,
            "acceptance_length_high": self.length_high,
            "acceptance_rate": self.acceptance_rate,
            "accepted_per_position": list(self.per_position),
            "rates": _listed(self.rates),
            "conditional_rates": _listed(self.conditional_rates),
            "steps": self.steps,
            "steps_by_tokens": list(self.steps_by_tokens),
            "tokens_per_step": self.tokens_per_step,
            "cut_tokens": self.cut_tokens,
            "reason": self.reason,
            "disagreement": self.disagreement,
        }


def measure(
    generation: Generation, *, method: str, draft_tokens: int, task: str, temperature: float, seed: int = 0
) -> Acceptance:
    """Read acceptance from one `generate` call, which must hold requests of one task alone."""
    counters = generation.counters
    low, high, reason = interval([getattr(one, "accepted_lengths", ()) for one in generation.outputs], seed=seed)
    found = Acceptance(
        method=method,
        draft_tokens=draft_tokens,
        task=task,
        temperature=temperature,
        requests=len(generation.outputs),
        drafts=counters.drafts,
        drafted=counters.draft_tokens,
        accepted=counters.accepted_tokens,
        per_position=tuple(counters.accepted_per_position),
        steps_by_tokens=histogram(generation.accepted_lengths, draft_tokens),
        length_low=None,
        length_high=None,
        reason=reason,
    )
    if low is None or found.length is None:
        return replace(found, reason=reason or "no draft was made")
    return replace(found, length_low=_per_draft(found, low), length_high=_per_draft(found, high))


def _per_draft(found: Acceptance, tokens_per_step: float) -> float:
    """Turn tokens per step into an acceptance length: nothing cut off, and steps without a draft left out."""
    beyond = found.tokens_per_step - 1
    return 1 + (tokens_per_step - 1) * (found.length - 1) / beyond if beyond else found.length


def conditional(drafts: int, per_position: Sequence[int]) -> tuple[float | None, ...]:
    """Return each position's rate among the drafts that were accepted so far; None where there were none."""
    reached = (drafts, *per_position)
    return tuple(here / before if before else None for before, here in zip(reached, per_position, strict=False))


def histogram(lengths: Iterable[int], draft_tokens: int) -> tuple[int, ...]:
    """Count the steps that gave 1, 2, … K + 1 tokens; another number is refused."""
    lengths = list(lengths)
    if odd := [length for length in lengths if not 1 <= length <= draft_tokens + 1]:
        raise ValueError(
            f"a step gave {odd[0]} tokens; with {draft_tokens} draft tokens it gives 1 to {draft_tokens + 1}"
        )
    return tuple(lengths.count(tokens) for tokens in range(1, draft_tokens + 2))


def interval(lengths: Sequence[Sequence[int]], *, seed: int = 0) -> tuple[float | None, float | None, str]:
    """Return the 95 % interval of the mean tokens per step, or why there is none.

    Whole requests are drawn again (bootstrap): steps of one request are alike, and taking them for independent would
    make the interval too narrow.
    """
    kept = [one for one in lengths if len(one)]
    if len(kept) < LEAST_REQUESTS:
        return None, None, f"{len(kept)} requests with steps, at least {LEAST_REQUESTS} needed"
    tokens, steps = np.array([(sum(one), len(one)) for one in kept], dtype=float).T
    drawn = np.random.default_rng(seed).integers(len(kept), size=(RESAMPLES, len(kept)))
    means = tokens[drawn].sum(1) / steps[drawn].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high), ""


def _listed(rates: Sequence[float | None] | None) -> list[float | None] | None:
    return None if rates is None else list(rates)
