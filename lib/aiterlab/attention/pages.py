# SPDX-License-Identifier: Apache-2.0
"""Where a token lies in vLLM's paged KV cache, in both layouts, and how its stored numbers are read.

NHD keeps a token's head together: [page, place, head, dim]. SHUFFLE keeps X numbers (16 bytes) together, along the dim
for keys, [page, head, dim // X, place, X], and along the tokens for values, [page, head, place // X, dim, X].
"""

import triton
import triton.language as tl
from triton.language.target_info import is_hip, is_hip_cdna4


@triton.jit
def page_of(block_table, key, PAGE: tl.constexpr):
    """Page in the cache of each key; keys are not negative, which spares the sign's share of the division."""
    return tl.load(block_table + key.to(tl.uint32) // PAGE)


@triton.jit
def load_heads(cache, token, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load [TILE, BLOCK_D] from an NHD cache; `token` [TILE] is where each token's head starts."""
    dim = tl.arange(0, BLOCK_D)
    pointers = cache + token[:, None] + dim[None, :]
    if BLOCK_D == HEAD_SIZE:
        return tl.load(pointers)
    return tl.load(pointers, mask=(dim < HEAD_SIZE)[None, :], other=0.0)


@triton.jit
def load_shuffled_keys(
    cache, page, place, stride_page, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, X: tl.constexpr
):  # fmt: skip
    """Load [TILE, BLOCK_D] from a SHUFFLE key cache, in the order of its memory: [BLOCK_D // X, TILE, X]."""
    chunk = tl.arange(0, BLOCK_D // X)
    token = page.to(tl.int64) * stride_page + place * X
    pointers = cache + token[None, :, None] + (chunk * (PAGE * X))[:, None, None] + tl.arange(0, X)[None, None, :]
    if BLOCK_D == HEAD_SIZE:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(chunk * X < HEAD_SIZE)[:, None, None], other=0.0)
    return tl.permute(tile, (1, 0, 2)).reshape(place.shape[0], BLOCK_D)


@triton.jit
def load_shuffled_values(
    cache, page, place, stride_page, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, X: tl.constexpr
):  # fmt: skip
    """Load [groups * X, BLOCK_D] from a SHUFFLE value cache; page and place are those of each group of X tokens."""
    dim = tl.arange(0, BLOCK_D)
    group = page.to(tl.int64) * stride_page + place // X * (HEAD_SIZE * X)
    pointers = cache + group[:, None, None] + (dim * X)[None, :, None] + tl.arange(0, X)[None, None, :]
    if BLOCK_D == HEAD_SIZE:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(dim < HEAD_SIZE)[None, :, None], other=0.0)
    return tl.permute(tile, (0, 2, 1)).reshape(place.shape[0] * X, BLOCK_D)


@triton.jit
def decode(stored, dtype: tl.constexpr, ENCODING: tl.constexpr):
    """Bring a tile of the cache to the dtype of the matrix units; its scale is applied later.

    Every fp8 and int8 number is exact in float16. Where the hardware does not convert a format, Triton would emulate
    it with hundreds of instructions (e4m3fn before CDNA 4), or not load it (e4m3fnuz but on CDNA 3): its bits move.
    """
    if ENCODING == "e4m3fnuz bits":
        return tl.where(stored == 0x80, float("nan"), _widen(stored) * 128.0).to(dtype)
    if stored.dtype == tl.float8e4nv and is_hip() and not is_hip_cdna4():
        bits = stored.to(tl.uint8, bitcast=True)
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), _widen(bits) * 256.0).to(dtype)
    return stored.to(dtype)


@triton.jit
def _widen(bits):
    """The float16 whose sign, exponent and mantissa are those of an fp8 number with four exponent bits.

    The exponents' biases differ, so the number is too small by a power of two: 2**7 for e4m3fnuz, 2**8 for e4m3fn.
    """
    return (((bits.to(tl.uint16) << 8).to(tl.int16, bitcast=True) >> 1) & -0x4001).to(tl.float16, bitcast=True)


@triton.jit
def fit_float16(query, FLOAT32: tl.constexpr):
    """Bring each query row below 1 by a power of two, exactly, and return that factor [BLOCK_M].

    Against a quantised cache queries are multiplied as float16, which has more digits than bfloat16 but less range.
    """
    wide = query.to(tl.float32)
    largest = tl.max(tl.abs(wide), 1)
    power = tl.ceil(tl.log2(tl.where(largest > 0, largest, 1.0)))
    return (wide * tl.exp2(-power)[:, None]).to(tl.float32 if FLOAT32 else tl.float16), tl.exp2(power)


@triton.jit
def tensor_scale(descale, offset, SCALES: tl.constexpr):
    """The scale of all keys of a program: one number of the tensor, or of the sequence and head at `offset`."""
    if SCALES == "tensor":
        return tl.maximum(tl.load(descale), 1e-30)  # 0 would make NaN of a masked score
    elif SCALES == "sequence":
        return tl.maximum(tl.load(descale + offset), 1e-30)
    else:
        return 1.0
