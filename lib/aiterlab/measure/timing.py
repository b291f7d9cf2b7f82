# SPDX-License-Identifier: Apache-2.0
"""How long does an implementation take? One clock for all, and only for results that were checked.

On a GPU a sample is the time between two events around one replay of a CUDA graph (on ROCm: a HIP graph), which holds
all launches of one call. A Python launch costs more than most of these kernels, and an engine replays graphs too.

    in a sample      the graph's start on the GPU, every kernel, copy and memset of the call and the gaps between
                     them; the same for all. An empty graph's time is measured beside it, stated, and not subtracted
    not in a sample  Python, the launch from the host (the GPU is busy flushing meanwhile), whatever `prepare` did
                     once, and allocation (a graph keeps its memory)

Before each sample a buffer larger than the last-level cache is written and then read: what a call reads comes from
memory, and no dirty line is left whose way back to memory the call would pay. Calls go over several sets of inputs in
turn. Each round takes one sample of every implementation, in an order that turns with the round: a clock that drifts
drifts for all.

On a CPU a sample is the wall clock around a plain call, Python included: in Triton's interpreter a matter of patience,
not of speed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch

FLUSH_BYTES = 512 * 2**20  # twice the largest cache on the way to memory: MI300X's 256 MiB; H200's L2 is 50 MB
WARM_UP = 3  # calls before a capture, and replays before the first sample

METHODS = {"cuda": "CUDA graph replay between two events", "cpu": "wall clock of a plain call"}


@dataclass(frozen=True)
class Timing:
    """All samples of one implementation on one workload; without samples, why there are none."""

    workload: str
    provider: str
    implementation: str
    method: str  # one of METHODS
    samples_us: tuple[float, ...]
    overhead_us: float | None  # median of an empty graph, included in every sample; None on a CPU
    reason: str = ""

    def quantile_us(self, share: float) -> float | None:
        """The sample below which `share` of them lie; None without samples."""
        return float(np.quantile(self.samples_us, share)) if self.samples_us else None

    @property
    def median_us(self) -> float | None:
        return self.quantile_us(0.5)

    @property
    def p20_us(self) -> float | None:
        return self.quantile_us(0.2)

    @property
    def p80_us(self) -> float | None:
        return self.quantile_us(0.8)

    def row(self) -> dict:
        """Flat, for a record or a table."""
        samples = {"samples": len(self.samples_us), "samples_us": list(self.samples_us)}
        return asdict(self) | samples | {name: getattr(self, name) for name in ("median_us", "p20_us", "p80_us")}


class Stopwatch:
    """Times implementations on one device and keeps every sample, also those before an interruption.

    Attributes:
        timings: what was measured so far
        overhead_us: median of an empty graph between two events; None on a CPU
    """

    def __init__(self, device: torch.device | str, rounds: int | None = None, input_sets: int = 2) -> None:
        """Prepare a device.

        Args:
            rounds: samples per implementation; None: 100 on a GPU, 3 on a CPU
            input_sets: different tensors of one workload, used in turn
        """
        self.device = torch.device(device)
        self.rounds = rounds or (100 if self.device.type == "cuda" else 3)
        self.input_sets = input_sets
        self.timings: list[Timing] = []
        self._clock = _GraphClock(self.device) if self.device.type == "cuda" else _WallClock()
        self.overhead_us = self._clock.overhead_us(self.rounds)

    def measure(self, workload, checked: Sequence[tuple], seed: int = 0) -> list[Timing]:
        """Time implementations of one workload, round by round.

        Args:
            workload: an `attention.workloads` Workload
            checked: pairs of an Implementation and its `measure.checks` Check on this workload

        Returns:
            One Timing per pair, which `timings` keeps too. There are no samples, but a reason, where the check did not
            pass, the implementation is not one to be timed, or its launches cannot be captured.

        Raises:
            KeyboardInterrupt: interrupted; `timings` has the samples taken before.
        """
        reasons, calls = {}, {}
        samples: dict[int, list[float]] = {index: [] for index in range(len(checked))}
        start = len(self.timings)
        try:
            inputs = [workload.make(seed + i, self.device, poison=False) for i in range(self.input_sets)]
            for index, (implementation, check) in enumerate(checked):
                if not check:
                    reasons[index] = f"not timed, its check says {check.outcome}: {check.reason}"
                elif not implementation.timed:
                    reasons[index] = f"not timed: {implementation.note}"
                else:
                    try:
                        calls[index] = [self._clock.record(implementation, one) for one in inputs]
                    except Exception as error:
                        reasons[index] = (
                            f"not timed, {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                        )
            _interleave(self._clock, calls, self.rounds, samples)
        finally:
            for index, (implementation, _) in enumerate(checked):
                self.timings.append(
                    Timing(
                        workload.name,
                        implementation.provider,
                        implementation.name,
                        METHODS[self.device.type],
                        tuple(samples[index]),
                        self.overhead_us,
                        reasons.get(index, "" if samples[index] else "interrupted before its first sample"),
                    )
                )
            calls.clear()
            self._clock.release()
        return self.timings[start:]

    def frame(self) -> pd.DataFrame:
        """One row per Timing so far."""
        return pd.DataFrame([timing.row() for timing in self.timings])


def sample(calls: dict[str, Callable[[], object]], device: torch.device | str, rounds: int) -> dict[str, list[float]]:
    """Samples in microseconds of plain functions that launch work on `device`, taken as those of a Stopwatch."""
    device = torch.device(device)
    clock = _GraphClock(device) if device.type == "cuda" else _WallClock()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    _interleave(clock, {name: [clock.capture(call)] for name, call in calls.items()}, rounds, samples)
    return samples


def _interleave(clock, calls: dict, rounds: int, samples: dict) -> None:
    """One sample of every call in each round; an interruption keeps those that were taken."""
    for number in range(rounds):
        first = number % max(1, len(calls))
        pending = []
        try:
            for key in [*calls][first:] + [*calls][:first]:
                pending.append((key, clock.start(calls[key][number % len(calls[key])])))
        finally:
            for key, microseconds in clock.finish(pending):
                samples[key].append(microseconds)


class _WallClock:
    """Plain calls on a CPU."""

    def overhead_us(self, rounds: int) -> None:
        return None

    def record(self, implementation, inputs) -> Callable[[], object]:
        return implementation.prepare(inputs, _output(inputs))

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        return call

    def start(self, call: Callable[[], object]) -> float:
        before = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - before) / 1000

    def finish(self, pending: list) -> list:
        return pending

    def release(self) -> None:
        pass


@dataclass(frozen=True)
class _Replay:
    """A captured call, with what owns the memory that it works on: a graph knows addresses only."""

    graph: torch.cuda.CUDAGraph
    owners: tuple


class _GraphClock:
    """Graph replays on a GPU; only torch.cuda, which is HIP on ROCm."""

    def __init__(self, device: torch.device) -> None:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self.device = device
        self._flushed = torch.empty(max(FLUSH_BYTES, 4 * cache) // 4, dtype=torch.float32, device=device)

    def overhead_us(self, rounds: int) -> float:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*CUDA Graph is empty.*")
            empty = self.capture(lambda: None)
        return float(np.median([us for _, us in self.finish([(None, self.start(empty)) for _ in range(rounds)])]))

    def record(self, implementation, inputs) -> _Replay:
        """Capture a call, and make sure that a replay writes its whole output.

        Raises:
            RuntimeError: it cannot be captured, or a replay leaves numbers unwritten.
        """
        out = _output(inputs)
        replay = self.capture(implementation.prepare(inputs, out), out)
        parts = out if isinstance(out, tuple) else (out,)
        for part in parts:
            part.fill_(float("nan"))
        replay.graph.replay()
        if any(bool(part.isnan().any()) for part in parts):
            raise RuntimeError("a replay of its graph leaves numbers unwritten")
        return replay

    def capture(self, call: Callable[[], object], *owners) -> _Replay:
        here = torch.cuda.current_stream(self.device)
        side = torch.cuda.Stream(self.device)  # warm-up belongs on another stream than the legacy one
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                call()
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The outer context brings the stream back even when ending a failed capture raises.
        with torch.cuda.stream(here), torch.cuda.graph(graph):
            call()
        for _ in range(WARM_UP):
            graph.replay()
        torch.cuda.synchronize(self.device)
        return _Replay(graph, (call, *owners))

    def start(self, call: _Replay) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flushed.zero_()
        self._flushed.sum()
        before.record()
        call.graph.replay()
        after.record()
        return before, after

    def finish(self, pending: list) -> list:
        torch.cuda.synchronize(self.device)
        return [(key, 1000 * before.elapsed_time(after)) for key, (before, after) in pending]

    def release(self) -> None:
        torch.cuda.empty_cache()


def _output(inputs):
    """Where a launch writes: as q; of a gather, keys and values without pages."""
    w = inputs.workload
    if w.operation != "gather":
        return torch.empty_like(inputs.q)
    return tuple(inputs.q.new_empty(2, sum(w.lengths), w.kv_heads, w.head_size))
