# SPDX-License-Identifier: Apache-2.0
"""The formula every attention result is compared with: softmax(scale * Q K^T) V in float64."""

from __future__ import annotations

import torch


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend the last tokens of one sequence causally to all of its tokens.

    Args:
        query: [T, H, D], the last T of the sequence's S tokens
        key, value: [S, H_kv, D]; H is a multiple of H_kv (grouped-query attention)
        scale: factor on the logits, usually D ** -0.5

    Returns:
        [T, H, D] in float64.
    """
    tokens, heads, _ = query.shape
    length, kv_heads, _ = key.shape
    keys = key.double().repeat_interleave(heads // kv_heads, dim=1)  # [S, H, D]
    values = value.double().repeat_interleave(heads // kv_heads, dim=1)
    logits = scale * torch.einsum("thd,shd->hts", query.double(), keys)  # [H, T, S]
    position = torch.arange(length - tokens, length)[:, None]  # of each query token
    logits = logits.masked_fill(torch.arange(length)[None, :] > position, float("-inf"))
    return torch.einsum("hts,shd->thd", logits.softmax(dim=-1), values)


def tolerance(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> float:
    """The largest error that a correct implementation in the inputs' dtype may show, as an absolute number.

    Taken from the data, not from taste: twice the float64 error of a plain implementation that rounds the
    probabilities and the output to the inputs' dtype, plus two roundings of the largest output. A blocked kernel
    rounds a few more times than the plain one; a wrong mask, scale or page misses by orders of magnitude.
    """
    expected = attend(query, key, value, scale)
    tokens, heads, _ = query.shape
    length, kv_heads, _ = key.shape
    keys = key.float().repeat_interleave(heads // kv_heads, dim=1)
    values = value.float().repeat_interleave(heads // kv_heads, dim=1)
    logits = scale * torch.einsum("thd,shd->hts", query.float(), keys)
    position = torch.arange(length - tokens, length)[:, None]
    logits = logits.masked_fill(torch.arange(length)[None, :] > position, float("-inf"))
    probabilities = logits.softmax(dim=-1).to(query.dtype).float()
    plain = torch.einsum("hts,shd->thd", probabilities, values).to(query.dtype)
    rounding = torch.finfo(query.dtype).eps * expected.abs().max().item()
    return 2 * (plain.double() - expected).abs().max().item() + 2 * rounding
