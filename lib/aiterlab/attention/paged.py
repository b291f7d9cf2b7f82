# SPDX-License-Identifier: Apache-2.0
"""Attend straight from vLLM's paged KV cache: prefill, extend, decode and verify, without gathering anything first.

One kernel. A program takes BLOCK_Q query tokens of one sequence with all heads of one group, and walks its share of
the keys through the block table. Where sequences x heads leave the machine idle, the keys are split over several
programs and `merge` joins their results, whatever the number of query tokens: a verify step of speculative decoding is
split like a decode step.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from aiterlab.attention import arguments, eager, merge, tuning
from aiterlab.attention.pages import (
    decode,
    fit_float16,
    load_heads,
    load_shuffled_keys,
    load_shuffled_values,
    page_of,
    tensor_scale,
)
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

TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


# Numbers that differ from batch to batch must not make new kernels.
@triton.jit(do_not_specialize=["sequences", "tokens", "softcap", "window_left", "window_right", "stride_table"])
def _paged_kernel(
    q, k_cache, v_cache, out, lse,
    cu_seqlens_q, seqused_k, block_table, alibi_slopes, k_descale, v_descale,
    sequences, tokens, softmax_scale, softcap, window_left, window_right,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_page, stride_place, stride_head, stride_table,
    stride_s0, stride_s1, stride_s2,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr, X: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, TILE: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    ENCODING: tl.constexpr, K_SCALES: tl.constexpr, V_SCALES: tl.constexpr, SHUFFLED: tl.constexpr,
    SPLIT: tl.constexpr, CHAINED: tl.constexpr, LSE: tl.constexpr, ONE_BLOCK: tl.constexpr, VALUE_DTYPE: tl.constexpr,
):  # fmt: skip
    # Neighbours are the heads of one block: they read the same pages, and on MI300X each head stays on one die.
    kv_head = tl.program_id(0) % KV_HEADS
    # The last blocks of a causal prefill have the most keys: they start first, so that none is left alone at the end.
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // KV_HEADS
    split = tl.program_id(1)
    sequence = block if ONE_BLOCK else find_sequence(cu_seqlens_q, block, sequences, BLOCK_Q)
    start = tl.load(cu_seqlens_q + sequence)
    queries = tl.load(cu_seqlens_q + sequence + 1) - start
    # of this program's tokens, within the sequence
    first = 0 if ONE_BLOCK else (block - start // BLOCK_Q - sequence) * BLOCK_Q
    if first >= queries:
        return
    length = tl.load(seqused_k + sequence)
    context = length - queries
    position, head, row, is_row = rows(first, queries, context, start, kv_head, GROUP, BLOCK_M, BLOCK_Q)
    dim = tl.arange(0, BLOCK_D)
    is_element = is_row[:, None] & (dim < HEAD_SIZE)[None, :]
    low, high = visible_keys(
        context + first, tl.minimum(BLOCK_Q, queries - first), length, window_left, window_right, LEFT, RIGHT
    )
    first_key = low
    low = low // TILE * TILE
    if SPLIT:
        share = tl.cdiv(tl.cdiv(high - low, TILE), tl.num_programs(1)) * TILE
        low = low + split * share
        high = tl.minimum(high, low + share)
        out += split.to(tl.int64) * tokens * stride_ot
        lse += split.to(tl.int64) * tokens * (GROUP * KV_HEADS)
    if low >= high:
        if LSE:
            tl.store(lse + head.to(tl.int64) * tokens + row, float("-inf"), mask=is_row)
        if not SPLIT:  # `merge` does not read a part without keys
            nothing = tl.zeros([BLOCK_M, BLOCK_D], out.dtype.element_ty)
            tl.store(elements(out, row, head, stride_ot, stride_oh, BLOCK_D), nothing, mask=is_element)
        return

    query = tl.load(elements(q, row, head, stride_qt, stride_qh, BLOCK_D), mask=is_element, other=0.0)
    scale = softmax_scale * LOG2E
    value_scale = 1.0
    row_scale = tl.full([BLOCK_M], 1.0, tl.float32)
    if ENCODING != "":
        query, row_scale = fit_float16(query, tl.float32 == VALUE_DTYPE)
        scale *= tensor_scale(k_descale, sequence * stride_s0 + kv_head * stride_s1, K_SCALES)
        value_scale = tensor_scale(v_descale, sequence * stride_s0 + kv_head * stride_s1, V_SCALES)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if ALIBI:
        slope = tl.load(alibi_slopes + head, mask=is_row, other=0.0) * LOG2E

    block_table += sequence.to(tl.int64) * stride_table
    k_cache += kv_head.to(tl.int64) * stride_head
    v_cache += kv_head.to(tl.int64) * stride_head
    if K_SCALES == "token":
        k_descale += kv_head * stride_s2
    if V_SCALES == "token":
        v_descale += kv_head * stride_s2
    # Tiles that every row sees whole come first and need no mask.
    full = low
    if not LEFT:
        full = tl.minimum(high, context + first + window_right + 1) if RIGHT else high
        full = low + tl.maximum(full - low, 0) // TILE * TILE
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    key = low + tl.arange(0, TILE)
    page = page_of(block_table, tl.minimum(tl.maximum(key, first_key), high - 1), PAGE)
    for tile in tl.range(low, full, TILE):
        acc, running_max, running_sum, page = _tile(
            tile, first_key, high, False, query, acc, running_max, running_sum, page,
            k_cache, v_cache, block_table, k_descale, v_descale, position, scale, row_scale, slope, softcap,
            window_left, window_right, stride_page, stride_place, stride_s0, stride_s1,
            HEAD_SIZE, BLOCK_D, PAGE, X, TILE, LEFT, RIGHT, SOFTCAP, ALIBI,
            ENCODING, K_SCALES, V_SCALES, SHUFFLED, VALUE_DTYPE,
        )  # fmt: skip
    if BLOCK_M >= 128:
        # So many rows leave no register over: what they are is looked up again, not kept through the loop above.
        start = tl.load(cu_seqlens_q + sequence)
        queries = tl.load(cu_seqlens_q + sequence + 1) - start
        position, head, row, is_row = rows(first, queries, context, start, kv_head, GROUP, BLOCK_M, BLOCK_Q)
        is_element = is_row[:, None] & (dim < HEAD_SIZE)[None, :]
    for tile in tl.range(full, high, TILE):
        acc, running_max, running_sum, page = _tile(
            tile, first_key, high, True, query, acc, running_max, running_sum, page,
            k_cache, v_cache, block_table, k_descale, v_descale, position, scale, row_scale, slope, softcap,
            window_left, window_right, stride_page, stride_place, stride_s0, stride_s1,
            HEAD_SIZE, BLOCK_D, PAGE, X, TILE, LEFT, RIGHT, SOFTCAP, ALIBI,
            ENCODING, K_SCALES, V_SCALES, SHUFFLED, VALUE_DTYPE,
        )  # fmt: skip

    if CHAINED:
        gdc_launch_dependents()  # `merge` may take its place on the machine, and waits there
    result, row_lse = finish(acc, running_max, running_sum)
    result = (result * value_scale).to(out.dtype.element_ty)
    tl.store(elements(out, row, head, stride_ot, stride_oh, BLOCK_D), result, mask=is_element)
    if LSE:
        tl.store(lse + head.to(tl.int64) * tokens + row, row_lse, mask=is_row)


@triton.jit
def _tile(
    tile, low, high, MASKED: tl.constexpr, query, acc, running_max, running_sum, page,
    k_cache, v_cache, block_table, k_descale, v_descale, position, scale, row_scale, slope, softcap,
    window_left, window_right, stride_page, stride_place, stride_s0, stride_s1,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, X: tl.constexpr, TILE: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    ENCODING: tl.constexpr, K_SCALES: tl.constexpr, V_SCALES: tl.constexpr, SHUFFLED: tl.constexpr,
    VALUE_DTYPE: tl.constexpr,
):  # fmt: skip
    """One tile of keys: load, scores, softmax, accumulate."""
    key = tl.multiple_of(tile, TILE) + tl.arange(0, TILE)
    # The next tile's pages are looked up now, so that no load ever waits for the block table.
    next_page = page_of(block_table, tl.minimum(key + TILE, high - 1), PAGE)
    if MASKED:
        # Outside [low, high) the nearest key inside is read in its place: a page behind the end may hold anything, and
        # a value that is NaN stays NaN under weight 0.
        place = tl.minimum(tl.maximum(key, low), high - 1) % PAGE
    elif TILE < PAGE:
        place = key % PAGE
    else:
        place = tl.arange(0, TILE) % PAGE  # the same in every round
    if SHUFFLED:
        k = load_shuffled_keys(k_cache, page, place, stride_page, HEAD_SIZE, BLOCK_D, PAGE, X)
        group = tl.multiple_of(tile, TILE) + tl.arange(0, TILE // X) * X
        group = tl.minimum(tl.maximum(group, low), high - 1) if MASKED else group
        v = load_shuffled_values(
            v_cache, page_of(block_table, group, PAGE), group % PAGE, stride_page, HEAD_SIZE, BLOCK_D, X
        )
        if MASKED:  # a group of X tokens is read whole
            v = tl.where(((key >= low) & (key < high))[:, None], v, tl.zeros([1, 1], v.dtype))
    else:
        token = page.to(tl.int64) * stride_page + place * stride_place
        k = load_heads(k_cache, token, HEAD_SIZE, BLOCK_D)
        v = load_heads(v_cache, token, HEAD_SIZE, BLOCK_D)
    k = decode(k, query.dtype, ENCODING)
    v = decode(v, query.dtype, ENCODING)

    scores = tl.dot(query, tl.trans(k), input_precision="ieee")
    if ENCODING != "":
        scores *= row_scale[:, None]
    if K_SCALES == "token":
        scores *= tl.load(k_descale + page.to(tl.int64) * stride_s0 + place * stride_s1)[None, :]
    if SOFTCAP or ALIBI:
        scores *= scale
        scale = 1.0
        if SOFTCAP:
            scores = cap(scores * LN2, softcap) * LOG2E
        if ALIBI:
            scores += slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
    if MASKED:
        scores = tl.where(sees(position, key, high, window_left, window_right, LEFT, RIGHT), scores, float("-inf"))

    probabilities, shrink, running_max, running_sum = softmax_step(scores, scale, running_max, running_sum)
    if V_SCALES == "token":
        # Not on the probabilities: scaled, they would leave float16's range.
        v_scale = tl.load(v_descale + page.to(tl.int64) * stride_s0 + place * stride_s1)
        v = (v.to(tl.float32) * v_scale[:, None]).to(VALUE_DTYPE)
    acc = tl.dot(lower(probabilities, v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, running_max, running_sum, next_page


class Cut(NamedTuple):
    """How a batch is cut into programs. It follows from numbers alone, so a caller may keep it for batches alike."""

    config: tuning.Config
    block_q: int  # query tokens of a program
    one_block: bool  # no sequence has more query tokens than that
    blocks: int  # of query tokens, over all sequences
    splits: int  # programs that share the keys of a block


def cut(
    device: torch.device, *, tokens: int, sequences: int, max_seqlen_q: int, max_seqlen_k: int,
    heads: int, kv_heads: int, head_size: int, kv_bytes: int, layout: str = "NHD", left: int = -1,
) -> Cut:  # fmt: skip
    """Cut a batch into programs; the lengths are upper bounds, and `left` is how many earlier keys a query sees."""
    group = heads // kv_heads
    config = tuning.paged(
        rows=max_seqlen_q * group, pairs=sequences * kv_heads, group=group, head_size=head_size, kv_bytes=kv_bytes,
        layout=layout,
    )  # fmt: skip
    block_q = config.block_m // group
    one_block = max_seqlen_q <= block_q
    visible = max_seqlen_k if left < 0 else min(max_seqlen_k, left + 1 + max_seqlen_q)
    programs = max(sequences, -(-tokens // block_q)) * kv_heads
    splits = tuning.splits(device, config, programs=programs, keys=visible)
    return Cut(config, block_q, one_block, sequences if one_block else tokens // block_q + sequences, splits)


def kernel_arguments(
    cut: Cut, q, k_cache, v_cache, out, lse, cu_seqlens_q, seqused_k, block_table, *, softmax_scale, softcap, window,
    alibi_slopes, k_descale, v_descale, layout, dtype,
) -> list[Any]:  # fmt: skip
    """List the kernel's arguments in its own order; `out` and `lse` are partial results where the keys are split."""
    encoding, k_cache, v_cache = arguments.encoding(k_cache, v_cache)
    shuffled = layout == "SHUFFLE"
    tokens, heads, head_size = q.shape
    page, kv_heads = (k_cache.shape[3], k_cache.shape[1]) if shuffled else k_cache.shape[1:3]
    return [
        q, k_cache, v_cache, out, lse, cu_seqlens_q, seqused_k, block_table, alibi_slopes, k_descale, v_descale,
        len(seqused_k), tokens, softmax_scale, softcap, *window,
        q.stride(0), q.stride(1), out.stride(-3), out.stride(-2),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(1 if shuffled else 2), block_table.stride(0),
        *arguments.scale_strides(k_descale, v_descale),
        # KV_HEADS, GROUP, HEAD_SIZE, BLOCK_D, PAGE, X, BLOCK_M, BLOCK_Q, TILE
        kv_heads, heads // kv_heads, head_size, max(16, triton.next_power_of_2(head_size)),
        page, 16 // k_cache.element_size(), cut.config.block_m, cut.block_q, cut.config.tile,
        # LEFT, RIGHT, SOFTCAP, ALIBI, ENCODING, K_SCALES, V_SCALES, SHUFFLED
        window[0] >= 0, window[1] >= 0, softcap > 0, alibi_slopes is not None,
        encoding, arguments.granularity(k_descale), arguments.granularity(v_descale), shuffled,
        # SPLIT, CHAINED, LSE, ONE_BLOCK, VALUE_DTYPE
        cut.splits > 1, cut.splits > 1 and tuning.chained(), lse is not None, cut.one_block, TRITON_DTYPES[dtype],
    ]  # fmt: skip


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    layout: str = "NHD",
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "triton",
    validate: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend new tokens to the paged KV cache that already holds them.

    Args:
        q: [T, H, D], the new tokens of all sequences, one after the other; float16, bfloat16, float32, or fp8 with an
            fp8 cache
        k_cache, v_cache: with the same strides; NHD [blocks, page, H_kv, D]; SHUFFLE [blocks, H_kv, D // x, page, x]
            and [blocks, H_kv, page // x, D, x] with x = 16 bytes. In q's dtype, or float8_e4m3fn, float8_e4m3fnuz, int8
        cu_seqlens_q: [sequences + 1] int32, where each sequence's tokens start in q
        seqused_k: [sequences] int32, keys of each sequence, its new tokens included
        block_table: [sequences, pages] int32, pages of each sequence; entries behind its end are never read
        max_seqlen_q, max_seqlen_k: upper bounds of tokens and keys of one sequence; they size the grid
        softmax_scale: factor on the logits, positive
        causal: no query sees a later key
        window_size: keys to the left and right of its own position that a query sees; -1: all
        softcap: c > 0 makes logits c * tanh(logits / c)
        alibi_slopes: [H] float32; adds slope * (key position - query position) to the logits
        k_descale, v_descale: stored * descale is the value; float32, one element, [sequences, H_kv] or
            [blocks, page, H_kv]
        layout: "NHD" or "SHUFFLE"
        out: [T, H, D] to write into; in q's dtype where it is made here
        return_lse: also return the natural logarithm of the softmax's sum, [H, T] float32
        impl: "triton", or "eager" for the formula in plain torch
        validate: look at the lengths and the block table before the launch. This waits for the device, and is left out
            while a CUDA graph is captured; what it checks is then the caller's promise

    Raises:
        ValueError, TypeError: what does not fit, with the argument's name.
    """
    left, right = arguments.window(window_size, causal)
    sizes = arguments.paged(
        q, k_cache, v_cache, cu_seqlens_q, seqused_k, block_table, max_seqlen_q, max_seqlen_k, layout, out,
        alibi_slopes, k_descale, v_descale, softmax_scale, softcap, impl, validate,
    )  # fmt: skip
    out = torch.empty_like(q, dtype=sizes.out_dtype) if out is None else out
    if impl == "eager":
        return eager.paged(
            q, k_cache, v_cache, cu_seqlens_q, seqused_k, block_table, softmax_scale, (left, right), softcap,
            alibi_slopes, k_descale, v_descale, layout, out, return_lse,
        )  # fmt: skip
    tokens, heads, head_size = q.shape
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device) if return_lse else None
    if tokens == 0:
        return (out, lse) if return_lse else out
    arguments.refuse_interpreted_bfloat16(q)
    plan = cut(
        q.device, tokens=tokens, sequences=len(seqused_k), max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        heads=heads, kv_heads=sizes.kv_heads, head_size=head_size, layout=layout, left=left,
        kv_bytes=4 if q.dtype == torch.float32 else k_cache.element_size(),
    )  # fmt: skip
    partial, partial_lse = out, lse
    if plan.splits > 1:
        partial = torch.empty(plan.splits, tokens, heads, head_size, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(plan.splits, heads, tokens, dtype=torch.float32, device=q.device)
    _paged_kernel[(plan.blocks * sizes.kv_heads, plan.splits)](
        *kernel_arguments(
            plan, q, k_cache, v_cache, partial, partial_lse, cu_seqlens_q, seqused_k, block_table,
            softmax_scale=softmax_scale, softcap=softcap, window=(left, right), alibi_slopes=alibi_slopes,
            k_descale=k_descale, v_descale=v_descale, layout=layout, dtype=out.dtype,
        ),
        **plan.config.options,
    )  # fmt: skip
    if plan.splits > 1:
        merge.merge(partial, partial_lse, out=out, lse=lse)
    return (out, lse) if return_lse else out
