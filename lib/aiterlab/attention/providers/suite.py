# SPDX-License-Identifier: Apache-2.0
"""Provider `suite`: this project's own Triton kernels, by the routes that attention can take through them.

The kernels are imported when a launch is prepared: Triton decides at their import whether it compiles or interprets.
"""

from __future__ import annotations

import functools

import torch

from aiterlab.attention.inputs import Inputs
from aiterlab.attention.providers import place
from aiterlab.attention.providers.provider import (
    ATTEND,
    TENSOR_FP8,
    TOKEN_HEAD,
    Implementation,
    Launch,
    Limits,
    Output,
    Provider,
)

_CACHES = {
    "quantised": TENSOR_FP8 | TOKEN_HEAD | {("int8", "tensor")},
    "layouts": ("NHD", "SHUFFLE"),
    "page_sizes": (16, 32, 64, 128),
}


def _paged(inputs: Inputs, out: torch.Tensor) -> Launch:
    from aiterlab.attention import paged

    return functools.partial(
        paged.attend,
        inputs.q,
        inputs.k_cache,
        inputs.v_cache,
        max_seqlen_q=inputs.max_seqlen_q,
        max_seqlen_k=inputs.max_seqlen_k,
        out=out,
        validate=False,  # it would wait for the device; the inputs were made right
        **inputs.paged,
        **inputs.options,
    )


def _varlen(inputs: Inputs, out: torch.Tensor) -> Launch:
    return _varlen_over(inputs, inputs.k, inputs.v, out)


def _varlen_over(inputs: Inputs, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> Launch:
    from aiterlab.attention import varlen

    return functools.partial(
        varlen.attend,
        inputs.q,
        k,
        v,
        cu_seqlens_q=inputs.cu_seqlens_q,
        cu_seqlens_k=inputs.cu_seqlens_k,
        max_seqlen_q=inputs.max_seqlen_q,
        max_seqlen_k=inputs.max_seqlen_k,
        out=out,
        validate=False,
        **inputs.options,
    )


def _gather(inputs: Inputs, out: Output) -> Launch:
    from aiterlab.attention import gather

    return functools.partial(
        gather.gather,
        inputs.k_cache,
        inputs.v_cache,
        block_table=inputs.block_table,
        cu_seqlens_k=inputs.cu_seqlens_k,
        total_tokens=sum(inputs.workload.lengths),
        k_descale=inputs.k_descale,
        v_descale=inputs.v_descale,
        layout=inputs.layout,
        dtype=inputs.q.dtype,
        out=out,
        validate=False,
    )


def _gather_then_attend(inputs: Inputs, out: torch.Tensor) -> Launch:
    w = inputs.workload
    k, v = inputs.q.new_empty(2, sum(w.lengths), w.kv_heads, w.head_size)
    first, second = _gather(inputs, (k, v)), _varlen_over(inputs, k, v, out)

    def launch() -> None:
        first()
        second()

    return launch


SUITE = Provider(
    "suite",
    (
        Implementation("suite", "paged", Limits(non_causal=True, **_CACHES), _paged, triton=True),
        Implementation(
            "suite",
            "gather+varlen",
            Limits(ATTEND, non_causal=True, **_CACHES),
            _gather_then_attend,
            triton=True,
            note="gathering included",
        ),
        Implementation(
            "suite",
            "varlen",
            Limits(("prefill",), layouts=_CACHES["layouts"], non_causal=True),
            _varlen,
            triton=True,
            note="K and V of the prompt as the layer made them",
        ),
        Implementation("suite", "gather", Limits(("gather",), **_CACHES), _gather, triton=True),
    ),
    available=place.triton_runs,
)
