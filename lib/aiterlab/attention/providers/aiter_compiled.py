# SPDX-License-Identifier: Apache-2.0
"""Provider `aiter`: AITER's compiled kernels (Composable Kernel, HIP templates, assembly), on ROCm GPUs only.

Called as vLLM's ROCM_AITER_FA backend calls them: `varlen` for prompts, `gather+varlen` for what has context (vLLM's
gather, then AITER's attention), `paged_v1` for decode from the NHD cache, `pa_asm` from the shuffled one.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from importlib.util import find_spec

import torch

from aiterlab import policy
from aiterlab.attention.inputs import Inputs
from aiterlab.attention.providers import place, vllm_triton
from aiterlab.attention.providers.provider import (
    ATTEND,
    TENSOR_FP8,
    TOKEN_HEAD,
    Implementation,
    Launch,
    Limits,
    Provider,
)
from aiterlab.attention.workloads import Workload
from aiterlab.policy import Answer

# vLLM selects the backend on CDNA 3 and later; the assembly kernels are built for these two.
ARCHITECTURES = ("gfx942", "gfx950")
PARTITION = 256  # keys per partition of paged_attention_v1: vLLM's _PARTITION_SIZE_ROCM


def facts() -> policy.Facts:
    """What is true of this machine, for `policy`."""
    where = place.current()
    return policy.Facts(
        rocm=where.platform == "rocm",
        library=find_spec("aiter") is not None,
        architecture=where.architecture,
        architecture_supported=where.architecture in ARCHITECTURES,
    )


def _available() -> Answer:
    if place.current().platform == "simulated":
        return Answer(False, "compiled kernels need the GPU; this machine is simulated")
    return policy.availability(facts())


def _preferred(switches: Mapping[str, str]) -> Answer:
    return policy.preference(facts(), switches, "mha")


def _varlen(inputs: Inputs, out: torch.Tensor) -> Launch:
    return _varlen_over(inputs, inputs.k, inputs.v, out)


def _varlen_over(inputs: Inputs, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> Launch:
    import aiter as library  # never under its own name, which is a builtin's

    known = {"min_seqlen_q": 1, "logits_soft_cap": inputs.softcap, "sink_ptr": None}
    taken = inspect.signature(library.flash_attn_varlen_func).parameters  # grew over AITER's releases
    return functools.partial(
        library.flash_attn_varlen_func,
        q=inputs.q,
        k=k,
        v=v,
        cu_seqlens_q=inputs.cu_seqlens_q,
        cu_seqlens_k=inputs.cu_seqlens_k,
        max_seqlen_q=inputs.max_seqlen_q,
        max_seqlen_k=inputs.max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=inputs.softmax_scale,
        causal=inputs.causal,
        window_size=inputs.window_size,
        alibi_slopes=inputs.alibi_slopes,
        out=out,
        **{name: value for name, value in known.items() if name in taken},
    )


def _gather_then_attend(inputs: Inputs, out: torch.Tensor) -> Launch:
    w = inputs.workload
    k, v = inputs.q.new_empty(2, sum(w.lengths), w.kv_heads, w.head_size)
    gather, attend = vllm_triton.gather_launch(inputs, (k, v)), _varlen_over(inputs, k, v, out)

    def launch() -> None:
        gather()
        attend()

    return launch


def _paged_v1(inputs: Inputs, out: torch.Tensor) -> Launch:
    import aiter as library  # noqa: F401  registers the operator

    w = inputs.workload
    partials = len(w.sequences) * w.heads * math.ceil(inputs.max_seqlen_k / PARTITION)
    workspace = torch.empty(
        partials * (w.head_size * inputs.q.element_size() + 2 * 4), dtype=torch.uint8, device=inputs.q.device
    )
    one = torch.ones(1, dtype=torch.float32, device=inputs.q.device)
    return functools.partial(
        torch.ops.aiter.paged_attention_v1,
        out,
        workspace,
        inputs.q,
        inputs.k_cache,
        inputs.v_cache,
        inputs.softmax_scale,
        inputs.block_table,
        inputs.cu_seqlens_q[:-1],
        inputs.seqused_k,
        inputs.max_seqlen_k,
        inputs.alibi_slopes,
        "auto" if w.kv_dtype == "auto" else "fp8",
        "NHD",
        inputs.softcap,
        one if inputs.k_descale is None else inputs.k_descale,
        one if inputs.v_descale is None else inputs.v_descale,
        None,
        PARTITION,
        1,
        w.window,
    )


def _pa_asm(inputs: Inputs, out: torch.Tensor) -> Launch:
    from aiter import pa_fwd_asm

    k_scale, v_scale = (_asm_scale(inputs, scale) for scale in (inputs.k_descale, inputs.v_descale))
    return functools.partial(
        pa_fwd_asm,
        Q=inputs.q,
        K=inputs.k_cache,
        V=inputs.v_cache,
        block_tables=inputs.block_table,
        context_lens=inputs.seqused_k,
        block_tables_stride0=inputs.block_table.stride(0),
        K_QScale=k_scale,
        V_QScale=v_scale,
        out_=out,
    )


def _asm_scale(inputs: Inputs, descale: torch.Tensor | None) -> torch.Tensor | None:
    """Scales in the assembly kernel's order: [blocks, H_kv, page]."""
    if descale is None:
        return None
    if descale.numel() == 1:
        w = inputs.workload
        return descale.expand(len(inputs.k_cache), w.kv_heads, w.page_size).contiguous()
    return descale.transpose(1, 2).contiguous()


def _native_fp8(w: Workload) -> str | None:
    """HIP kernels take the architecture's own float8, whatever torch calls the tensor."""
    native = "float8_e4m3fnuz" if place.current().architecture == "gfx942" else "float8_e4m3fn"
    if w.kv_dtype.startswith("float8") and w.kv_dtype != native:
        return f"no {w.kv_dtype} cache: on {place.current().architecture} its float8 is {native}"
    return None


_DTYPES = ("float16", "bfloat16")

AITER = Provider(
    "aiter",
    (
        Implementation(
            "aiter",
            "varlen",
            Limits(("prefill",), _DTYPES, layouts=("NHD", "SHUFFLE"), non_causal=True),
            _varlen,
            note="Composable Kernel or assembly, as AITER chooses; K and V of the prompt as the layer made them",
        ),
        Implementation(
            "aiter",
            "gather+varlen",
            Limits(ATTEND, _DTYPES, TENSOR_FP8, ("NHD", "SHUFFLE"), non_causal=True),
            _gather_then_attend,
            refuses=vllm_triton.gather_refuses,
            note="vLLM's gather, then AITER's attention; gathering included",
        ),
        Implementation(
            "aiter",
            "paged_v1",
            Limits(("decode",), _DTYPES, TENSOR_FP8, head_sizes=(64, 128, 256), page_sizes=(16, 32), largest_group=16),
            _paged_v1,
            refuses=_native_fp8,
            reads_whole_pages=True,
            note="workspace allocated beforehand",
        ),
        Implementation(
            "aiter",
            "pa_asm",
            Limits(
                ("decode",),
                _DTYPES,
                TENSOR_FP8 | TOKEN_HEAD | {("int8", "tensor")},
                ("SHUFFLE",),
                (128,),
                (16,),
                16,
                window=False,
                softcap=False,
                alibi=False,
            ),
            _pa_asm,
            refuses=_native_fp8,
            reads_whole_pages=True,
            note="assembly, one scale per token and head in a quantised cache",
        ),
    ),
    available=_available,
    preferred=_preferred,
)
