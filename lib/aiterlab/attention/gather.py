# SPDX-License-Identifier: Apache-2.0
"""Gather a paged KV cache into contiguous keys and values, dequantised: the first step of gather-then-attend."""

import torch
import triton
import triton.language as tl

from aiterlab.attention import arguments, eager, tuning
from aiterlab.attention.pages import decode, load_heads, load_shuffled_keys, load_shuffled_values, page_of, tensor_scale
from aiterlab.attention.tiles import find_sequence


# Numbers that differ from batch to batch must not make new kernels.
@triton.jit(do_not_specialize=["sequences", "stride_table"])
def _gather_kernel(
    k_cache, v_cache, k, v, block_table, cu_seqlens_k, seq_starts, k_descale, v_descale,
    stride_page, stride_place, stride_head, stride_table, stride_s0, stride_s1, stride_s2, sequences,
    KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, X: tl.constexpr,
    TILE: tl.constexpr, STARTS: tl.constexpr, ENCODING: tl.constexpr, K_SCALES: tl.constexpr, V_SCALES: tl.constexpr,
    SHUFFLED: tl.constexpr,
):  # fmt: skip
    """A program moves TILE tokens of one sequence and key head."""
    head = tl.program_id(0) % KV_HEADS
    block = tl.program_id(0) // KV_HEADS
    sequence = find_sequence(cu_seqlens_k, block, sequences, TILE)
    start = tl.load(cu_seqlens_k + sequence)
    length = tl.load(cu_seqlens_k + sequence + 1) - start
    first = (block - start // TILE - sequence) * TILE
    if first >= length:
        return
    token = first + tl.arange(0, TILE)
    dim = tl.arange(0, BLOCK_D)
    is_dim = (dim < HEAD_SIZE)[None, :]

    key = tl.minimum(token, length - 1)  # behind the end nothing is stored, and nothing strange is read
    if STARTS:
        key += tl.load(seq_starts + sequence)
    block_table += sequence.to(tl.int64) * stride_table
    k_cache += head.to(tl.int64) * stride_head
    v_cache += head.to(tl.int64) * stride_head
    page, place = page_of(block_table, key, PAGE), key % PAGE
    row = page.to(tl.int64) * stride_page + place * stride_place
    if SHUFFLED:
        k_tile = load_shuffled_keys(k_cache, page, place, stride_page, HEAD_SIZE, BLOCK_D, PAGE, X)
    else:
        k_tile = load_heads(k_cache, row, HEAD_SIZE, BLOCK_D)
    if SHUFFLED and STARTS:
        # A sequence that is taken from its middle does not begin with a whole group of X tokens.
        group = page.to(tl.int64) * stride_page + place // X * (HEAD_SIZE * X) + place % X
        v_tile = tl.load(v_cache + group[:, None] + (dim * X)[None, :], mask=is_dim, other=0.0)
    elif SHUFFLED:
        group = tl.minimum(first + tl.arange(0, TILE // X) * X, length - 1)
        v_tile = load_shuffled_values(
            v_cache, page_of(block_table, group, PAGE), group % PAGE, stride_page, HEAD_SIZE, BLOCK_D, X
        )
    else:
        v_tile = load_heads(v_cache, row, HEAD_SIZE, BLOCK_D)
    if ENCODING != "":
        scale = page.to(tl.int64) * stride_s0 + place * stride_s1 + head * stride_s2
        of_sequence = sequence * stride_s0 + head * stride_s1
        k_tile = _dequantise(k_tile, k_descale, scale, of_sequence, ENCODING, K_SCALES)
        v_tile = _dequantise(v_tile, v_descale, scale, of_sequence, ENCODING, V_SCALES)

    target = ((start + token).to(tl.int64) * KV_HEADS + head)[:, None] * HEAD_SIZE + dim[None, :]
    mask = (token < length)[:, None] & is_dim
    tl.store(k + target, k_tile.to(k.dtype.element_ty), mask=mask)
    tl.store(v + target, v_tile.to(v.dtype.element_ty), mask=mask)


@triton.jit
def _dequantise(stored, descale, scale, of_sequence, ENCODING: tl.constexpr, SCALES: tl.constexpr):
    number = decode(stored, tl.float16, ENCODING).to(tl.float32)
    if SCALES == "token":
        return number * tl.load(descale + scale)[:, None]
    return number * tensor_scale(descale, of_sequence, SCALES)


def gather(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    block_table: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    total_tokens: int,
    seq_starts: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    layout: str = "NHD",
    dtype: torch.dtype | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "triton",
    validate: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy each sequence's keys and values out of the paged cache, one after the other.

    Args:
        k_cache, v_cache, layout, k_descale, v_descale, block_table, impl, validate: as in `paged.attend`
        cu_seqlens_k: [sequences + 1] int32, where each sequence starts in the result
        total_tokens: the last of cu_seqlens_k, known on the host
        seq_starts: [sequences] int32, first token to take of each sequence; 0 if not given
        dtype: of the result where it is made here: the cache's own, bfloat16 for a quantised one
        out: two contiguous tensors [total_tokens, H_kv, D] to write into

    Returns:
        k and v, each [total_tokens, H_kv, D].

    Raises:
        ValueError, TypeError: what does not fit, with the argument's name.
    """
    sizes = arguments.gathered(
        k_cache, v_cache, block_table, cu_seqlens_k, total_tokens, seq_starts, k_descale, v_descale, layout, dtype, out,
        impl, validate,
    )  # fmt: skip
    head_size = k_cache.shape[3] if layout == "NHD" else v_cache.shape[3]
    if out is None:
        shape = (total_tokens, sizes.kv_heads, head_size)
        out = tuple(torch.empty(shape, dtype=sizes.out_dtype, device=k_cache.device) for _ in range(2))
    k, v = out
    if impl == "eager":
        return eager.gather(k_cache, v_cache, block_table, cu_seqlens_k, seq_starts, k_descale, v_descale, layout, k, v)
    if total_tokens == 0:
        return k, v
    config = tuning.gather()
    encoding, k_cache, v_cache = arguments.encoding(k_cache, v_cache)
    sequences = len(block_table)
    _gather_kernel[((total_tokens // config.tile + sequences) * sizes.kv_heads,)](
        k_cache, v_cache, k, v, block_table, cu_seqlens_k, seq_starts, k_descale, v_descale,
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(1 if layout == "SHUFFLE" else 2), block_table.stride(0),
        *arguments.scale_strides(k_descale, v_descale), sequences,
        KV_HEADS=sizes.kv_heads, HEAD_SIZE=head_size, BLOCK_D=max(16, triton.next_power_of_2(head_size)),
        PAGE=sizes.page, X=16 // k_cache.element_size(), TILE=config.tile, STARTS=seq_starts is not None,
        ENCODING=encoding, K_SCALES=arguments.granularity(k_descale), V_SCALES=arguments.granularity(v_descale),
        SHUFFLED=layout == "SHUFFLE", **config.options,
    )  # fmt: skip
    return k, v
