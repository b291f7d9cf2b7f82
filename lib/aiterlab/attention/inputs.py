# SPDX-License-Identifier: Apache-2.0
"""Which tensors does an attention implementation get for one workload? All of them, made from one seed.

What no implementation may use is made to show: cache slots outside every sequence hold NaN (int8: -128, which
quantising never gives; its descale per token and head: NaN), and unused entries of the block table name the first
block beyond the cache. Behind the cache lies one more block, all poison: an implementation that follows such an entry
reads NaN instead of ending the process.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from aiterlab.attention import layouts, reference

if TYPE_CHECKING:
    from aiterlab.attention.workloads import Workload

SPARE_BLOCKS = 3  # blocks of the cache that belong to no sequence


@dataclass
class Inputs:
    """The tensors and numbers of one step. T: all new tokens, one sequence after the other."""

    workload: Workload
    q: torch.Tensor  # [T, H, D]
    k_cache: torch.Tensor  # see layouts.py
    v_cache: torch.Tensor
    block_table: torch.Tensor  # [sequences, pages] int32
    cu_seqlens_q: torch.Tensor  # [sequences + 1] int32
    cu_seqlens_k: torch.Tensor  # [sequences + 1] int32
    seqused_k: torch.Tensor  # [sequences] int32, context + new
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    alibi_slopes: torch.Tensor | None  # [H] float32
    k_descale: torch.Tensor | None  # [1] or [blocks, page, H_kv], float32
    v_descale: torch.Tensor | None
    layout: str

    @property
    def options(self) -> dict:
        """What changes the formula, by the names that every launcher and the reference use."""
        return {
            "softmax_scale": self.softmax_scale,
            "causal": self.causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "alibi_slopes": self.alibi_slopes,
        }

    @property
    def paged(self) -> dict:
        """Where the keys and values are, by the names that every paged launcher and the reference use."""
        return {
            "cu_seqlens_q": self.cu_seqlens_q,
            "seqused_k": self.seqused_k,
            "block_table": self.block_table,
            "k_descale": self.k_descale,
            "v_descale": self.v_descale,
            "layout": self.layout,
        }

    @property
    def unified(self) -> dict:
        """What vLLM's unified attention and AITER's copy of it both take, by their names; output and scales are not."""
        return {
            "q": self.q,
            "k": self.k_cache,
            "v": self.v_cache,
            "cu_seqlens_q": self.cu_seqlens_q,
            "max_seqlen_q": self.max_seqlen_q,
            "seqused_k": self.seqused_k,
            "max_seqlen_k": self.max_seqlen_k,
            "block_table": self.block_table,
            "q_descale": None,
            **self.options,
        }

    @functools.cached_property
    def k(self) -> torch.Tensor:
        """Keys [sum of lengths, H_kv, D] without pages, dequantised to q's dtype; kept once made."""
        return self._contiguous(self.k_cache, "k", self.k_descale)

    @functools.cached_property
    def v(self) -> torch.Tensor:
        """Values, as `k`."""
        return self._contiguous(self.v_cache, "v", self.v_descale)

    def _contiguous(self, cache: torch.Tensor, part: str, descale: torch.Tensor | None) -> torch.Tensor:
        where = layouts.locate(self.block_table, self.seqused_k, self.workload.page_size)
        return layouts.gather(cache, part, descale, *where, self.layout, self.q.dtype)

    @functools.cached_property
    def _reference(self) -> reference.Expected:
        return reference.expect_paged(self.q, self.k_cache, self.v_cache, **self.paged, **self.options)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The right output [T, H, D] and log-sum-exp [H, T], in float64; kept once computed."""
        return self._reference.output, self._reference.lse

    def limits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The errors that a right implementation may show: of each row of the output [T, H], of the lse [H, T]."""
        return self._reference.output_limit, self._reference.lse_limit


def make(workload: Workload, seed: int, device: torch.device | str = "cpu", poison: bool = True) -> Inputs:
    """Draw the tensors of `workload` on `device`, from one seed (other numbers on another kind of device).

    Args:
        poison: fill unused cache slots with NaN; False: with zeros, as a new cache of vLLM's
    """
    w = workload
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, w.dtype)
    lengths = torch.tensor(w.lengths, dtype=torch.int32, device=device)
    q = torch.randn(w.tokens, w.heads, w.head_size, generator=generator, dtype=dtype, device=device)
    tokens = (sum(w.lengths), w.kv_heads, w.head_size)
    k = torch.randn(tokens, generator=generator, dtype=dtype, device=device)
    # Values twice as wide as keys: descales that are taken for one another show.
    v = 2 * torch.randn(tokens, generator=generator, dtype=dtype, device=device)
    if w.values == "large":  # logits of thousands
        q, k = 30 * q, 30 * k
    elif w.values == "outlier":  # one key far beyond all others, with a value to match
        k[len(k) // 2], v[len(v) // 2] = 100 * k[len(k) // 2], 5000.0

    pages = [-(-length // w.page_size) for length in w.lengths]
    blocks = sum(pages) + SPARE_BLOCKS
    block_table = torch.full((len(pages), max(1, *pages)), blocks, dtype=torch.int32, device=device)
    scattered = iter(torch.randperm(blocks, generator=generator, device=device)[: sum(pages)].int().split(pages))
    for row, count in zip(block_table, pages, strict=True):
        row[:count] = next(scattered)
    where = layouts.locate(block_table, lengths, w.page_size)

    k_cache, k_descale = _cache(w, "k", k, blocks, where, poison)
    v_cache, v_descale = _cache(w, "v", v, blocks, where, poison)
    return Inputs(
        workload=w,
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_table=block_table,
        cu_seqlens_q=_offsets(torch.tensor([new for _, new in w.sequences], device=device)),
        cu_seqlens_k=_offsets(lengths),
        seqused_k=lengths,
        max_seqlen_q=max(new for _, new in w.sequences),
        max_seqlen_k=max(w.lengths),
        softmax_scale=w.head_size**-0.5,
        causal=w.causal,
        window_size=w.window_size,
        softcap=w.softcap,
        alibi_slopes=_slopes(w.heads, device) if w.alibi else None,
        k_descale=k_descale,
        v_descale=v_descale,
        layout=w.layout,
    )


def _cache(w: Workload, part: str, values: torch.Tensor, blocks: int, where, poison: bool):
    """One of the two caches with its descale, filled at `where`."""
    descale = None
    if w.kv_dtype != "auto":
        values, descale = layouts.quantise(values, getattr(torch, w.kv_dtype), w.scales)
    nan = float("nan") if poison else 0.0
    k_shape, v_shape = layouts.shapes(w.layout, blocks + 1, w.page_size, w.kv_heads, w.head_size, values.element_size())
    unused = nan if values.dtype.is_floating_point else -128 * poison
    cache = torch.empty(k_shape if part == "k" else v_shape, dtype=values.dtype, device=values.device).fill_(unused)
    layouts.write(cache, part, values, *where, w.layout)
    if descale is not None and w.scales == "token_head":
        paged = torch.full((blocks + 1, w.page_size, w.kv_heads), nan, device=values.device)
        paged[where] = descale
        descale = paged[:blocks]
    return cache[:blocks], descale


def _offsets(counts: torch.Tensor) -> torch.Tensor:
    """Where each sequence starts, and the end: [sequences + 1] int32."""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def _slopes(heads: int, device) -> torch.Tensor:
    """ALiBi's slopes: 2 ** (-8 i / heads) for the heads i = 1, 2, …"""
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=device) / heads)
