# SPDX-License-Identifier: Apache-2.0
"""Provider `vllm_triton`: the Triton kernels of the installed vLLM, called as its backends call them.

`unified` is the unified attention of the TRITON_ATTN backend, which is ROCm's default, with the backend's own choice
between its two paths: split-KV for decode steps of few sequences, one program per query block for all else.
`gather` is `cp_mha_gather_cache` of the ROCM_AITER_FA backend.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

import torch

from aiterlab.attention.inputs import Inputs
from aiterlab.attention.providers import place
from aiterlab.attention.providers.provider import (
    TENSOR_FP8,
    TOKEN_HEAD,
    Implementation,
    Launch,
    Limits,
    Output,
    Provider,
    third_party,
)
from aiterlab.attention.workloads import Workload
from aiterlab.machines import ledger
from aiterlab.policy import Answer

# The sizes of steps that vLLM captures by default (CompilationConfig.cudagraph_capture_sizes), up to the largest that
# the threshold below can meet.
CAPTURED_STEPS = (1, 2, 4, *range(8, 257, 8))


def _available() -> Answer:
    if find_spec("vllm") is None:
        return Answer(False, "vLLM is not installed")
    if place.current().platform == "cpu":
        return Answer(False, "vLLM switches Triton off without a GPU; enter a simulated machine")
    return place.triton_runs()


def _unified(inputs: Inputs, out: torch.Tensor) -> Launch:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    w = inputs.workload
    threshold, segments, buffers = _segments(inputs)
    mode, tensor_scale, scale_caches = KVQuantMode.NONE, [inputs.q.new_ones(1, dtype=torch.float32)] * 2, (None, None)
    if w.kv_dtype != "auto" and w.scales == "tensor":
        mode, tensor_scale = KVQuantMode.FP8_PER_TENSOR, [inputs.k_descale, inputs.v_descale]
    elif w.kv_dtype != "auto":
        mode = KVQuantMode.INT8_PER_TOKEN_HEAD if w.kv_dtype == "int8" else KVQuantMode.FP8_PER_TOKEN_HEAD
        tensor_scale, scale_caches = [None, None], (inputs.k_descale, inputs.v_descale)
    k_descale, v_descale = (
        None if scale is None else scale.expand(len(w.sequences), w.kv_heads) for scale in tensor_scale
    )
    return functools.partial(
        unified_attention,
        out=out,
        k_descale=k_descale,
        v_descale=v_descale,
        seq_threshold_3D=threshold,
        num_par_softmax_segments=segments,
        softmax_segm_output=buffers[0],
        softmax_segm_max=buffers[1],
        softmax_segm_expsum=buffers[2],
        kv_quant_mode=mode,
        k_scale_cache=scale_caches[0],
        v_scale_cache=scale_caches[1],
        **inputs.unified,
    )


def _segments(inputs: Inputs) -> tuple[int, int, tuple[torch.Tensor, ...]]:
    """The split-KV path's threshold, segments and scratch, as TritonAttentionMetadataBuilder makes them once."""
    from vllm.v1.attention.backends.triton_attn import MIN_LAUNCH_GRID_SIZE_2D, NUM_PAR_SOFTMAX_SEGMENTS

    w = inputs.workload
    wanted = MIN_LAUNCH_GRID_SIZE_2D // w.kv_heads
    threshold = min(CAPTURED_STEPS, key=lambda size: abs(size - wanted))
    shape = threshold, w.heads, NUM_PAR_SOFTMAX_SEGMENTS
    padded = 1 << (w.head_size - 1).bit_length()
    scratch = functools.partial(torch.empty, dtype=torch.float32, device=inputs.q.device)
    return threshold, NUM_PAR_SOFTMAX_SEGMENTS, (scratch(*shape, padded), scratch(shape), scratch(shape))


def gather_function() -> Callable:
    """vLLM's `cp_mha_gather_cache`, which its module defines on ROCm only.

    On another platform the definitions are compiled from the text of the installed module, in that module's
    namespace: the same source, under the same file name and line numbers.

    Raises:
        LookupError: this vLLM has no such function.
    """
    import vllm.v1.attention.backends.rocm_aiter_fa as backend

    if (defined := getattr(backend, "cp_mha_gather_cache", None)) is not None:
        return defined
    return _compile_definitions(backend, ("cp_mha_gather_cache_kernel", "cp_mha_gather_cache"))["cp_mha_gather_cache"]


@functools.cache
def _compile_definitions(module: ModuleType, names: tuple[str, ...]) -> dict:
    from vllm.triton_utils import tl, triton

    tree = ast.parse(inspect.getsource(module))
    wanted = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    if missing := set(names) - {node.name for node in wanted}:
        raise LookupError(f"{module.__name__} has no {', '.join(sorted(missing))}")
    ledger.stood_in(f"{module.__name__}.{names[-1]}: compiled from vLLM's own source, outside its ROCm branch")
    namespace = vars(module) | {"triton": triton, "tl": tl}
    exec(compile(ast.Module(wanted, type_ignores=[]), module.__file__, "exec"), namespace)
    return namespace


def gather_launch(inputs: Inputs, out: Output) -> Launch:
    w = inputs.workload
    device = inputs.q.device
    lengths = inputs.seqused_k
    # Memory in the shuffled order goes by NHD's shape, as in the backend.
    nhd = (-1, w.page_size, w.kv_heads, w.head_size)
    one = torch.ones(1, dtype=torch.float32, device=device)
    return functools.partial(
        gather_function(),
        key_cache=inputs.k_cache.view(nhd),
        value_cache=inputs.v_cache.view(nhd),
        key=out[0],
        value=out[1],
        block_tables=inputs.block_table,
        k_scales=one if inputs.k_descale is None else inputs.k_descale,
        v_scales=one if inputs.v_descale is None else inputs.v_descale,
        cu_seqlens_kv=inputs.cu_seqlens_k,
        token_to_batch=torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32, device=device), lengths),
        seq_starts=torch.zeros_like(lengths),
        dequant=w.kv_dtype != "auto",
        kv_cache_layout=w.layout,
        total_tokens=sum(w.lengths),
    )


def gather_refuses(w: Workload) -> str | None:
    if w.head_size & (w.head_size - 1):
        return f"head size {w.head_size}: it has powers of two"
    if w.layout == "SHUFFLE" and w.kv_dtype != "auto":
        return "its shuffled branch takes every scale for 1"
    return third_party(w)


VLLM_TRITON = Provider(
    "vllm_triton",
    (
        Implementation(
            "vllm_triton",
            "unified",
            Limits(quantised=TENSOR_FP8 | TOKEN_HEAD),
            _unified,
            triton=True,
            refuses=third_party,
            note="split-KV scratch allocated beforehand, as vLLM does",
        ),
        Implementation(
            "vllm_triton",
            "gather",
            Limits(("gather",), quantised=TENSOR_FP8, layouts=("NHD", "SHUFFLE")),
            gather_launch,
            triton=True,
            refuses=gather_refuses,
            note="the map from tokens to sequences is made beforehand, as vLLM does",
        ),
    ),
    available=_available,
)
