# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels have in common: where a tile lies, who sees whom, and the online softmax.

A kernel's tile holds BLOCK_M rows of queries: BLOCK_Q tokens times the GROUP query heads that share a key head, so
that every key is read once for the whole group (grouped-query attention as matrix rows). Logits are kept in units of
log2, so that the exponential is the hardware's exp2.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_hip, is_hip_cdna4

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def find_sequence(cu_seqlens_q, block, sequences, BLOCK_Q: tl.constexpr):
    """Sequence of query block `block`: sequence i's blocks start at cu_seqlens_q[i] // BLOCK_Q + i.

    That numbering leaves a gap of at most one block behind each sequence and needs nothing but the offsets, so the grid
    is known without asking the device.
    """
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_q + middle) // BLOCK_Q + middle <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def rows(
    first, queries, context, start, kv_head, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr
):  # fmt: skip
    """What the rows of a tile are: position in the sequence, query head, row of q, and whether it exists."""
    row = tl.arange(0, BLOCK_M)
    token = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = (row < BLOCK_Q * GROUP) & (token < queries)
    return context + token, head, start + token, is_row


@triton.jit
def elements(tensor, row, head, stride_row, stride_head, BLOCK_D: tl.constexpr):
    """Pointers [BLOCK_M, BLOCK_D] to the rows of a [T, H, D] tensor; strides of a large one overflow 32 bits."""
    offset = row.to(tl.int64) * stride_row + head.to(tl.int64) * stride_head
    return tensor + offset[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def visible_keys(first, tokens, length, window_left, window_right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """First and one past the last key that any of the `tokens` queries from position `first` on sees."""
    low = 0
    high = length
    if LEFT:
        low = tl.minimum(tl.maximum(first - window_left, 0), length)
    if RIGHT:
        high = tl.minimum(first + tokens + window_right, length)
    return low, tl.maximum(high, low)


@triton.jit
def sees(position, key, length, window_left, window_right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Mask [BLOCK_M, TILE]: does the query at `position` see `key`?"""
    mask = (key < length)[None, :]
    if LEFT:
        mask &= key[None, :] >= position[:, None] - window_left
    if RIGHT:
        mask &= key[None, :] <= position[:, None] + window_right
    return mask


@triton.jit
def cap(logits, softcap):
    """softcap * tanh(logits / softcap): exp2 is portable where tanh is not, a series where that form cancels."""
    x = logits * (1 / softcap)
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * 62 / 2835))))
    whole = 1 - tl.fdiv(2.0, tl.exp2(2 * LOG2E * x) + 1)
    return softcap * tl.where(square < 0.04, series, whole)


@triton.jit
def softmax_step(scores, scale, running_max, running_sum):
    """Fold one tile of scores into the online softmax; `scale` brings scores to logits in units of log2.

    Returns the tile's probabilities relative to the new maximum, the factor that old sums shrink by, the new maximum
    and the new sum. A row that has seen no key keeps the maximum -inf, and must not compute -inf - -inf.
    """
    new_max = tl.maximum(running_max, tl.max(scores, 1) * scale)
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    probabilities = tl.exp2(scores * scale - safe_max[:, None])
    shrink = tl.exp2(running_max - safe_max)
    return probabilities, shrink, new_max, running_sum * shrink + tl.sum(probabilities, 1)


@triton.jit
def finish(acc, running_max, running_sum):
    """Divide by the softmax's sum; returns the output and the natural-log LSE. No visible key: 0 and -inf."""
    seen = running_sum > 0
    output = acc * tl.where(seen, 1 / tl.where(seen, running_sum, 1.0), 0.0)[:, None]
    lse = tl.where(seen, (running_max + tl.log2(tl.where(seen, running_sum, 1.0))) * LN2, float("-inf"))
    return output, lse


@triton.jit
def lower(probabilities, dtype: tl.constexpr):
    """Round probabilities to the dtype of the matrix units.

    AMD GPUs before CDNA 4 have no instruction for bfloat16, and rounding to even with its check for NaN takes them five
    per number. Probabilities are finite and positive: half a unit added, then cut off, is as near and takes two.
    """
    if dtype == tl.bfloat16 and is_hip() and not is_hip_cdna4():
        bits = probabilities.to(tl.uint32, bitcast=True) + 0x8000
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return probabilities.to(dtype)
