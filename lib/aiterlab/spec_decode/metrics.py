# SPDX-License-Identifier: Apache-2.0
"""What does vLLM itself count of its drafts? Its `vllm:spec_decode_*` counters, as numbers that can be subtracted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest

_PREFIX = "vllm:spec_decode_num_"
_NAMES = ("drafts", "draft_tokens", "accepted_tokens")
_PER_POSITION = "accepted_tokens_per_pos"
# A line of a server's /metrics: vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 31.0
_SAMPLE = re.compile(rf"{_PREFIX}(\w+?)_total(?:\{{(.*)\}})? (\S+)")
_POSITION = re.compile(r'position="(\d+)"')


@dataclass(frozen=True)
class Counters:
    """vLLM's counters of speculative decoding: of a whole engine's life, or the difference over one call."""

    drafts: int = 0  # steps of one request that had draft tokens to verify
    draft_tokens: int = 0
    accepted_tokens: int = 0  # without the target's own (bonus) token
    accepted_per_position: tuple[int, ...] = ()  # drafts whose tokens up to this position were accepted

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per draft, the target's own included; None without drafts."""
        return 1 + self.accepted_tokens / self.drafts if self.drafts else None

    @property
    def per_position_rates(self) -> tuple[float, ...] | None:
        """Share of all drafts accepted up to each position (unconditional); None without drafts."""
        return tuple(accepted / self.drafts for accepted in self.accepted_per_position) if self.drafts else None

    def __sub__(self, other: Counters) -> Counters:
        return self._combined(other, -1)

    def __add__(self, other: Counters) -> Counters:
        return self._combined(other, 1)

    def __radd__(self, other) -> Counters:
        """Let `sum` start from 0."""
        return self if other == 0 else NotImplemented

    def _combined(self, other: Counters, sign: int) -> Counters:
        positions = zip_longest(self.accepted_per_position, other.accepted_per_position, fillvalue=0)
        return Counters(
            self.drafts + sign * other.drafts,
            self.draft_tokens + sign * other.draft_tokens,
            self.accepted_tokens + sign * other.accepted_tokens,
            tuple(mine + sign * theirs for mine, theirs in positions),
        )

    @classmethod
    def from_json(cls, values: Mapping) -> Counters:
        return cls(**values | {"accepted_per_position": tuple(values["accepted_per_position"])})


def from_metrics(metrics: Iterable) -> Counters:
    """Read what `vllm.LLM.get_metrics()` returns; engines of one process are added up."""
    totals = dict.fromkeys(_NAMES, 0)
    positions: tuple[int, ...] = ()
    for metric in metrics:
        name = metric.name.removeprefix(_PREFIX)
        if metric.name == f"{_PREFIX}{_PER_POSITION}":
            positions = tuple(a + b for a, b in zip_longest(positions, metric.values, fillvalue=0))
        elif metric.name.startswith(_PREFIX) and name in totals:
            totals[name] += metric.value
    return Counters(**{name: int(value) for name, value in totals.items()}, accepted_per_position=positions)


def from_prometheus(text: str) -> Counters:
    """Read what a server answers to GET /metrics; its engines are added up."""
    totals = dict.fromkeys(_NAMES, 0.0)
    positions: dict[int, float] = {}
    for line in text.splitlines():
        if not (sample := _SAMPLE.fullmatch(line.strip())):
            continue
        name, labels, value = sample.groups()
        if name == _PER_POSITION:
            position = int(_POSITION.search(labels)[1])
            positions[position] = positions.get(position, 0) + float(value)
        elif name in totals:
            totals[name] += float(value)
    return Counters(
        **{name: int(value) for name, value in totals.items()},
        accepted_per_position=tuple(int(positions.get(i, 0)) for i in range(max(positions, default=-1) + 1)),
    )
