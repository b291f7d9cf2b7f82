# SPDX-License-Identifier: Apache-2.0
"""Where does the time of a decode step go: to the draft, to verification, to sampling, or to the host?

`install` puts a clock into a living engine. It wraps three methods of vLLM's model runner, which every version that is
supported here has (0.20 to 0.32; the CPU runner is derived from it):

    _model_forward            the target's forward pass: the verification of K + 1 tokens, or vanilla's one token
    _sample                   the sampler or the rejection sampler; what lies between the two is the logits
    propose_draft_token_ids   the draft: its preparation and its K passes

On a GPU marks are events on the engine's stream, outside of CUDA graphs, read after the run: nothing waits within a
step. Times are then those of the device's own line of time, from one forward pass to the next, so they stay right when
vLLM schedules a step ahead (async scheduling: vLLM's default on GPUs for EAGLE and vanilla, never on for n-gram or on
CPU). `host_ms` is the rest of that line: input preparation, scheduling, and all that the device waits for between the
parts. Waits within a part belong to it: a draft model launched from Python costs what it costs.

The newer "V2" model runner (`VLLM_USE_V2_MODEL_RUNNER`; off by default in 0.20, chosen by vLLM itself in later versions
on a GPU) has no such methods: set that variable to 0.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

PARTS = ("draft_ms", "verify_ms", "sample_ms", "host_ms")
_WRAPPED = ("execute_model", "_model_forward", "_sample", "propose_draft_token_ids")


@dataclass
class Step:
    """Marks of one step: device events, or seconds."""

    decode: bool  # no prompt among its sequences
    tokens: int  # query tokens
    sequences: int
    marks: dict[str, Any] = field(default_factory=dict)


class StepClock:
    """Marks the parts of every step while `enabled`, and says afterwards how long they took."""

    def __init__(self, on_device: bool, draft_tokens: int):
        self.enabled = False
        self._on_device = on_device
        self._draft_tokens = draft_tokens
        self._steps: list[Step] = []

    def reset(self) -> None:
        """Forget all steps."""
        self._steps = []

    def begin(self, scheduler_output) -> None:
        """Begin a step; called with what the scheduler decided for it."""
        scheduled = scheduler_output.num_scheduled_tokens
        if not self.enabled or not scheduled:
            return
        # A prompt's last piece may be as short as a verification; only the request's first step is surely a prompt's.
        short = max(scheduled.values()) <= self._draft_tokens + 1
        decode = short and not scheduler_output.scheduled_new_reqs
        self._steps.append(Step(decode, sum(scheduled.values()), len(scheduled)))

    def mark(self, name: str) -> None:
        """Note the time under this name, for the step under way."""
        if not self.enabled or not self._steps:
            return
        if self._on_device:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._steps[-1].marks[name] = now

    def steps(self, batch: int) -> list[dict[str, float]]:
        """Times in milliseconds of every decode step of the whole batch that another one follows."""
        if self._on_device and self._steps:
            torch.cuda.synchronize()
        pairs = zip(self._steps, self._steps[1:], strict=False)
        return [
            self._times(step, following)
            for step, following in pairs
            if step.decode and following.decode and step.sequences == following.sequences == batch
        ]

    def components(self, batch: int) -> dict[str, float | int | None]:
        """Median over these steps of each part and of the whole, in milliseconds; None where none was seen."""
        steps = self.steps(batch)
        names = ("step_ms", *PARTS)
        medians = {name: statistics.median(step[name] for step in steps) if steps else None for name in names}
        return medians | {"steps": len(steps)}

    def _times(self, step: Step, following: Step) -> dict[str, float]:
        marks = step.marks
        verify = self._between(marks["forward begins"], marks["forward ends"])
        sample = self._between(marks["forward ends"], marks["sample ends"])
        draft = self._between(marks["draft begins"], marks["draft ends"]) if "draft ends" in marks else 0.0
        whole = self._between(marks["forward begins"], following.marks["forward begins"])
        parts = dict(zip(PARTS, (draft, verify, sample, whole - draft - verify - sample), strict=True))
        return {"step_ms": whole, **parts}

    def _between(self, start, end) -> float:
        return start.elapsed_time(end) if self._on_device else (end - start) * 1e3


def install(llm) -> StepClock:
    """Put a clock, switched off, into a `vllm.LLM` whose engine core runs in this process.

    Raises:
        RuntimeError: the engine is in another process, or its runner is not one that can be measured.
    """
    runner = find_runner(llm)
    missing = [name for name in _WRAPPED if not hasattr(runner, name)]
    if missing:
        raise RuntimeError(
            f"{type(runner).__module__}.{type(runner).__name__} has no {missing[0]}: step times need vLLM's first "
            "model runner, set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    speculative = runner.vllm_config.speculative_config
    on_device = runner.device.type == "cuda"
    clock = StepClock(on_device, speculative.num_speculative_tokens if speculative else 0)
    execute_model = runner.execute_model

    def execute(scheduler_output, *arguments, **options):
        clock.begin(scheduler_output)
        return execute_model(scheduler_output, *arguments, **options)

    runner.execute_model = execute
    _wrap(runner, "_model_forward", clock, "forward begins", "forward ends")
    _wrap(runner, "_sample", clock, None, "sample ends")
    _wrap(runner, "propose_draft_token_ids", clock, "draft begins", "draft ends")
    return clock


def find_runner(llm):
    """Find the model runner behind a `vllm.LLM`.

    Raises:
        RuntimeError: the engine core is in another process.
    """
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None:
        raise RuntimeError("the engine core is in another process: set VLLM_ENABLE_V1_MULTIPROCESSING=0")
    worker = core.model_executor.driver_worker
    return getattr(worker, "worker", worker).model_runner


def _wrap(runner, name: str, clock: StepClock, before: str | None, after: str) -> None:
    method: Callable = getattr(runner, name)

    def marked(*arguments, **options):
        if not clock.enabled:
            return method(*arguments, **options)
        if before:
            clock.mark(before)
        result = method(*arguments, **options)
        clock.mark(after)
        return result

    setattr(runner, name, marked)
