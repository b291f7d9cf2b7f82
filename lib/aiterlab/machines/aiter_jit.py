# SPDX-License-Identifier: Apache-2.0
"""AITER's compiled half: the modules that it builds with hipcc on first use.

AITER is a Python package whose kernels are compiled on demand, when a module `module_*` cannot be imported. On the
simulated machine that import is answered here: the request is written down (the machine would have compiled it) and
the functions that the investigation calls get a stand-in. Everything above, AITER's Python, is the real package.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType

from aiterlab import importing, paths
from aiterlab.machines import ledger
from aiterlab.machines.paged import attend_paged


def install() -> None:
    """Answer AITER's requests for compiled code in this process.

    Raises:
        RuntimeError: AITER is not installed; its Python is never simulated.
    """
    if (spec := importlib.util.find_spec("aiter")) is None:
        raise RuntimeError("AITER is not installed: a machine with AITER needs its Python (pip install amd-aiter)")
    folder = paths.cache_dir() / "aiter-jit"  # stays empty: it keeps AITER from writing beside its own sources
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["AITER_JIT_DIR"] = os.environ["AITER_ROOT_DIR"] = str(folder)
    _keep_tables_out_of_tmp(Path(spec.origin).parent)
    importing.serve(_is_jit_module, _fill_jit_module, "simulated JIT build")
    importing.after_import("csrc.cpp_itfs.utils", _replace_template_compiler)
    importing.after_import("aiter", _accept_later_keywords)


def _keep_tables_out_of_tmp(package: Path) -> None:
    """Have AITER take three of its tuning tables as they are, which change no result here.

    Otherwise its import merges each into a file with a fixed name in /tmp: only the first user of a computer could
    write it, and two probes would write it at once.
    """
    for name in ("a8w8_blockscale", "a8w8_blockscale_bpreshuffle", "a8w8_bpreshuffle"):
        os.environ[f"AITER_CONFIG_GEMM_{name.upper()}"] = str(package / "configs" / f"{name}_tuned_gemm.csv")


def _is_jit_module(name: str) -> bool:
    return name.startswith(("module_", "mha_varlen_fwd_", "fmha_v3_varlen_fwd_"))


def _fill_jit_module(module: ModuleType) -> None:
    ledger.would_compile(module.__name__)
    if module.__name__ == "module_aiter_enum":
        module.ActivationType, module.QuantType = ActivationType, QuantType
    elif module.__name__.startswith(("module_mha_varlen_fwd", "mha_varlen_fwd_")):
        module.mha_varlen_fwd = mha_varlen_fwd
    elif module.__name__ == "module_attention_asm":
        module.pa_fwd_asm = pa_fwd_asm
    module.__getattr__ = functools.partial(_only_compiled, module.__name__)


def _only_compiled(module: str, name: str):
    """A function that exists only compiled for a GPU and that nothing in the investigation should reach."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(
            f"{module}.{name} exists only compiled for ROCm; the simulated machine has no stand-in for it"
        )

    missing.__doc__ = f"Members: {name}"  # AITER checks argument types against pybind11's text, unless it starts so
    return missing


class ActivationType(enum.IntEnum):
    """Members: AITER's activation functions, as its compiled module numbers them."""

    No, Silu, Gelu, Swiglu = -1, 0, 1, 2


class QuantType(enum.IntEnum):
    """Members: AITER's quantisation granularities, as its compiled module numbers them."""

    No, per_Tensor, per_Token, per_1x32, per_1x128, per_128x128 = range(6)


# Tuning means nothing to the interpreter, and AITER's own table has no entry for gfx90a, which its CK kernels support.
_TRITON_CONFIG = {
    "BLOCK_M": 32, "BLOCK_N": 32, "PRELOAD_V": False, "waves_per_eu": 1, "num_warps": 4, "num_ctas": 1, "num_stages": 1,
}  # fmt: skip


def mha_varlen_fwd(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, min_seqlen_q, dropout_p, softmax_scale,
    logits_soft_cap, zero_tensors, is_causal, window_size_left, window_size_right, return_softmax_lse,
    return_dropout_randval, out=None, block_table=None, bias=None, alibi_slopes=None, *args, **kwargs,
):  # fmt: skip
    """Members: Composable Kernel's varlen attention, computed by AITER's own Triton kernel in Triton's interpreter.

    Shapes: q [total_q, heads, head_size], k and v [total_k, kv_heads, head_size], LSE [heads, total_q] float32.
    """
    import torch
    from aiter.ops.triton.mha import flash_attn_varlen_func

    if q.dtype is torch.bfloat16:
        raise NotImplementedError(
            "bf16 is refused: Triton's interpreter computes bf16 dot products wrongly; use float16"
        )
    if logits_soft_cap or block_table is not None or bias is not None:
        raise NotImplementedError("AITER's Triton varlen kernel has no logits soft cap, block table or bias")
    ledger.stood_in("aiter mha_varlen_fwd (CK) -> aiter.ops.triton.mha, Triton interpreter")
    result, lse = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=softmax_scale, causal=is_causal, window_size=(window_size_left, window_size_right),
        alibi_slopes=alibi_slopes, return_lse=True, config=_TRITON_CONFIG,
    )[:2]  # fmt: skip
    lse = lse.t().contiguous()  # the Triton kernel stores [total_q, heads]
    if out is not None:
        result = out.copy_(result)
    return [result, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)]


def pa_fwd_asm(
    Q,
    K,
    V,
    block_tables,
    context_lens,
    block_tables_stride0,
    max_qlen=1,
    K_QScale=None,
    V_QScale=None,
    out_=None,
    *args,
    **kwargs,
):
    """Members: the assembly decode kernel over the shuffled KV cache, computed in NumPy.

    Shapes: Q [sequences, heads, head_size], K [blocks, kv_heads, head_size / x, page, x],
    V [blocks, kv_heads, page / x, head_size, x].
    """
    import torch

    ledger.stood_in("aiter pa_fwd_asm (assembly) -> NumPy")
    blocks, kv_heads, _, page, _ = K.shape
    head_size = Q.shape[-1]
    keys = K.permute(0, 3, 1, 2, 4).reshape(blocks, page, kv_heads, head_size)
    values = V.permute(0, 2, 4, 1, 3).reshape(blocks, page, kv_heads, head_size)
    result = attend_paged(
        Q.numpy(), keys.numpy(), values.numpy(), block_tables.numpy(), context_lens.numpy(), head_size**-0.5
    )
    return out_.copy_(torch.from_numpy(result))


def _replace_template_compiler(utils: ModuleType) -> None:
    """The second way in which AITER compiles: a C++ template rendered, built by hipcc and loaded through ctypes."""

    def compile_template_op(src_template, md_name, *args, func_name=None, folder=None, **template):
        template.pop("sources", None), template.pop("includes", None), template.pop("cxxflags", None)
        ledger.would_compile(f"{md_name} (C++ template)")
        if md_name == "pa_v1":
            return functools.partial(_paged_attention_v1, template)
        return _only_compiled(md_name, func_name or md_name)

    utils.compile_template_op = compile_template_op


def _paged_attention_v1(
    template: dict, out, workspace, query, key_cache, value_cache, block_tables, cu_query_lens, context_lens,
    alibi_slopes, q_scale, k_scale, v_scale, fp8_out_scale, scale, max_blocks, max_partitions, soft_cap, sequences,
    kv_heads, heads, q_stride, block_stride, head_stride, page_stride, sliding_window, stream,
):  # fmt: skip
    """The compiled `pa_v1` entry point, called with raw pointers and element strides, computed in NumPy.

    Raises:
        NotImplementedError: a variant that the investigation does not use (bf16, fp8, ALiBi, soft cap, window).
    """
    import numpy as np

    if template["dtype"] != "_Float16" or template["kv_dtype"] != "_Float16":
        raise NotImplementedError(
            f"the stand-in for pa_v1 takes float16 only, not {template['dtype']}/{template['kv_dtype']}"
        )
    if template["alibi_enabled"] or template["logits_soft_cap_enabled"] or template.get("sliding_window_enabled"):
        raise NotImplementedError("the stand-in for pa_v1 has no ALiBi, soft cap or sliding window")
    ledger.stood_in("aiter paged_attention_v1 (hipcc template) -> NumPy over the raw pointers")
    sequences, heads, kv_heads = sequences.value, heads.value, kv_heads.value
    head_size, page = template["head_size"], template["block_size"]

    def view(pointer, dtype, shape, strides):
        extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        address = ctypes.cast(pointer, ctypes.c_void_p).value
        flat = np.frombuffer((ctypes.c_char * (extent * np.dtype(dtype).itemsize)).from_address(address), dtype)
        return np.lib.stride_tricks.as_strided(flat, shape, [stride * flat.itemsize for stride in strides])

    tables = view(block_tables, np.int32, (sequences, max_blocks.value), (max_blocks.value, 1))
    lengths = view(context_lens, np.int32, (sequences,), (1,))
    used = [tables[i, : -(-int(n) // page)] for i, n in enumerate(lengths)]
    blocks = 1 + int(max(table.max(initial=0) for table in used))
    cache = (blocks, page, kv_heads, head_size), (block_stride.value, page_stride.value, head_stride.value, 1)
    queries = view(query, np.float16, (sequences, heads, head_size), (q_stride.value, head_size, 1))
    result = view(out, np.float16, (sequences, heads, head_size), (heads * head_size, head_size, 1))
    result[...] = attend_paged(
        queries,
        view(key_cache, np.float16, *cache),
        view(value_cache, np.float16, *cache),
        tables,
        lengths,
        scale.value,
    )


def know_architecture(gfx: str) -> None:
    """Let AITER know an architecture that a vLLM counts as supported and that this AITER is too old for."""

    def extend(chip_info: ModuleType) -> None:
        known = chip_info.GFX_MAP
        if gfx not in known.values():
            ledger.stood_in(f"AITER's list of architectures has {gfx}, as in later releases")
            known[max(known) + 1] = gfx

    for name in ("aiter.jit.utils.chip_info", "chip_info"):  # AITER imports this file under both names
        importing.after_import(name, extend)


def have_later_modules(package: Path) -> None:
    """Have every module of AITER that the vLLM in `package` imports; what this AITER lacks is there by name.

    A vLLM is written for the AITER of its time, and the wheel on the package index is older than the newest of them.
    """

    def wanted(name: str) -> bool:
        if not name.startswith("aiter."):
            return False
        frame = sys._getframe(1)
        while frame and frame.f_globals.get("__name__", "").startswith(("importlib", "_frozen_importlib", "aiterlab.")):
            if frame.f_globals["__name__"] == "importlib.util":
                return False  # somebody asks whether there is such a module
            frame = frame.f_back
        return frame is not None and frame.f_code.co_filename.startswith(str(package))

    def fill(module: ModuleType) -> None:
        ledger.stood_in(f"{module.__name__}, a module of later AITER releases, by name")
        module.__getattr__ = functools.partial(_only_compiled, module.__name__)

    importing.serve_the_rest(wanted, fill, "later AITER")


def _accept_later_keywords(aiter: ModuleType) -> None:
    """Let a vLLM written for a later AITER call this one, where it asks for nothing new.

    vLLM passes `sink_ptr=None` since its AITER has attention sinks; the AITER wheel on the package index is older and
    does not know the keyword. None means "no sinks", which is what the older function computes.
    """
    older = getattr(aiter, "flash_attn_varlen_func", None)
    if older is None or "sink_ptr" in inspect.signature(older).parameters:
        return

    @functools.wraps(older)
    def flash_attn_varlen_func(*args, **kwargs):
        if "sink_ptr" in kwargs and kwargs["sink_ptr"] is None:
            ledger.stood_in("aiter.flash_attn_varlen_func accepts sink_ptr=None, a keyword of later AITER releases")
            del kwargs["sink_ptr"]
        return older(*args, **kwargs)

    aiter.flash_attn_varlen_func = flash_attn_varlen_func
