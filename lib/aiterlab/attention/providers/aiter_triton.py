# SPDX-License-Identifier: Apache-2.0
"""Provider `aiter_triton`: AITER's Triton kernels, on ROCm as they are, elsewhere with what `machines` stands in.

`unified` is what vLLM's ROCM_AITER_UNIFIED_ATTN backend calls, and ROCM_AITER_FA for steps of several tokens per
sequence. `paged_decode` and `varlen` are AITER's own, tuned as AITER tunes them for the architecture.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.util import find_spec

import torch

from aiterlab import policy
from aiterlab.attention.inputs import Inputs
from aiterlab.attention.providers import aiter_compiled, place
from aiterlab.attention.providers.provider import (
    TENSOR_FP8,
    Implementation,
    Launch,
    Limits,
    Provider,
    deliver,
    third_party,
)
from aiterlab.machines import aiter_on_cuda
from aiterlab.policy import Answer


def _available() -> Answer:
    if find_spec("aiter") is None:
        return Answer(False, "the library is not installed")
    platform = place.current().platform
    if platform == "cpu":
        return Answer(False, "AITER cannot be imported without a ROCm machine; enter a simulated one")
    if platform == "cuda" and not aiter_on_cuda.installed():
        return Answer(False, "on NVIDIA it needs stand-ins that this process has not entered with")
    return place.triton_runs()


def _preferred(switches: Mapping[str, str]) -> Answer:
    """vLLM's switch for AITER speaks of ROCm; elsewhere nothing speaks against it."""
    if place.current().platform != "rocm":
        return Answer(True, "available")
    return policy.preference(aiter_compiled.facts(), switches)


def _varlen(inputs: Inputs, out: torch.Tensor) -> Launch:
    from aiter.ops.triton.mha import flash_attn_varlen_func

    slopes = inputs.alibi_slopes
    call = functools.partial(
        flash_attn_varlen_func,
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        inputs.max_seqlen_q,
        inputs.max_seqlen_k,
        softmax_scale=inputs.softmax_scale,
        causal=inputs.causal,
        alibi_slopes=None if slopes is None else slopes.expand(len(inputs.seqused_k), -1).contiguous(),
    )
    return lambda: deliver(out, call())  # it has a parameter `out`, and ignores it


def _unified(inputs: Inputs, out: torch.Tensor) -> Launch:
    from aiter.ops.triton.unified_attention import unified_attention

    return functools.partial(
        unified_attention,
        out=out,
        k_descale=inputs.k_descale,
        v_descale=inputs.v_descale,
        **inputs.unified,
    )


def _paged_decode(inputs: Inputs, out: torch.Tensor) -> Launch:
    import triton.language as tl
    from aiter.ops.triton.pa_decode import paged_attention_decode

    one = torch.ones(1)
    # Scales go as numbers to the kernel: from host memory, because a launch must not wait for the device.
    k_scale, v_scale = (one if scale is None else scale.cpu() for scale in (inputs.k_descale, inputs.v_descale))
    return functools.partial(
        paged_attention_decode,
        out,
        inputs.q,
        inputs.k_cache.transpose(1, 2),  # [blocks, H_kv, page, D], by its strides
        inputs.v_cache.transpose(1, 2),
        inputs.seqused_k,
        inputs.block_table,
        inputs.softmax_scale,
        inputs.max_seqlen_k,
        getattr(tl, inputs.workload.dtype),
        k_scale,
        v_scale,
        alibi_slopes=inputs.alibi_slopes,
    )


_DTYPES = ("float16", "bfloat16")

AITER_TRITON = Provider(
    "aiter_triton",
    (
        Implementation(
            "aiter_triton",
            "unified",
            Limits(dtypes=_DTYPES, quantised=TENSOR_FP8),
            _unified,
            triton=True,
            refuses=third_party,
            reads_whole_pages=True,
            note="allocates its split-KV scratch in every call",
        ),
        Implementation(
            "aiter_triton",
            "paged_decode",
            Limits(("decode",), _DTYPES, quantised=TENSOR_FP8, window=False, softcap=False),
            _paged_decode,
            triton=True,
            refuses=third_party,
            note="allocates its split-KV scratch in every call",
        ),
        Implementation(
            "aiter_triton",
            "varlen",
            Limits(("prefill",), _DTYPES, layouts=("NHD", "SHUFFLE"), window=False, softcap=False, non_causal=True),
            _varlen,
            triton=True,
            note="K and V of the prompt as the layer made them; allocates and zeroes its output",
        ),
    ),
    available=_available,
    preferred=_preferred,
)
