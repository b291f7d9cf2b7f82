# SPDX-License-Identifier: Apache-2.0
"""What the kernels' launchers accept, and one clear line for what they do not.

A kernel trusts its arguments: a wrong stride or a page that does not exist would be read as numbers. So every launcher
comes through here first.
"""

from dataclasses import dataclass

import torch
from triton import knobs

from aiterlab.attention import tuning
from aiterlab.attention.layouts import LAYOUTS, QUANTISED

IMPLS = ("triton", "eager")
PAGE_SIZES = (16, 32, 64, 128)
LARGEST_HEAD = 256
QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Sizes:
    """What a launcher needs to know of tensors that fit together."""

    kv_heads: int
    page: int
    blocks: int
    out_dtype: torch.dtype


def window(window_size: tuple[int, int], causal: bool) -> tuple[int, int]:
    """Left and right reach of a query, -1 for unlimited; `causal` ends the right one at the query itself."""
    left, right = (int(side) for side in window_size)
    _need(left >= -1 and right >= -1, f"window_size is {window_size}: each side is -1 (unlimited) or a number of keys")
    reach = 2**30  # as good as unlimited, and position + reach still fits in 32 bits
    return min(left, reach), 0 if causal else min(right, reach)


def cache(k_cache: torch.Tensor, v_cache: torch.Tensor, layout: str, head_size: int) -> Sizes:
    """Check a paged cache and read its sizes off its shape.

    One set of strides serves keys and values, as in every cache that vLLM makes: that halves the kernel's addresses.
    """
    _need(layout in LAYOUTS, f"layout is {layout!r}, not one of {', '.join(LAYOUTS)}")
    _same("v_cache.dtype", v_cache.dtype, "k_cache.dtype", k_cache.dtype)
    _need(k_cache.dtype in QUERY_DTYPES + QUANTISED, f"k_cache.dtype {k_cache.dtype} is not supported")
    if layout == "NHD":
        _need(k_cache.ndim == 4, f"k_cache has shape {tuple(k_cache.shape)}, not [blocks, page, kv_heads, head_size]")
        blocks, page, kv_heads, _ = k_cache.shape
        _shape("k_cache", k_cache, (blocks, page, kv_heads, head_size))
        _shape("v_cache", v_cache, (blocks, page, kv_heads, head_size))
        _need(k_cache.stride(3) == 1, f"k_cache.stride(3) is {k_cache.stride(3)}: a head's numbers must lie together")
        _same("v_cache.stride()", v_cache.stride(), "k_cache.stride()", k_cache.stride())
    else:
        x = 16 // k_cache.element_size()
        _need(k_cache.ndim == 5, f"k_cache has shape {tuple(k_cache.shape)}, not [blocks, kv_heads, head/x, page, x]")
        blocks, kv_heads, _, page, _ = k_cache.shape
        _shape("k_cache", k_cache, (blocks, kv_heads, head_size // x, page, x))
        _shape("v_cache", v_cache, (blocks, kv_heads, page // x, head_size, x))
        _need(head_size % x == 0, f"head size {head_size} is not a multiple of {x}, as a shuffled cache needs")
        for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
            _need(not blocks or tensor[0, 0].is_contiguous(), f"{name}: each shuffled page and head must be contiguous")
        _same("v_cache.stride(0, 1)", v_cache.stride()[:2], "k_cache.stride(0, 1)", k_cache.stride()[:2])
    _need(page in PAGE_SIZES, f"the page size is {page}, not one of {PAGE_SIZES}")
    return Sizes(kv_heads, page, blocks, k_cache.dtype)


def query(q: torch.Tensor, kv_heads: int, kv_dtype: torch.dtype) -> None:
    """Check the queries against the number of key heads and the dtype of the keys."""
    _need(q.ndim == 3, f"q has shape {tuple(q.shape)}, not [tokens, heads, head_size]")
    heads, head_size = q.shape[1:]
    _need(head_size <= LARGEST_HEAD and head_size % 8 == 0, f"head size {head_size} is not a multiple of 8 up to 256")
    _need(q.stride(2) == 1, f"q.stride(2) is {q.stride(2)}: a head's numbers must lie together")
    _need(kv_heads > 0 and heads % kv_heads == 0, f"{heads} query heads cannot share {kv_heads} key heads evenly")
    quantised = kv_dtype in QUANTISED
    allowed = (*QUERY_DTYPES, torch.float8_e4m3fn) if quantised else (kv_dtype,)
    if q.dtype not in allowed:
        raise TypeError(f"q.dtype is {q.dtype}, the keys' is {kv_dtype}: it must be one of {allowed}")


def common(q, out, alibi_slopes, softmax_scale, softcap, impl, offsets: dict[str, torch.Tensor]) -> torch.dtype:
    """Check what all launchers share; returns the dtype of the output."""
    _need(impl in IMPLS, f"impl is {impl!r}, not one of {', '.join(IMPLS)}")
    _need(softmax_scale > 0, f"softmax_scale is {softmax_scale}: it must be positive")
    _need(softcap >= 0, f"softcap is {softcap}: it must not be negative")
    for name, tensor in offsets.items():
        _need(tensor.dtype == torch.int32, f"{name}.dtype is {tensor.dtype}, not int32")
        _need(tensor.stride(-1) == 1, f"{name}.stride(-1) is {tensor.stride(-1)}, not 1")
        _same(f"{name}.device", tensor.device, "q.device", q.device)
    if alibi_slopes is not None:
        _shape("alibi_slopes", alibi_slopes, (q.shape[1],))
        _need(alibi_slopes.dtype == torch.float32, f"alibi_slopes.dtype is {alibi_slopes.dtype}, not float32")
        _need(alibi_slopes.is_contiguous(), "alibi_slopes must be contiguous")
        _same("alibi_slopes.device", alibi_slopes.device, "q.device", q.device)
    if out is None:
        return q.dtype if q.dtype in QUERY_DTYPES else torch.bfloat16
    _shape("out", out, tuple(q.shape))
    _need(out.stride(2) == 1, f"out.stride(2) is {out.stride(2)}: a head's numbers must lie together")
    if out.dtype not in QUERY_DTYPES:
        raise TypeError(f"out.dtype is {out.dtype}, not one of {QUERY_DTYPES}")
    _same("out.device", out.device, "q.device", q.device)
    return out.dtype


def paged(
    q, k_cache, v_cache, cu_seqlens_q, seqused_k, block_table, max_seqlen_q, max_seqlen_k, layout, out,
    alibi_slopes, k_descale, v_descale, softmax_scale, softcap, impl, validate,
) -> Sizes:  # fmt: skip
    """Check the arguments of `paged.attend`."""
    _need(q.ndim == 3, f"q has shape {tuple(q.shape)}, not [tokens, heads, head_size]")
    sizes = cache(k_cache, v_cache, layout, q.shape[2])
    query(q, sizes.kv_heads, k_cache.dtype)
    offsets = {"cu_seqlens_q": cu_seqlens_q, "seqused_k": seqused_k, "block_table": block_table}
    out_dtype = common(q, out, alibi_slopes, softmax_scale, softcap, impl, offsets)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        _same(f"{name}.device", tensor.device, "q.device", q.device)
    sequences = len(seqused_k)
    _shape("cu_seqlens_q", cu_seqlens_q, (sequences + 1,))
    _need(block_table.ndim == 2 and len(block_table) == sequences, "block_table must be [sequences, pages]")
    _need(max_seqlen_q >= 0 and max_seqlen_k >= 0, "max_seqlen_q and max_seqlen_k must not be negative")
    _descales(k_descale, v_descale, k_cache, sizes, sequences)
    if validate and not _capturing(q):
        _lengths("cu_seqlens_q", cu_seqlens_q, len(q), max_seqlen_q)
    if validate and not _capturing(q) and sequences:
        shortest, longest = int(seqused_k.min()), int(seqused_k.max())
        _need(shortest >= 0, f"seqused_k: a sequence has {shortest} keys")
        _need(longest <= max_seqlen_k, f"a sequence has {longest} keys, max_seqlen_k is {max_seqlen_k}")
        _pages_exist(block_table, seqused_k, longest, sizes)
    return Sizes(sizes.kv_heads, sizes.page, sizes.blocks, out_dtype)


def _pages_exist(block_table: torch.Tensor, lengths: torch.Tensor, longest: int, sizes: Sizes) -> None:
    pages = -(-longest // sizes.page)
    _need(block_table.shape[1] >= pages, f"block_table has {block_table.shape[1]} pages a row, {pages} are needed")
    used = torch.arange(block_table.shape[1], device=lengths.device) * sizes.page < lengths[:, None]
    wrong = used & ((block_table < 0) | (block_table >= sizes.blocks))
    if wrong.any():
        sequence, page = (int(i) for i in wrong.nonzero()[0])
        entry = int(block_table[sequence, page])
        raise ValueError(f"block_table[{sequence}, {page}] is {entry}: the cache has blocks 0 to {sizes.blocks - 1}")


def _lengths(name: str, offsets: torch.Tensor, total: int, longest: int | None = None) -> None:
    _need(len(offsets) > 0, f"{name} is empty: it has one entry more than there are sequences")
    new = offsets.diff()
    ends = int(offsets[0]), int(offsets[-1])
    _need(ends == (0, total), f"{name} goes from {ends[0]} to {ends[1]}, not from 0 to {total}")
    _need(bool((new >= 0).all()), f"{name} must not decrease")
    if longest is not None and len(new):
        most = int(new.max())
        _need(most <= longest, f"{name}: a sequence has {most} tokens, more than the stated maximum of {longest}")


def contiguous(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, out, alibi_slopes, softmax_scale,
               softcap, impl, validate) -> torch.dtype:  # fmt: skip
    """Check the arguments of `varlen.attend`; returns the dtype of the output."""
    _need(k.ndim == 3, f"k has shape {tuple(k.shape)}, not [tokens, kv_heads, head_size]")
    query(q, k.shape[1], k.dtype)
    _need(k.dtype in QUERY_DTYPES, f"k.dtype is {k.dtype}: contiguous keys must be one of {QUERY_DTYPES}")
    _shape("k", k, (len(k), k.shape[1], q.shape[2]))
    _shape("v", v, tuple(k.shape))
    for name, tensor in (("k", k), ("v", v)):
        _need(tensor.stride(2) == 1, f"{name}.stride(2) is {tensor.stride(2)}: a head's numbers must lie together")
        _same(f"{name}.dtype", tensor.dtype, "q.dtype", q.dtype)
        _same(f"{name}.device", tensor.device, "q.device", q.device)
    offsets = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    out_dtype = common(q, out, alibi_slopes, softmax_scale, softcap, impl, offsets)
    _shape("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape))
    if validate and not _capturing(q):
        _lengths("cu_seqlens_q", cu_seqlens_q, len(q), max_seqlen_q)
        _lengths("cu_seqlens_k", cu_seqlens_k, len(k), max_seqlen_k)
    return out_dtype


def gathered(k_cache, v_cache, block_table, cu_seqlens_k, total_tokens, seq_starts, k_descale, v_descale, layout, dtype,
             out, impl, validate) -> Sizes:  # fmt: skip
    """Check the arguments of `gather.gather`."""
    _need(impl in IMPLS, f"impl is {impl!r}, not one of {', '.join(IMPLS)}")
    _need(k_cache.ndim >= 4 and v_cache.ndim >= 4, f"k_cache has shape {tuple(k_cache.shape)}: it is no paged cache")
    head_size = v_cache.shape[3]
    _need(head_size % 8 == 0, f"head size {head_size} is not a multiple of 8")
    sizes = cache(k_cache, v_cache, layout, head_size)
    names = {"block_table": block_table, "cu_seqlens_k": cu_seqlens_k}
    for name, tensor in names.items() if seq_starts is None else (*names.items(), ("seq_starts", seq_starts)):
        _need(tensor.dtype == torch.int32, f"{name}.dtype is {tensor.dtype}, not int32")
        _need(tensor.stride(-1) == 1, f"{name}.stride(-1) is {tensor.stride(-1)}, not 1")
        _same(f"{name}.device", tensor.device, "k_cache.device", k_cache.device)
    if seq_starts is not None:
        _shape("seq_starts", seq_starts, (len(block_table),))
    _need(
        block_table.ndim == 2 and block_table.stride(1) == 1, "block_table must be [sequences, pages], rows contiguous"
    )
    _shape("cu_seqlens_k", cu_seqlens_k, (len(block_table) + 1,))
    _descales(k_descale, v_descale, k_cache, sizes, len(block_table))
    dtype = dtype or (k_cache.dtype if k_cache.dtype in QUERY_DTYPES else torch.bfloat16)
    for name, tensor in () if out is None else (("out[0]", out[0]), ("out[1]", out[1])):
        _shape(name, tensor, (total_tokens, sizes.kv_heads, head_size))
        _need(tensor.is_contiguous(), f"{name} must be contiguous")
        _same(f"{name}.device", tensor.device, "k_cache.device", k_cache.device)
        dtype = tensor.dtype
    _need(dtype in QUERY_DTYPES, f"dtype is {dtype}, not one of {QUERY_DTYPES}")
    if validate and not _capturing(k_cache):
        _lengths("cu_seqlens_k", cu_seqlens_k, total_tokens)
    if validate and not _capturing(k_cache) and len(block_table):
        lengths = cu_seqlens_k.diff()
        if seq_starts is not None:
            _need(int(seq_starts.min()) >= 0, "seq_starts must not be negative")
            lengths = lengths + seq_starts
        _pages_exist(block_table, lengths, int(lengths.max()), sizes)
    return Sizes(sizes.kv_heads, sizes.page, sizes.blocks, dtype)


def encoding(k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[str, torch.Tensor, torch.Tensor]:
    """How the kernel decodes the cache's numbers, and the cache as Triton can load it.

    Triton loads e4m3fnuz where the hardware has it; elsewhere the kernel moves the bits.
    """
    if k_cache.dtype == torch.float8_e4m3fnuz and tuning.architecture() != "gfx942":
        return "e4m3fnuz bits", k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    return ("number" if k_cache.dtype in QUANTISED else ""), k_cache, v_cache


def granularity(descale: torch.Tensor | None) -> str:
    """Say how finely a cache is scaled: not at all, as a tensor, each sequence and head, or each token and head."""
    if descale is None:
        return "none"
    return "tensor" if descale.numel() == 1 else "sequence" if descale.ndim == 2 else "token"


def scale_strides(*descales: torch.Tensor | None) -> tuple[int, int, int]:
    """Strides of the scales that are finer than the tensor; keys and values share them (checked)."""
    fine = next((descale for descale in descales if granularity(descale) in ("sequence", "token")), None)
    return (0, 0, 0) if fine is None else (*fine.stride(), 0)[:3]


def describable(tensor: torch.Tensor) -> bool:
    """Tell whether the copy engine can read the tensor: it needs multiples of 16 bytes."""
    size = tensor.element_size()
    return (
        tensor.numel() > 0
        and tensor.data_ptr() % 16 == 0
        and all(stride * size % 16 == 0 for stride in tensor.stride()[:-1])
    )


def refuse_interpreted_bfloat16(q: torch.Tensor) -> None:
    """Raise TypeError where Triton's interpreter would compute bfloat16: its dot is wrong, silently (errors of 1e9)."""
    if knobs.runtime.interpret and q.dtype == torch.bfloat16:
        raise TypeError("Triton's interpreter multiplies bfloat16 matrices wrongly: use float16 or float32, or a GPU")


def _descales(k_descale, v_descale, k_cache: torch.Tensor, sizes: Sizes, sequences: int) -> None:
    token, sequence = (sizes.blocks, sizes.page, sizes.kv_heads), (sequences, sizes.kv_heads)
    for name, descale in (("k_descale", k_descale), ("v_descale", v_descale)):
        if descale is None:
            continue
        if not isinstance(descale, torch.Tensor):
            raise TypeError(f"{name} is a {type(descale).__name__}, not a float32 tensor on the device")
        _need(k_cache.dtype in QUANTISED, f"{name} is given, but the cache's dtype {k_cache.dtype} has no scale")
        _need(descale.dtype == torch.float32, f"{name}.dtype is {descale.dtype}, not float32")
        _same(f"{name}.device", descale.device, "k_cache.device", k_cache.device)
        if descale.numel() != 1 and tuple(descale.shape) not in (token, sequence):
            raise ValueError(f"{name} has shape {tuple(descale.shape)}, neither one element nor {token} nor {sequence}")
    if "tensor" not in (kinds := {granularity(k_descale), granularity(v_descale)}) and "none" not in kinds:
        _same("v_descale.stride()", v_descale.stride(), "k_descale.stride()", k_descale.stride())


def _capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _same(name: str, value, other: str, expected) -> None:
    _need(value == expected, f"{name} is {value}, but {other} is {expected}")


def _shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    _need(tuple(tensor.shape) == expected, f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
