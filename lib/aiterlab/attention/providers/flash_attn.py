# SPDX-License-Identifier: Apache-2.0
"""Provider `flash_attn`: FlashAttention 3 in the build that vLLM brings for NVIDIA's Hopper GPUs.

`fa3` is called as vLLM's FLASH_ATTN backend calls it under full CUDA graphs: paged, the schedule computed once per
step by `get_scheduler_metadata`, and an upper bound of splits for the steps that vLLM captures. `fa3_auto` leaves the
splits to FA3's own heuristic, `fa3_varlen` reads a prompt's K and V as the layer made them, before they are cached.
"""

from __future__ import annotations

import functools
import inspect
from importlib.util import find_spec

import torch

from aiterlab.attention.inputs import Inputs
from aiterlab.attention.providers import place
from aiterlab.attention.providers.provider import Implementation, Launch, Limits, Provider
from aiterlab.policy import Answer

# vLLM's defaults: AttentionConfig.flash_attn_max_num_splits_for_cuda_graph, max_cudagraph_capture_size
MAX_SPLITS, LARGEST_CAPTURED_STEP = 32, 512
_LIMITS = Limits(
    dtypes=("float16", "bfloat16"),
    head_sizes=(64, 96, 128, 192, 256),
    page_sizes=(16, 32, 64, 128),
    alibi=False,
    non_causal=True,
)


def _available() -> Answer:
    where = place.current()
    if where.platform != "cuda":
        return Answer(False, "vLLM builds FA3 for NVIDIA GPUs only")
    if find_spec("vllm") is None:
        return Answer(False, "vLLM is not installed")
    try:
        from vllm.vllm_flash_attn.flash_attn_interface import fa_version_unsupported_reason
    except ImportError as error:
        return Answer(False, f"this vLLM has no FlashAttention: {error}")
    if reason := fa_version_unsupported_reason(3):
        return Answer(False, reason)
    return Answer(True, f"FA3 on {where.architecture}")


def _common(inputs: Inputs, out: torch.Tensor) -> dict:
    return {
        "q": inputs.q,
        "out": out,
        "cu_seqlens_q": inputs.cu_seqlens_q,
        "max_seqlen_q": inputs.max_seqlen_q,
        "max_seqlen_k": inputs.max_seqlen_k,
        "softmax_scale": inputs.softmax_scale,
        "causal": inputs.causal,
        "window_size": list(inputs.window_size),
        "softcap": inputs.softcap,
        "fa_version": 3,
    }


def _paged(inputs: Inputs, out: torch.Tensor, *, scheduled: bool) -> Launch:
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    splits, schedule = 0, None
    if scheduled:
        splits = MAX_SPLITS if len(inputs.q) <= LARGEST_CAPTURED_STEP else 0
        schedule = _schedule(inputs, splits)
    return functools.partial(
        flash_attn_varlen_func,
        k=inputs.k_cache,
        v=inputs.v_cache,
        seqused_k=inputs.seqused_k,
        block_table=inputs.block_table,
        scheduler_metadata=schedule,
        num_splits=splits,
        **_common(inputs, out),
    )


def _schedule(inputs: Inputs, splits: int) -> torch.Tensor:
    """FA3's plan of the step, which vLLM computes once for all layers."""
    from vllm.vllm_flash_attn.flash_attn_interface import get_scheduler_metadata

    w = inputs.workload
    known = {
        "batch_size": len(w.sequences),
        "max_seqlen_q": inputs.max_seqlen_q,
        "max_seqlen_k": inputs.max_seqlen_k,
        "num_heads_q": w.heads,
        "num_heads_kv": w.kv_heads,
        "headdim": w.head_size,
        "cache_seqlens": inputs.seqused_k,
        "qkv_dtype": inputs.q.dtype,
        "cu_seqlens_q": inputs.cu_seqlens_q,
        "page_size": w.page_size,
        "causal": inputs.causal,
        "window_size": inputs.window_size,
        "has_softcap": inputs.softcap > 0,
        "num_splits": splits,
    }
    taken = inspect.signature(get_scheduler_metadata).parameters  # differs between vLLM's releases
    return get_scheduler_metadata(**{name: value for name, value in known.items() if name in taken})


def _contiguous(inputs: Inputs, out: torch.Tensor) -> Launch:
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    return functools.partial(
        flash_attn_varlen_func, k=inputs.k, v=inputs.v, cu_seqlens_k=inputs.cu_seqlens_k, **_common(inputs, out)
    )


FLASH_ATTN = Provider(
    "flash_attn",
    (
        Implementation(
            "flash_attn",
            "fa3",
            _LIMITS,
            functools.partial(_paged, scheduled=True),
            reads_whole_pages=True,
            note="the step's schedule is computed beforehand, as vLLM does once for all layers",
        ),
        Implementation(
            "flash_attn",
            "fa3_auto",
            _LIMITS,
            functools.partial(_paged, scheduled=False),
            reads_whole_pages=True,
            note="FA3 schedules in every call and chooses the splits",
        ),
        Implementation(
            "flash_attn",
            "fa3_varlen",
            Limits(
                ("prefill",),
                _LIMITS.dtypes,
                head_sizes=_LIMITS.head_sizes,
                alibi=False,
                non_causal=True,
                layouts=("NHD", "SHUFFLE"),
            ),
            _contiguous,
            note="K and V of the prompt as the layer made them",
        ),
    ),
    available=_available,
)
