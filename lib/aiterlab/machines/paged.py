# SPDX-License-Identifier: Apache-2.0
"""Decode attention over a paged KV cache in NumPy: the arithmetic behind two stand-ins for compiled kernels."""

from __future__ import annotations


def attend_paged(queries, key_cache, value_cache, block_tables, context_lens, scale: float):
    """Attend one query token per sequence to its cached context, in float32 and rounded once at the end.

    Args:
        queries: [sequences, heads, head_size]
        key_cache, value_cache: [blocks, page, kv_heads, head_size]; any strides
        block_tables: [sequences, blocks_per_sequence] integers
        context_lens: [sequences] integers, tokens per sequence, the query's own included
        scale: factor on the logits

    Returns:
        [sequences, heads, head_size] in the dtype of `queries`; a sequence without context gives zeros.
    """
    import numpy as np

    page = key_cache.shape[1]
    group = queries.shape[1] // key_cache.shape[2]
    out = np.zeros(queries.shape, np.float32)
    for i, length in enumerate(int(n) for n in context_lens):
        if length == 0:
            continue
        table = block_tables[i, : -(-length // page)]
        keys = np.repeat(np.concatenate(key_cache[table])[:length].astype(np.float32), group, axis=1)
        values = np.repeat(np.concatenate(value_cache[table])[:length].astype(np.float32), group, axis=1)
        logits = scale * np.einsum("hd,thd->ht", queries[i].astype(np.float32), keys)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        out[i] = np.einsum("ht,thd->hd", weights / weights.sum(axis=-1, keepdims=True), values)
    return out.astype(queries.dtype)
