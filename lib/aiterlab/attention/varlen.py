# SPDX-License-Identifier: Apache-2.0
"""Attend over contiguous keys of sequences of any length: the prefill of a prompt, or what `gather` has gathered."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from aiterlab.attention import arguments, eager, tuning
from aiterlab.attention.tiles import (
    LN2,
    LOG2E,
    cap,
    elements,
    find_sequence,
    finish,
    lower,
    rows,
    sees,
    softmax_step,
    visible_keys,
)


# Numbers that differ from batch to batch must not make new kernels.
@triton.jit(do_not_specialize=["sequences", "tokens", "softcap", "window_left", "window_right"])
def _varlen_kernel(
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, alibi_slopes,
    sequences, tokens, softmax_scale, softcap, window_left, window_right,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_kt, stride_kh, stride_vt, stride_vh,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, TILE: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    LSE: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    # Neighbours are the heads of one block; the last blocks of a causal prefill, which have the most keys, start first.
    kv_head = tl.program_id(0) % KV_HEADS
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // KV_HEADS
    sequence = find_sequence(cu_seqlens_q, block, sequences, BLOCK_Q)
    start = tl.load(cu_seqlens_q + sequence)
    queries = tl.load(cu_seqlens_q + sequence + 1) - start
    first = (block - start // BLOCK_Q - sequence) * BLOCK_Q  # of this program's tokens, within the sequence
    if first >= queries:
        return
    first_key = tl.load(cu_seqlens_k + sequence)
    length = tl.load(cu_seqlens_k + sequence + 1) - first_key
    context = length - queries
    position, head, row, is_row = rows(first, queries, context, start, kv_head, GROUP, BLOCK_M, BLOCK_Q)
    dim = tl.arange(0, BLOCK_D)
    is_element = is_row[:, None] & (dim < HEAD_SIZE)[None, :]
    low, high = visible_keys(
        context + first, tl.minimum(BLOCK_Q, queries - first), length, window_left, window_right, LEFT, RIGHT
    )

    query = tl.load(elements(q, row, head, stride_qt, stride_qh, BLOCK_D), mask=is_element, other=0.0)
    scale = softmax_scale * LOG2E
    slope = tl.zeros([BLOCK_M], tl.float32)
    if ALIBI:
        slope = tl.load(alibi_slopes + head, mask=is_row, other=0.0) * LOG2E
    if not DESCRIPTOR:
        k += first_key.to(tl.int64) * stride_kt + kv_head.to(tl.int64) * stride_kh
        v += first_key.to(tl.int64) * stride_vt + kv_head.to(tl.int64) * stride_vh
    # Tiles that every row sees whole come first and need no mask.
    full = low
    if not LEFT:
        full = tl.minimum(high, context + first + window_right + 1) if RIGHT else high
        full = low + tl.maximum(full - low, 0) // TILE * TILE
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in tl.range(low, full, TILE):
        acc, running_max, running_sum = _tile(
            tile, False, query, acc, running_max, running_sum, k, v, first_key, kv_head,
            position, scale, slope, softcap, length, window_left, window_right, stride_kt, stride_vt,
            HEAD_SIZE, BLOCK_D, TILE, LEFT, RIGHT, SOFTCAP, ALIBI, DESCRIPTOR,
        )  # fmt: skip
    for tile in tl.range(full, high, TILE):
        acc, running_max, running_sum = _tile(
            tile, True, query, acc, running_max, running_sum, k, v, first_key, kv_head,
            position, scale, slope, softcap, length, window_left, window_right, stride_kt, stride_vt,
            HEAD_SIZE, BLOCK_D, TILE, LEFT, RIGHT, SOFTCAP, ALIBI, DESCRIPTOR,
        )  # fmt: skip

    result, row_lse = finish(acc, running_max, running_sum)
    result = result.to(out.dtype.element_ty)
    tl.store(elements(out, row, head, stride_ot, stride_oh, BLOCK_D), result, mask=is_element)
    if LSE:
        tl.store(lse + head.to(tl.int64) * tokens + row, row_lse, mask=is_row)


@triton.jit
def _tile(
    tile, MASKED: tl.constexpr, query, acc, running_max, running_sum, k, v, first_key, kv_head,
    position, scale, slope, softcap, length, window_left, window_right, stride_kt, stride_vt,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """One tile of keys: load, scores, softmax, accumulate."""
    dim = tl.arange(0, BLOCK_D)
    key = tile + tl.arange(0, TILE)
    inside = (key < length)[:, None]
    # Values behind the end are zeroed, not only given no weight: 0 x NaN is NaN, and the next sequence may hold it.
    if DESCRIPTOR:
        keys = k.load([first_key + tile, kv_head, 0]).reshape(TILE, BLOCK_D)
        values = v.load([first_key + tile, kv_head, 0]).reshape(TILE, BLOCK_D)
        if MASKED:
            values = tl.where(inside, values, tl.zeros([1, 1], values.dtype))
    else:
        token = key.to(tl.int64)[:, None]
        if MASKED or BLOCK_D != HEAD_SIZE:
            mask = inside & (dim < HEAD_SIZE)[None, :]
            keys = tl.load(k + token * stride_kt + dim[None, :], mask=mask, other=0.0)
            values = tl.load(v + token * stride_vt + dim[None, :], mask=mask, other=0.0)
        else:
            keys = tl.load(k + token * stride_kt + dim[None, :])
            values = tl.load(v + token * stride_vt + dim[None, :])

    scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if SOFTCAP or ALIBI:
        scores *= scale
        scale = 1.0
        if SOFTCAP:
            scores = cap(scores * LN2, softcap) * LOG2E
        if ALIBI:
            scores += slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
    if MASKED:
        scores = tl.where(sees(position, key, length, window_left, window_right, LEFT, RIGHT), scores, float("-inf"))

    probabilities, shrink, running_max, running_sum = softmax_step(scores, scale, running_max, running_sum)
    acc = tl.dot(lower(probabilities, values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return acc, running_max, running_sum


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "triton",
    validate: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend the last tokens of each sequence to its keys.

    Args:
        q: [T, H, D], the query tokens of all sequences, one after the other; float16, bfloat16 or float32
        k, v: [T_k, H_kv, D] in q's dtype
        cu_seqlens_q, cu_seqlens_k: [sequences + 1] int32, where each sequence starts in q, and in k and v
        others: as in `paged.attend`

    Returns:
        [T, H, D], and with `return_lse` also [H, T] float32, the natural logarithm of the softmax's sum.

    Raises:
        ValueError, TypeError: what does not fit, with the argument's name.
    """
    left, right = arguments.window(window_size, causal)
    out_dtype = arguments.contiguous(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, out, alibi_slopes, softmax_scale, softcap,
        impl, validate,
    )  # fmt: skip
    out = torch.empty_like(q, dtype=out_dtype) if out is None else out
    if impl == "eager":
        return eager.varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, (left, right), softcap, alibi_slopes, out, return_lse
        )
    tokens, heads, head_size = q.shape
    kv_heads, sequences = k.shape[1], len(cu_seqlens_q) - 1
    group = heads // kv_heads
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device) if return_lse else None
    if tokens == 0:
        return (out, lse) if return_lse else out
    arguments.refuse_interpreted_bfloat16(q)
    config = tuning.varlen(
        rows=max_seqlen_q * group, keys=max_seqlen_k, group=group, head_size=head_size, bytes_each=q.element_size()
    )  # fmt: skip
    block_q, block_d = config.block_m // group, max(16, triton.next_power_of_2(head_size))
    strides = (*k.stride()[:2], *v.stride()[:2])
    descriptor = config.descriptor and arguments.describable(k) and arguments.describable(v)
    if descriptor:
        k, v = (TensorDescriptor(x, x.shape, x.stride(), [config.tile, 1, block_d]) for x in (k, v))
    _varlen_kernel[((tokens // block_q + sequences) * kv_heads,)](
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, alibi_slopes,
        sequences, tokens, softmax_scale, softcap, left, right, *q.stride()[:2], *out.stride()[:2], *strides,
        KV_HEADS=kv_heads, GROUP=group, HEAD_SIZE=head_size, BLOCK_D=block_d,
        BLOCK_M=config.block_m, BLOCK_Q=block_q, TILE=config.tile,
        LEFT=left >= 0, RIGHT=right >= 0, SOFTCAP=softcap > 0, ALIBI=alibi_slopes is not None,
        LSE=return_lse, DESCRIPTOR=descriptor, **config.options,
    )  # fmt: skip
    return (out, lse) if return_lse else out
