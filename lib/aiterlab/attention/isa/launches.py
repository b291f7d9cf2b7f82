# SPDX-License-Identifier: Apache-2.0
"""Whose kernels are compiled for a workload, and how each launcher is called.

The launchers are the real ones: what they compile is what they chose for the architecture that the driver names. The
tensors lie on torch's meta device, so they have shapes, strides and sizes, and no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from aiterlab.attention import layouts
from aiterlab.attention.inputs import Inputs
from aiterlab.attention.workloads import Workload

PROVIDERS = ("suite", "aiter_triton", "vllm_triton")

# A served model's cache has many GiB. Triton addresses tensors below 2 GiB by 32-bit offsets, which is other code, so
# a cache is never made smaller than that.
CACHE_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class Launch:
    """One call of one launcher; it compiles one kernel or several."""

    provider: str  # suite, aiter_triton or vllm_triton
    name: str  # which of the provider's ways: paged, varlen, unified, paged_decode or gather
    workload: Workload

    def call(self) -> None:
        """Call the launcher, in a process where a launch only compiles (see child.py)."""
        _CALLS[self.provider, self.name](shapes(self.workload))


def launches_of(workload: Workload, providers: tuple[str, ...] = PROVIDERS) -> list[Launch]:
    """The launchers that vLLM on ROCm, or this suite in its place, could call for `workload`."""
    attention = {
        "prefill": ("varlen", "paged", "unified"),
        "decode": ("paged", "paged_decode", "unified"),
        "gather": ("gather",),
    }
    names = attention.get(workload.operation, ("paged", "unified"))
    return [Launch(p, name, workload) for name in names for p in providers if (p, name) in _CALLS]


def shapes(workload: Workload) -> Inputs:
    """Make the inputs of `workload` on the meta device."""
    w = workload
    dtype = getattr(torch, w.dtype)
    kv_dtype = dtype if w.kv_dtype == "auto" else getattr(torch, w.kv_dtype)
    pages = max(-(-length // w.page_size) for length in w.lengths)
    blocks = max(pages * len(w.sequences), CACHE_BYTES // (w.page_size * w.kv_heads * w.head_size * kv_dtype.itemsize))
    k_shape, v_shape = layouts.shapes(w.layout, blocks, w.page_size, w.kv_heads, w.head_size, kv_dtype.itemsize)
    descale = None
    if w.kv_dtype != "auto":
        descale = _meta(*((1,) if w.scales == "tensor" else (blocks, w.page_size, w.kv_heads)), dtype=torch.float32)
    made = Inputs(
        workload=w,
        q=_meta(w.tokens, w.heads, w.head_size, dtype=dtype),
        k_cache=_meta(*k_shape, dtype=kv_dtype),
        v_cache=_meta(*v_shape, dtype=kv_dtype),
        block_table=_meta(len(w.sequences), pages),
        cu_seqlens_q=_meta(len(w.sequences) + 1),
        cu_seqlens_k=_meta(len(w.sequences) + 1),
        seqused_k=_meta(len(w.sequences)),
        max_seqlen_q=max(new for _, new in w.sequences),
        max_seqlen_k=max(w.lengths),
        softmax_scale=w.head_size**-0.5,
        causal=w.causal,
        window_size=w.window_size,
        softcap=w.softcap,
        alibi_slopes=_meta(w.heads, dtype=torch.float32) if w.alibi else None,
        k_descale=descale,
        v_descale=descale,
        layout=w.layout,
    )
    made.k, made.v = (_meta(sum(w.lengths), w.kv_heads, w.head_size, dtype=dtype) for _ in range(2))
    return made


def _meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _suite_paged(x: Inputs) -> None:
    from aiterlab.attention import paged

    paged.attend(
        x.q, x.k_cache, x.v_cache, **x.paged, **x.options, max_seqlen_q=x.max_seqlen_q, max_seqlen_k=x.max_seqlen_k,
        validate=False,
    )  # fmt: skip


def _suite_varlen(x: Inputs) -> None:
    from aiterlab.attention import varlen

    varlen.attend(
        x.q, x.k, x.v, cu_seqlens_q=x.cu_seqlens_q, cu_seqlens_k=x.cu_seqlens_k, max_seqlen_q=x.max_seqlen_q,
        max_seqlen_k=x.max_seqlen_k, **x.options, return_lse=True, validate=False,
    )  # fmt: skip


def _suite_gather(x: Inputs) -> None:
    from aiterlab.attention import gather

    gather.gather(
        x.k_cache, x.v_cache, block_table=x.block_table, cu_seqlens_k=x.cu_seqlens_k, total_tokens=len(x.k),
        k_descale=x.k_descale, v_descale=x.v_descale, layout=x.layout, dtype=x.q.dtype, validate=False,
    )  # fmt: skip


def _aiter_varlen(x: Inputs) -> None:
    from aiter.ops.triton.mha import flash_attn_varlen_func

    flash_attn_varlen_func(
        x.q, x.k, x.v, x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k, softmax_scale=x.softmax_scale,
        causal=x.causal, window_size=x.window_size, alibi_slopes=x.alibi_slopes, return_lse=True,
    )  # fmt: skip


def _aiter_unified(x: Inputs) -> None:
    from aiter.ops.triton.unified_attention import unified_attention

    unified_attention(**_unified(x))


def _aiter_paged_decode(x: Inputs) -> None:
    import triton.language as tl
    from aiter.ops.triton.pa_decode import paged_attention_decode

    blocks, page, kv_heads, head_size = x.k_cache.shape
    cache = _meta(blocks, kv_heads, page, head_size, dtype=x.k_cache.dtype)  # its own layout: heads before the page
    scale = torch.ones(1)  # read on the host
    paged_attention_decode(
        torch.empty_like(x.q), x.q, cache, cache, x.seqused_k, x.block_table, x.softmax_scale, x.max_seqlen_k,
        {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.q.dtype], scale, scale, alibi_slopes=x.alibi_slopes,
    )  # fmt: skip


def _vllm_unified(x: Inputs) -> None:
    from vllm.v1.attention.backends.triton_attn import MIN_LAUNCH_GRID_SIZE_2D, NUM_PAR_SOFTMAX_SEGMENTS
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    arguments = _unified(x)
    if x.k_descale is not None and x.workload.scales == "tensor":
        arguments["kv_quant_mode"] = KVQuantMode.FP8_PER_TENSOR
    elif x.k_descale is not None:
        arguments |= {"k_descale": None, "v_descale": None, "k_scale_cache": x.k_descale, "v_scale_cache": x.v_descale}
        fp8 = x.workload.kv_dtype.startswith("float8")
        arguments["kv_quant_mode"] = KVQuantMode.FP8_PER_TOKEN_HEAD if fp8 else KVQuantMode.INT8_PER_TOKEN_HEAD
    # The buffers of its split-KV path, as the backend allocates them.
    sequences, heads = MIN_LAUNCH_GRID_SIZE_2D // x.workload.kv_heads, x.workload.heads
    rows = (sequences, heads, NUM_PAR_SOFTMAX_SEGMENTS)
    padded = 1 << (x.workload.head_size - 1).bit_length()
    unified_attention(
        **arguments, seq_threshold_3D=sequences, num_par_softmax_segments=NUM_PAR_SOFTMAX_SEGMENTS,
        softmax_segm_output=_meta(*rows, padded, dtype=torch.float32),
        softmax_segm_max=_meta(*rows, dtype=torch.float32), softmax_segm_expsum=_meta(*rows, dtype=torch.float32),
    )  # fmt: skip


def _unified(x: Inputs) -> dict:
    """The arguments that AITER's copy of vLLM's kernel still shares with it."""
    if x.layout != "NHD":
        raise NotImplementedError(f"it takes the KV layout NHD only, not {x.layout}")
    per_head = None if x.k_descale is None else x.k_descale.flatten()[:1].expand(len(x.seqused_k), x.workload.kv_heads)
    return x.unified | {"out": torch.empty_like(x.q), "k_descale": per_head, "v_descale": per_head}


def _vllm_gather(x: Inputs) -> None:
    from vllm.v1.attention.backends.rocm_aiter_fa import cp_mha_gather_cache

    w = x.workload
    blocks = x.k_cache.numel() // (w.page_size * w.kv_heads * w.head_size)
    caches = [cache.view(blocks, w.page_size, w.kv_heads, w.head_size) for cache in (x.k_cache, x.v_cache)]
    tokens = len(x.k)
    cp_mha_gather_cache(
        *caches, x.k, x.v, x.block_table, x.k_descale, x.v_descale, x.cu_seqlens_k, _meta(tokens),
        _meta(len(w.sequences)), x.k_descale is not None, x.layout, tokens,
    )  # fmt: skip


_CALLS: dict[tuple[str, str], Callable[[Inputs], None]] = {
    ("suite", "paged"): _suite_paged,
    ("suite", "varlen"): _suite_varlen,
    ("suite", "gather"): _suite_gather,
    ("aiter_triton", "varlen"): _aiter_varlen,
    ("aiter_triton", "unified"): _aiter_unified,
    ("aiter_triton", "paged_decode"): _aiter_paged_decode,
    ("vllm_triton", "unified"): _vllm_unified,
    ("vllm_triton", "gather"): _vllm_gather,
}
