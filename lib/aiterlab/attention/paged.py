# SPDX-License-Identifier: Apache-2.0
"""Attend straight from vLLM's paged KV cache: prefill, extend, decode and verify, without gathering anything first.

One kernel. A program takes BLOCK_Q query tokens of one sequence with all heads of one group, and walks its share of
the keys through the block table. Where sequences x heads leave the machine idle, the keys are split over several
programs and `merge` joins their results, whatever the number of query tokens: a verify step of speculative decoding is
split like a decode step.
"""

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
    sequences, group = len(seqused_k), heads // sizes.kv_heads
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device) if return_lse else None
    if tokens == 0:
        return (out, lse) if return_lse else out
    arguments.refuse_interpreted_bfloat16(q)
    config = tuning.paged(
        rows=max_seqlen_q * group, pairs=sequences * sizes.kv_heads, group=group, head_size=head_size,
        kv_bytes=4 if q.dtype == torch.float32 else k_cache.element_size(), layout=layout,
    )  # fmt: skip
    block_q = config.block_m // group
    one_block = max_seqlen_q <= block_q
    blocks = sequences if one_block else tokens // block_q + sequences
    visible = max_seqlen_k if left < 0 else min(max_seqlen_k, left + 1 + max_seqlen_q)
    programs = max(sequences, -(-tokens // block_q)) * sizes.kv_heads
    splits = tuning.splits(q.device, config, programs=programs, keys=visible)
    partial, partial_lse = out, lse
    if splits > 1:
        partial = torch.empty(splits, tokens, heads, head_size, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(splits, heads, tokens, dtype=torch.float32, device=q.device)
    encoding, k_cache, v_cache = arguments.encoding(k_cache, v_cache)
    _paged_kernel[(blocks * sizes.kv_heads, splits)](
        q, k_cache, v_cache, partial, partial_lse,
        cu_seqlens_q, seqused_k, block_table, alibi_slopes, k_descale, v_descale,
        sequences, tokens, softmax_scale, softcap, left, right,
        q.stride(0), q.stride(1), partial.stride(-3), partial.stride(-2),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(1 if layout == "SHUFFLE" else 2), block_table.stride(0),
        *arguments.scale_strides(k_descale, v_descale),
        KV_HEADS=sizes.kv_heads, GROUP=group, HEAD_SIZE=head_size, BLOCK_D=max(16, triton.next_power_of_2(head_size)),
        PAGE=sizes.page, X=16 // k_cache.element_size(), BLOCK_M=config.block_m, BLOCK_Q=block_q, TILE=config.tile,
        LEFT=left >= 0, RIGHT=right >= 0, SOFTCAP=softcap > 0, ALIBI=alibi_slopes is not None,
        ENCODING=encoding, K_SCALES=arguments.granularity(k_descale), V_SCALES=arguments.granularity(v_descale),
        SHUFFLED=layout == "SHUFFLE", SPLIT=splits > 1, CHAINED=splits > 1 and tuning.chained(),
        LSE=partial_lse is not None, ONE_BLOCK=one_block, VALUE_DTYPE=TRITON_DTYPES[out.dtype], **config.options,
    )  # fmt: skip
    if splits > 1:
        merge.merge(partial, partial_lse, out=out, lse=lse)
    return (out, lse) if return_lse else out
