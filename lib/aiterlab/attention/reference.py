# SPDX-License-Identifier: Apache-2.0
"""The formula every attention result is compared with: softmax(scale * Q K^T) V in float64.

For one sequence of S tokens whose last T are queries, in reading order:

    logits = scale * Q K^T                          [H, T, S]
    logits = softcap * tanh(logits / softcap)       only with a soft cap
    logits = logits + slope * (key - query)         only with ALiBi: the distance of the positions, a slope per head
    logits = -inf where the mask forbids            causal: key > query; window: not query - left … query + right
    lse    = log sum exp logits                     [H, T], natural logarithm
    output = exp(logits - lse) V                    [T, H, D]

H is a multiple of H_kv (grouped-query attention): consecutive heads share one KV head. A row that sees no key is 0,
and its lse -inf. Queries may outnumber keys: then the first T - S of them stand before the first key.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from aiterlab.attention import layouts

CHUNK = 2**25  # logits at a time; in float64 a quarter of a GiB, a few times over


class Expected(NamedTuple):
    """The right answer, and how far from it a right implementation in the inputs' dtype may be."""

    output: torch.Tensor  # [T, H, D] float64
    lse: torch.Tensor  # [H, T] float64
    output_limit: torch.Tensor  # [T, H] float64: largest error of a row's D numbers
    lse_limit: torch.Tensor  # [H, T] float64


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    softmax_scale: float,
    *,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend the last tokens of one sequence to all of its tokens.

    Args:
        query: [T, H, D], the last T of the sequence's S tokens
        key, value: [S, H_kv, D]; H is a multiple of H_kv
        softmax_scale: factor on the logits, usually D ** -0.5
        window_size: keys visible to the left and right of the query's own; -1: all. Causal: none to the right
        softcap: 0: none
        alibi_slopes: [H]

    Returns:
        [T, H, D] in float64; with `return_lse` also [H, T] in float64.
    """
    options = {"causal": causal, "window_size": window_size, "softcap": softcap, "alibi_slopes": alibi_slopes}
    key, value = key.double(), value.double()
    parts = [
        _formula(query[rows].double(), key, value, positions, softmax_scale, **options)
        for rows, positions in _chunks(query, key)
    ]
    output, lse = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], dim=1)
    return (output, lse) if return_lse else output


def expect(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softmax_scale: float, **options) -> Expected:
    """Attend as `attend` does, and say for every row by how much a right implementation may miss it.

    The limits are taken from the data, not from taste. A row of the output may miss by twice the sum of

        the float64 error, in this row, of a plain implementation: the same formula in float32, with keys, values,
            probabilities and output rounded to the inputs' dtype. A blocked kernel rounds a few more times
        a rounding of the row's largest number to the inputs' dtype
        what a rounding of the logits to float32 does to the output; a logit is a sum of terms that may cancel, so its
            rounding is that of the longest query and key

    and its lse, which kernels keep in float32, by twice the sum of the plain error, a rounding of the lse to float32
    and that of the logits. A wrong mask, scale or page misses by orders of magnitude.

    Args:
        key, value: as in `attend`; of a quantised cache what its numbers stand for, in float64
        options: as in `attend`, without `return_lse`
    """
    rounding, float32_rounding = torch.finfo(query.dtype).eps, torch.finfo(torch.float32).eps
    plain_key, plain_value = (part.to(query.dtype).float() for part in (key, value))
    key, value = key.double(), value.double()
    value_and_size = torch.cat([value, value.abs()], dim=-1)  # [S, H_kv, 2 D]
    longest_key = key.norm(dim=-1).amax(dim=0) if len(key) else key.new_zeros(key.shape[1])  # [H_kv]
    longest_key = longest_key.repeat_interleave(query.shape[1] // key.shape[1])  # [H]
    parts = []
    for rows, positions in _chunks(query, key):
        row = query[rows]
        both, lse = _formula(row.double(), key, value_and_size, positions, softmax_scale, **options)
        output, size = both.chunk(2, dim=-1)
        plain_output, plain_lse = _formula(
            row.float(), plain_key, plain_value, positions, softmax_scale, **options, rounded_to=query.dtype
        )
        logit = softmax_scale * row.double().norm(dim=-1) * longest_key + options.get("softcap", 0.0)  # [T, H]
        logit_limit = float32_rounding * logit
        output_limit = (
            _distance(plain_output.to(query.dtype), output).amax(dim=-1)
            + rounding * output.abs().amax(dim=-1)
            + logit_limit * size.amax(dim=-1)  # to first order
        )
        lse_size = lse.abs().masked_fill(lse == float("-inf"), 0)
        lse_limit = _distance(plain_lse, lse) + float32_rounding * lse_size + logit_limit.T
        parts.append(Expected(output, lse, 2 * output_limit, 2 * lse_limit))
    return _together(parts)


def tolerance(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softmax_scale: float, **options) -> float:
    """The largest error that any row of a correct implementation may show, as one absolute number; see `expect`."""
    return expect(query, key, value, softmax_scale, **options).output_limit.max().item()


def expect_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    layout: str = "NHD",
    **options,
) -> Expected:
    """Do for a batch what `expect` does for a sequence, with keys and values in a paged cache.

    Args:
        q: [T, H, D], the new tokens of all sequences
        k_cache, v_cache, k_descale, v_descale, layout: see layouts.py
        cu_seqlens_q: [sequences + 1], where each sequence's new tokens start in q
        seqused_k: [sequences], tokens in the cache, the new ones included
        block_table: [sequences, pages]
        options: as in `attend`, without `return_lse`
    """
    page, parts = layouts.page_size(k_cache, layout), []
    for i, (start, stop) in enumerate(itertools.pairwise(cu_seqlens_q.tolist())):
        where = layouts.locate(block_table[i : i + 1], seqused_k[i : i + 1], page)
        key = layouts.gather(k_cache, "k", k_descale, *where, layout, torch.float64)
        value = layouts.gather(v_cache, "v", v_descale, *where, layout, torch.float64)
        parts.append(expect(q[start:stop], key, value, softmax_scale, **options))
    return _together(parts)


def _formula(
    query,
    key,
    value,
    positions,
    softmax_scale,
    causal=True,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    rounded_to=None,
):
    """The formula in the tensors' own dtype, for the queries at `positions` [T] of the sequence.

    Args:
        rounded_to: the dtype that a plain implementation rounds probabilities to

    Returns:
        [T, H, D] (or as wide as value is) and [H, T].
    """
    tokens, heads, _ = query.shape
    length, kv_heads, _ = key.shape
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
    logits = softmax_scale * torch.einsum("tkgd,skd->kgts", grouped, key).reshape(heads, tokens, length)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    distance = torch.arange(length, device=query.device) - positions[:, None]  # [T, S], key - query
    if alibi_slopes is not None:
        logits = logits + alibi_slopes.to(logits)[:, None, None] * distance
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    left, right = window_size
    if causal:
        hidden |= distance > 0
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    logits = logits.masked_fill(hidden, float("-inf"))

    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0)[..., None])  # rows without a key: 0
    if rounded_to is not None:
        weights = weights.to(rounded_to).to(logits.dtype)
    weights = weights.view(kv_heads, heads // kv_heads, tokens, length)
    return torch.einsum("kgts,skd->tkgd", weights, value).flatten(1, 2), lse


def _chunks(query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some query rows at a time, as many as CHUNK allows, with their positions in the sequence."""
    tokens, heads, _ = query.shape
    step = max(1, CHUNK // max(1, heads * len(key)))
    positions = torch.arange(len(key) - tokens, len(key), device=query.device)
    for start in range(0, max(1, tokens), step):  # at least one chunk, even of no rows
        rows = slice(start, start + step)
        yield rows, positions[rows]


def _together(parts: list[Expected]) -> Expected:
    """One answer for consecutive rows."""
    output, lse, output_limit, lse_limit = zip(*parts, strict=True)
    return Expected(torch.cat(output), torch.cat(lse, dim=1), torch.cat(output_limit), torch.cat(lse_limit, dim=1))


def _distance(computed: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Distance of each number; none where both are the same infinity."""
    return (computed.double() - expected).abs().masked_fill(computed == expected, 0)
