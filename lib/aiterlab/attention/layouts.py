# SPDX-License-Identifier: Apache-2.0
"""Where does a token's key and value lie in a paged KV cache, and as which number? Plain torch, on any device.

    NHD       k, v  [blocks, page, H_kv, D]
    SHUFFLE   k     [blocks, H_kv, D // x, page, x]
              v     [blocks, H_kv, page // x, D, x]      x = 16 // itemsize: the elements of one 16-byte load

SHUFFLE is vLLM's layout for AITER's assembly kernels (`reshape_and_cache_shuffle_triton` writes it and
`cp_mha_gather_cache` reads it, both in vllm/v1/attention/backends/rocm_aiter_fa.py).

A quantised cache holds float8 or int8 numbers; what they stand for is stored * descale. The descale is one number for
the tensor, or one per token and head: float32 [blocks, page, H_kv], in either layout.
"""

from __future__ import annotations

import torch

LAYOUTS = ("NHD", "SHUFFLE")
QUANTISED = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8)


def shapes(
    layout: str, blocks: int, page_size: int, kv_heads: int, head_size: int, itemsize: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the key cache and the value cache.

    Raises:
        ValueError: no such layout, or head or page are no multiple of SHUFFLE's 16 bytes.
    """
    if layout == "NHD":
        return ((blocks, page_size, kv_heads, head_size),) * 2
    if layout != "SHUFFLE":
        raise ValueError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    x = 16 // itemsize
    if head_size % x or page_size % x:
        raise ValueError(f"SHUFFLE needs head size {head_size} and page size {page_size} to be multiples of {x}")
    return (blocks, kv_heads, head_size // x, page_size, x), (blocks, kv_heads, page_size // x, head_size, x)


def page_size(k_cache: torch.Tensor, layout: str) -> int:
    """Tokens in a page of this key cache."""
    return k_cache.shape[1 if layout == "NHD" else 3]


def locate(block_table: torch.Tensor, lengths: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the block and the offset in it of every token, one sequence after the other.

    Args:
        block_table: [sequences, pages] integers
        lengths: [sequences] tokens of each, from its first

    Returns:
        Two int64 tensors [sum of lengths].
    """
    lengths = lengths.to(block_table.device, torch.int64)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    starts = lengths.cumsum(0) - lengths
    position = torch.arange(len(sequence), device=lengths.device) - starts[sequence]
    return block_table[sequence, position // page_size].long(), position % page_size


def write(
    cache: torch.Tensor, part: str, tokens: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor, layout: str
) -> None:
    """Store `tokens` [tokens, H_kv, D], already of the cache's dtype, at `blocks` and `offsets` [tokens].

    Args:
        part: "k" or "v", which SHUFFLE stores in different orders
    """
    view, index = _by_token(cache, part, blocks, offsets, layout)
    view[index] = _bytes(tokens).reshape(len(tokens), *view.shape[len(index) :])


def read(cache: torch.Tensor, part: str, blocks: torch.Tensor, offsets: torch.Tensor, layout: str) -> torch.Tensor:
    """The numbers [tokens, H_kv, D] as stored at `blocks` and `offsets` [tokens]."""
    view, index = _by_token(cache, part, blocks, offsets, layout)
    found = view[index]
    return (found.flatten(2) if found.dim() > 3 else found).view(cache.dtype)


def quantise(values: torch.Tensor, dtype: torch.dtype, scales: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Round `values` [tokens, H_kv, D] to a quantised dtype whose range they fill.

    Args:
        scales: "tensor" or "token_head"

    Returns:
        The stored numbers, and the float32 descale: [1], or [tokens, H_kv].
    """
    largest = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    amplitude = values.abs().amax(dim=-1).float()  # [tokens, H_kv]
    if scales == "tensor":
        amplitude = amplitude.max()[None] if amplitude.numel() else amplitude.new_ones(1)
    descale = amplitude.clamp(min=1e-20) / largest  # zeros alone have a descale too
    scaled = values.float() / (descale[..., None] if scales == "token_head" else descale)
    scaled = scaled.clamp_(-largest, largest)  # the division may round up
    return (scaled if dtype.is_floating_point else scaled.round_()).to(dtype), descale


def dequantise(
    stored: torch.Tensor,
    descale: torch.Tensor | None,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What `stored` [tokens, H_kv, D], read at `blocks` and `offsets`, stands for; multiplied in float32 or wider."""
    if descale is None:
        return stored.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    factor = descale.reshape(()) if descale.numel() == 1 else descale[blocks, offsets][..., None]
    return (stored.to(wide) * factor.to(wide)).to(dtype)


def gather(
    cache: torch.Tensor,
    part: str,
    descale: torch.Tensor | None,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
    layout: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Read and dequantise: the tokens [tokens, H_kv, D] at `blocks` and `offsets` [tokens] as numbers of `dtype`."""
    return dequantise(read(cache, part, blocks, offsets, layout), descale, blocks, offsets, dtype)


def _by_token(cache: torch.Tensor, part: str, blocks: torch.Tensor, offsets: torch.Tensor, layout: str):
    """A view of the cache and the index of its first dimensions at which each token's heads lie."""
    cache = _bytes(cache)
    if layout == "NHD":
        return cache, (blocks, offsets)  # [blocks, page, H, D]
    if layout != "SHUFFLE":
        raise ValueError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    if part == "k":
        return cache.permute(0, 3, 1, 2, 4), (blocks, offsets)  # [blocks, page, H, D // x, x]
    x = cache.shape[-1]
    return cache.permute(0, 2, 4, 1, 3), (blocks, offsets // x, offsets % x)  # [blocks, page // x, x, H, D]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Float8 as plain bytes: torch indexes those on every device."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
