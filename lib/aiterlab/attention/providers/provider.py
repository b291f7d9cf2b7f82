# SPDX-License-Identifier: Apache-2.0
"""What is a provider: somebody's implementations of the attention operations, and what each of them can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from aiterlab.attention.inputs import Inputs
from aiterlab.attention.providers import place
from aiterlab.attention.workloads import Workload
from aiterlab.policy import Answer, Candidate

ATTEND = ("prefill", "extend", "decode", "verify")
FP8 = ("float8_e4m3fn", "float8_e4m3fnuz")
TENSOR_FP8 = frozenset((dtype, "tensor") for dtype in FP8)
TOKEN_HEAD = frozenset((dtype, "token_head") for dtype in (*FP8, "int8"))

Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # [T, H, D]; of a gather: k and v [keys, H_kv, D]
Launch = Callable[[], None]


@dataclass(frozen=True)
class Limits:
    """What an implementation can do, beyond which it is not asked. Empty tuples: no limit."""

    operations: tuple[str, ...] = ATTEND
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32")
    quantised: frozenset[tuple[str, str]] = frozenset()  # (kv_dtype, scales) of the caches that it reads
    layouts: tuple[str, ...] = ("NHD",)
    head_sizes: tuple[int, ...] = ()
    page_sizes: tuple[int, ...] = ()
    largest_group: int | None = None  # query heads per KV head
    window: bool = True
    softcap: bool = True
    alibi: bool = True
    non_causal: bool = False

    def refusal(self, w: Workload) -> str | None:
        """The first reason against a workload."""
        one_of = {
            "operation": (w.operation, self.operations),
            "dtype": (w.dtype, self.dtypes),
            "layout": (w.layout, self.layouts),
            "head size": (w.head_size, self.head_sizes),
            "page size": (w.page_size, self.page_sizes),
        }
        for what, (value, allowed) in one_of.items():
            if allowed and value not in allowed:
                return f"{what} {value}: it has {', '.join(map(str, allowed))}"
        if w.kv_dtype != "auto" and (w.kv_dtype, w.scales) not in self.quantised:
            return f"no {w.kv_dtype} cache with a scale per {w.scales.replace('_', ' and ')}"
        if self.largest_group and w.heads // w.kv_heads > self.largest_group:
            return f"{w.heads // w.kv_heads} query heads per KV head: it has up to {self.largest_group}"
        options = {
            "sliding window": (w.window, self.window),
            "soft cap": (w.softcap, self.softcap),
            "ALiBi": (w.alibi, self.alibi),
            "attention that is not causal": (not w.causal and w.operation != "gather", self.non_causal),
        }
        return next((f"no {what}" for what, (asked, has) in options.items() if asked and not has), None)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation."""

    provider: str
    name: str
    limits: Limits
    launcher: Callable[[Inputs, Output], Launch]
    triton: bool = False  # computed by Triton kernels
    refuses: Callable[[Workload], str | None] = lambda workload: None  # what Limits cannot say
    # It may multiply what lies behind a sequence's end in its last page by zero, which only finite numbers survive. A
    # new cache of vLLM's holds zeros: check it on inputs made with `poison=False`.
    reads_whole_pages: bool = False
    note: str = ""  # what its time does not include, or includes beyond the others'
    timed: bool = True  # False: it waits for the device or is no kernel, so no latency of it means anything

    @property
    def label(self) -> str:
        return f"{self.provider} {self.name}"

    def supports(self, workload: Workload) -> Answer:
        """Can it compute this workload in this process? Does not ask whether its provider is available."""
        if reason := self.limits.refusal(workload) or self._place(workload) or self.refuses(workload):
            return Answer(False, reason)
        return Answer(True, "supported")

    def prepare(self, inputs: Inputs, out: Output) -> Launch:
        """Do once what a model does ahead of its layers (buffers, schedules); return what a layer does.

        The launch writes to `out`, and can be captured in a CUDA graph. Where a library returns a tensor of its own,
        `out` becomes that tensor: `out.set_`, so that no copy is timed that the library does not make.
        """
        return self.launcher(inputs, out)

    def _place(self, w: Workload) -> str | None:
        if not self.triton:
            return None
        where = place.current()
        if where.interpreted and w.dtype == "bfloat16":
            return "Triton's interpreter computes bf16 dot products wrongly; use float16"
        return None


@dataclass(frozen=True)
class Provider:
    """Somebody's implementations, and whether they can and should be used here."""

    name: str
    implementations: tuple[Implementation, ...]
    available: Callable[[], Answer]  # reads no switch
    preferred: Callable[[Mapping[str, str]], Answer] | None = None  # of the environment variables; None: if available

    def candidate(self, switches: Mapping[str, str]) -> Candidate:
        """Both answers about it, for `policy.selection`."""
        available = self.available()
        preferred = self.preferred(switches) if available and self.preferred else available
        return Candidate(self.name, available, preferred)


def third_party(workload: Workload) -> str | None:
    """What Triton kernels written for vLLM's requests cannot take."""
    if any(new and context < 0 for context, new in workload.sequences):
        return "no sequences with fewer keys than queries: vLLM makes none"
    if workload.kv_dtype == "float8_e4m3fnuz" and place.current().platform != "rocm":
        return "Triton has no float8_e4m3fnuz on NVIDIA GPUs and in its interpreter"
    return None


def deliver(out: torch.Tensor, result: torch.Tensor) -> None:
    """Make `out` the tensor that a library allocated itself; copy where its memory is in another order."""
    if result.dtype == out.dtype and result.is_contiguous():
        out.set_(result)
    else:
        out.copy_(result)
