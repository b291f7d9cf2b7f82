# SPDX-License-Identifier: Apache-2.0
"""Does an attention implementation give the right numbers? No time of it is taken before this has said yes.

The output is filled with NaN before each launch, and so are rows in front of and behind it: what was not written, or
was written elsewhere, shows. Each row of the output is held against float64 with a limit of its own (see
`attention/reference.py`), because a row that sees one key is a hundred times larger than one that sees 10,000. Every
check launches twice: what a first launch leaves behind must not change the second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from aiterlab.policy import Answer

GUARD = 16  # rows in front of the output and behind it
NAN = float("nan")
CHUNK = 2**15  # rows compared at a time


@dataclass(frozen=True)
class Deviation:
    """How far numbers are from float64."""

    largest: float  # largest error; inf where a number is none
    tolerance: float  # limit of the row that has it
    ratio: float  # largest of error / limit over the rows; right up to 1

    def __or__(self, other: Deviation) -> Deviation:
        """The worse of both, number by number."""
        worst = max(self, other, key=lambda one: one.largest)
        return Deviation(worst.largest, worst.tolerance, max(self.ratio, other.ratio))


@dataclass(frozen=True)
class Check:
    """One implementation's answer to one workload. Errors are None where there is no number: refused, failed, NaN."""

    outcome: str  # ok | wrong | refused: it does not claim this | failed: it raised
    reason: str
    max_abs_error: float | None = None  # largest of the output
    tolerance: float | None = None  # limit of the row that has it
    error_over_tolerance: float | None = None  # largest over all rows, each with its own limit; right up to 1
    lse_error: float | None = None  # the same of the log-sum-exp; None where the implementation returns none
    lse_tolerance: float | None = None
    lse_error_over_tolerance: float | None = None

    def __bool__(self) -> bool:
        return self.outcome == "ok"


def believable(dtype: str) -> Answer:
    """May one believe what Triton kernels compute from inputs of this dtype in this process?"""
    from triton import knobs

    if knobs.runtime.interpret and dtype == "bfloat16":
        return Answer(False, "Triton's interpreter computes bf16 dot products wrongly, without a word")
    return Answer(True, "Triton computes it")


def check(implementation, inputs) -> Check:
    """Launch an implementation on `inputs` and compare what it wrote with the reference.

    Args:
        implementation: an `attention.providers` Implementation: `supports(workload)`, `prepare(inputs, out)`,
            `triton`, `returns_lse`: then its launch returns the output and the log-sum-exp [H, T]
        inputs: an `attention.inputs` Inputs

    Returns:
        A Check; an exception of the implementation is its outcome `failed`.
    """
    workload = inputs.workload
    if not (answer := implementation.supports(workload)):
        return Check("refused", answer.reason)
    if implementation.triton and not (answer := believable(workload.dtype)):
        return Check("refused", answer.reason)
    if workload.operation == "gather":
        expected, limits = _gathered(inputs)
        expected_lse = None
    else:
        (output, lse), (output_limit, lse_limit) = inputs.expected(), inputs.limits()
        expected, limits, expected_lse = (output,), (output_limit,), (lse, lse_limit)
    try:
        found, found_lse, outside = _launch_twice(implementation, inputs, expected, limits, expected_lse)
    except Exception as exception:
        return Check("failed", f"{type(exception).__name__}: {str(exception).strip().partition(chr(10))[0]}")
    return _judge(found, found_lse, outside)


def deviation(output: torch.Tensor, expected: torch.Tensor, limit: torch.Tensor) -> Deviation:
    """Compare numbers, row by row; equal infinities agree, NaN agrees with nothing.

    Args:
        output, expected: [..., D]
        limit: [...], the largest error allowed in each row

    Raises:
        ValueError: the shapes differ.
    """
    if output.shape != expected.shape:
        raise ValueError(f"the result has shape {tuple(output.shape)}, not {tuple(expected.shape)}")
    worst = Deviation(0.0, 0.0, 0.0)
    for some, right, allowed in zip(output.split(CHUNK), expected.split(CHUNK), limit.split(CHUNK), strict=True):
        if not some.numel():
            continue
        error = (some.double() - right.double()).abs().masked_fill(some == right, 0)
        error = error.amax(dim=-1).nan_to_num(nan=math.inf, posinf=math.inf).flatten()
        allowed = allowed.double().flatten()
        ratio = torch.where(error == 0, 0.0, error / allowed)  # the limit may be 0: then so must the error
        row = int(error.argmax())
        worst |= Deviation(
            error[row].item(), allowed[row].item(), ratio.nan_to_num(nan=math.inf, posinf=math.inf).max().item()
        )
    return worst


def _gathered(inputs) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """What a gather must give: the cache's own numbers, or, dequantised, within one rounding of their dtype."""
    rounding = 0.0 if inputs.workload.kv_dtype == "auto" else torch.finfo(inputs.q.dtype).eps
    expected = inputs.k, inputs.v
    return expected, tuple(rounding * part.abs().amax(dim=-1).float() for part in expected)


def _launch_twice(implementation, inputs, expected, limits, expected_lse):
    """Deviations of the output and, where there is one, of the lse; whether a launch wrote outside of its output."""
    buffers = [
        torch.empty(len(part) + 2 * GUARD, *part.shape[1:], dtype=inputs.q.dtype, device=inputs.q.device)
        for part in expected
    ]
    outputs = [buffer[GUARD : len(buffer) - GUARD] for buffer in buffers]
    launch = implementation.prepare(inputs, outputs[0] if len(outputs) == 1 else tuple(outputs))
    found, found_lse, outside, kept = Deviation(0.0, 0.0, 0.0), None, False, []
    for _ in range(2):
        for tensor in (*buffers, *outputs, *kept):  # an output may have become another tensor: see Implementation
            tensor.fill_(NAN)
        returned = launch()
        if inputs.q.is_cuda:
            torch.cuda.synchronize(inputs.q.device)
        for part, right, limit in zip(outputs, expected, limits, strict=True):
            found |= deviation(part, right, limit)
        if getattr(implementation, "returns_lse", False):
            lse = returned[1]
            kept.append(lse)  # its memory must not become the second launch's, which would find the right numbers there
            seen = deviation(lse[..., None], expected_lse[0][..., None], expected_lse[1])
            found_lse = found_lse | seen if found_lse else seen
        outside |= not all(edge.isnan().all() for buffer in buffers for edge in (buffer[:GUARD], buffer[-GUARD:]))
    return found, found_lse, outside


def _judge(found: Deviation, found_lse: Deviation | None, outside: bool) -> Check:
    faults = []
    for name, one in (("output", found), ("lse", found_lse)):
        if one is None or one.ratio <= 1:
            continue
        if math.isfinite(one.largest) and one.tolerance == 0:
            faults.append(f"the {name} differs from numbers that it must equal")
        elif math.isfinite(one.largest):
            faults.append(f"a row of the {name} misses float64 by {one.ratio:.3g} times its limit")
        else:
            faults.append(f"the {name} has numbers that were not written or are not finite")
    if outside:
        faults.append("it wrote outside of its output")
    lse = (None, None, None) if found_lse is None else _numbers(found_lse)
    outcome, reason = ("wrong", "; ".join(faults)) if faults else ("ok", "within the limit of every row")
    return Check(outcome, reason, *_numbers(found), *lse)


def _numbers(one: Deviation) -> tuple[float | None, ...]:
    return tuple(number if math.isfinite(number) else None for number in (one.largest, one.tolerance, one.ratio))
