# SPDX-License-Identifier: Apache-2.0
"""The kernels' eager twins: the same arguments and results in plain torch and float32, in reading order.

They are what a kernel means, for a machine without Triton and for a reader. They are not the reference: that is
float64, and shares nothing with the kernels.
"""

import itertools

import torch


def gather(k_cache, v_cache, block_table, cu_seqlens_k, seq_starts, k_descale, v_descale, layout, k, v):
    """Twin of `gather.gather`; writes k and v, each [total_tokens, H_kv, D], and returns them."""
    offsets = cu_seqlens_k.tolist()
    first = [0] * len(block_table) if seq_starts is None else seq_starts.tolist()
    page_size = k_cache.shape[1] if layout == "NHD" else k_cache.shape[3]
    for sequence, (start, stop) in enumerate(itertools.pairwise(offsets)):
        key = first[sequence] + torch.arange(stop - start, device=k.device)  # [S]
        page, place = block_table[sequence, key // page_size].long(), key % page_size
        k[start:stop] = _dequantise(_keys(k_cache, page, place, layout), k_descale, sequence, page, place)
        v[start:stop] = _dequantise(_values(v_cache, page, place, layout), v_descale, sequence, page, place)
    return k, v


def _keys(cache, page, place, layout):
    if layout == "NHD":
        return cache[page, place]  # [S, H_kv, D]
    return cache[page, :, :, place].flatten(2)  # [S, H_kv, D // x, x] -> [S, H_kv, D]


def _values(cache, page, place, layout):
    if layout == "NHD":
        return cache[page, place]
    x = cache.shape[4]
    return cache[page, :, place // x, :, place % x]  # [S, H_kv, D]


def _dequantise(stored, descale, sequence, page, place):
    number = stored.float()
    if descale is None or descale.numel() == 1:
        return number if descale is None else number * descale
    return number * (descale[sequence, :, None] if descale.ndim == 2 else descale[page, place, :, None])


def paged(
    q, k_cache, v_cache, cu_seqlens_q, seqused_k, block_table, softmax_scale, window, softcap, alibi_slopes,
    k_descale, v_descale, layout, out, return_lse,
):  # fmt: skip
    """Twin of `paged.attend`: gather in float32, then attend."""
    offsets = torch.nn.functional.pad(seqused_k.cumsum(0, dtype=torch.int32), (1, 0))
    kv_heads = k_cache.shape[2] if layout == "NHD" else k_cache.shape[1]
    shape = (int(offsets[-1]), kv_heads, q.shape[2])
    k, v = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    gather(k_cache, v_cache, block_table, offsets, None, k_descale, v_descale, layout, k, v)
    return varlen(q, k, v, cu_seqlens_q, offsets, softmax_scale, window, softcap, alibi_slopes, out, return_lse)


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window, softcap, alibi_slopes, out, return_lse):
    """Twin of `varlen.attend`; `window` is (left, right) with causality already in it."""
    tokens, heads, _ = q.shape
    group = heads // k.shape[1]
    lse = torch.full((heads, tokens), float("-inf"), dtype=torch.float32, device=q.device)
    rows, columns = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for sequence in range(len(rows) - 1):
        row, column = slice(*rows[sequence : sequence + 2]), slice(*columns[sequence : sequence + 2])
        query = q[row].float()  # [T, H, D]
        keys = k[column].float().repeat_interleave(group, dim=1)  # [S, H, D]
        values = v[column].float().repeat_interleave(group, dim=1)
        key = torch.arange(len(keys), device=q.device)
        position = torch.arange(len(keys) - len(query), len(keys), device=q.device)[:, None]  # of each query
        logits = softmax_scale * torch.einsum("thd,shd->hts", query, keys)
        if softcap > 0:
            logits = softcap * torch.tanh(logits / softcap)
        if alibi_slopes is not None:
            logits += alibi_slopes[:, None, None] * (key - position)
        left, right = window
        hidden = torch.zeros(len(query), len(keys), dtype=torch.bool, device=q.device)
        if left >= 0:
            hidden |= key < position - left
        if right >= 0:
            hidden |= key > position + right
        logits = logits.masked_fill(hidden, float("-inf"))
        lse[:, row] = logits.logsumexp(-1)  # -inf where a query sees nothing
        probabilities = torch.exp(logits - lse[:, row, None]).masked_fill(hidden, 0.0)  # not -inf - -inf
        out[row] = torch.einsum("hts,shd->thd", probabilities, values).to(out.dtype)
    return (out, lse) if return_lse else out


def merge(partial_out, partial_lse, out, lse):
    """Twin of `merge.merge`; writes out and, unless it is None, lse."""
    partial_lse = partial_lse.masked_fill(partial_lse.isinf(), float("-inf"))  # flash-attn 2 marks empty parts +inf
    whole = partial_lse.logsumexp(0)  # [H, T]
    weights = torch.exp(partial_lse - whole).masked_fill(partial_lse == float("-inf"), 0.0)  # [S, H, T]
    parts = partial_out.float().masked_fill(weights.mT.unsqueeze(-1) == 0, 0.0)  # what was never written
    out.copy_(torch.einsum("sht,sthd->thd", weights, parts))
    if lse is not None:
        lse.copy_(whole)
