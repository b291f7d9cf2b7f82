# SPDX-License-Identifier: Apache-2.0
"""Drive vLLM's real AITER backend through one decode, one prefill and one extend step, checked in float64.

Tensors live where the machine computes: in host memory on a simulated machine, on the GPU of a native one.

The layer, the backend, its metadata builder and its cache layout are the tree's own objects; what differs between
releases is asked of them, never of a version number.
"""

from __future__ import annotations

import dataclasses
import sys
from math import prod
from pathlib import Path

import torch

from aiterlab.attention import reference
from aiterlab.machines import ledger
from aiterlab.probes import failure, models

PAGE = 16  # tokens per KV cache page
BLOCKS = 16  # pages in the cache
SCALE = models.HEAD_SIZE**-0.5
# (tokens already cached, new tokens) of each sequence. Lengths straddle page boundaries. Decode comes first, as it
# does in vLLM, which captures its decode graphs before the first prompt arrives.
BATCHES = {
    "decode": ((16, 1), (40, 1)),
    "prefill": ((0, 5), (0, 19)),
    "extend": ((21, 7), (33, 3)),
}


@dataclasses.dataclass
class Batch:
    """The sequences of one step and where their tokens live in the paged cache; made on the host, from one seed."""

    lengths: list[tuple[int, int]]
    query: torch.Tensor  # [new tokens, heads, head_size]
    keys: list[torch.Tensor]  # per sequence [context + new, kv_heads, head_size]
    values: list[torch.Tensor]
    block_table: torch.Tensor  # [sequences, pages] int32

    @classmethod
    def make(cls, lengths, dtype: torch.dtype, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)

        def random(tokens, heads):
            return torch.randn(tokens, heads, models.HEAD_SIZE, generator=generator).to(dtype)

        pages = max(-(-(context + new) // PAGE) for context, new in lengths)
        blocks = torch.randperm(BLOCKS, generator=generator)[: pages * len(lengths)]  # scattered, as in a used cache
        return cls(
            list(lengths),
            random(sum(new for _, new in lengths), models.HEADS),
            [random(context + new, models.KV_HEADS) for context, new in lengths],
            [random(context + new, models.KV_HEADS) for context, new in lengths],
            blocks.reshape(len(lengths), pages).to(torch.int32),
        )

    def slots(self, start: int, stop: int, sequence: int) -> torch.Tensor:
        """Cache slots of the tokens start … stop of one sequence: block * page + offset."""
        position = torch.arange(start, stop)
        return self.block_table[sequence, position // PAGE].long() * PAGE + position % PAGE

    def cached(self):
        """Keys, values and slots of what the cache holds before the step."""
        parts = [(i, context) for i, (context, _) in enumerate(self.lengths) if context]
        if not parts:
            return None
        return (
            torch.cat([self.keys[i][:context] for i, context in parts]),
            torch.cat([self.values[i][:context] for i, context in parts]),
            torch.cat([self.slots(0, context, i) for i, context in parts]),
        )

    def new(self):
        """Keys, values and slots of the step's own tokens."""
        return (
            torch.cat([keys[context:] for keys, (context, _) in zip(self.keys, self.lengths, strict=True)]),
            torch.cat([values[context:] for values, (context, _) in zip(self.values, self.lengths, strict=True)]),
            torch.cat([self.slots(context, context + new, i) for i, (context, new) in enumerate(self.lengths)]),
        )

    def error(self, output: torch.Tensor) -> tuple[float, float]:
        """Largest distance of `output` [new tokens, heads, head_size] from float64, and the largest allowed."""
        worst, limit, start = 0.0, 0.0, 0
        for keys, values, (_, new) in zip(self.keys, self.values, self.lengths, strict=True):
            query = self.query[start : start + new]
            expected = reference.attend(query, keys, values, SCALE)
            distance = (output[start : start + new].double() - expected).abs().max().item()
            worst = max(worst, distance) if distance == distance else float("inf")  # NaN: nothing was written there
            limit = max(limit, reference.tolerance(query, keys, values, SCALE))
            start += new
        return worst, limit


def run(layer, vllm_config, package: Path, dtype: torch.dtype, device: torch.device) -> dict:
    """Put every step through the layer's backend on `device`; the answer has one entry per step.

    Each entry is `{"outcome": "ok" | "wrong", "max_abs_error": …, "tolerance": …}` or an exception as a fact. The last
    entry, `gather_then_attend`, is the kernel test of the fix: the tree's own gather followed by AITER's attention.
    """
    spec = cache_spec(layer, vllm_config)
    builder = layer.attn_backend.get_builder_cls()(spec, [layer.layer_name], vllm_config, device)
    answers = {}
    for seed, (name, lengths) in enumerate(BATCHES.items()):
        batch = Batch.make(lengths, dtype, seed)
        answers[name] = _attempt(name, package, lambda batch=batch: _step(layer, builder, spec, batch, device))
    batch = Batch.make(BATCHES["extend"], dtype, len(BATCHES))
    name = "gather_then_attend"
    answers[name] = _attempt(name, package, lambda: _gather_then_attend(layer, spec, batch, device))
    return answers


def _attempt(name: str, package: Path, compute) -> dict:
    ledger.enter(name)
    try:
        error, limit = compute()
    except Exception as exception:
        return failure.describe(exception, package)
    outcome = "ok" if error <= limit else "wrong"
    return {"outcome": outcome, "max_abs_error": error if error < float("inf") else None, "tolerance": limit}


def _step(layer, builder, spec, batch: Batch, device: torch.device) -> tuple[float, float]:
    cache = empty_cache(layer.attn_backend, spec, device)
    if (cached := batch.cached()) is not None:
        write(layer, cache, *_on(device, *cached))
    query, keys, values, slots = _on(device, batch.query, *batch.new())
    metadata = builder.build(common_prefix_len=0, common_attn_metadata=common_metadata(batch, slots, device))
    if not getattr(layer.attn_backend, "forward_includes_kv_cache_update", True):
        layer.impl.do_kv_cache_update(layer, keys, values, cache, slots)
    output = torch.full_like(query, float("nan"))
    layer.impl.forward(layer, query, keys, values, cache, metadata, output=output)
    return batch.error(output.cpu())


def _on(device: torch.device, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


def _gather_then_attend(layer, spec, batch: Batch, device: torch.device) -> tuple[float, float]:
    """Gather the paged cache into contiguous tensors, then call AITER's varlen attention on them."""
    import aiter as rocm_aiter  # never under its own name, which is a builtin's

    backend = sys.modules[layer.impl.__class__.__module__]
    cache = empty_cache(layer.attn_backend, spec, device)
    for part in (batch.cached(), batch.new()):
        write(layer, cache, *_on(device, *part))
    key_cache, value_cache = _key_and_value(layer, cache)
    lengths = torch.tensor([context + new for context, new in batch.lengths], dtype=torch.int32, device=device)
    offsets = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    query, block_table, query_offsets = _on(device, batch.query, batch.block_table, _offsets(batch))
    shape = (2, int(offsets[-1]), models.KV_HEADS, models.HEAD_SIZE)
    gathered = torch.full(shape, float("nan"), dtype=query.dtype, device=device)
    backend.cp_mha_gather_cache(
        key_cache=key_cache,
        value_cache=value_cache,
        key=gathered[0],
        value=gathered[1],
        block_tables=block_table,
        k_scales=layer._k_scale,
        v_scales=layer._v_scale,
        cu_seqlens_kv=offsets,
        token_to_batch=torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32, device=device), lengths),
        seq_starts=torch.zeros(len(lengths), dtype=torch.int32, device=device),
        dequant=False,
        kv_cache_layout="SHUFFLE" if _shuffled() else "NHD",
        total_tokens=int(offsets[-1]),
    )
    output = rocm_aiter.flash_attn_varlen_func(
        q=query,
        k=gathered[0],
        v=gathered[1],
        cu_seqlens_q=query_offsets,
        cu_seqlens_k=offsets,
        max_seqlen_q=max(new for _, new in batch.lengths),
        max_seqlen_k=int(lengths.max()),
        softmax_scale=SCALE,
        causal=True,
    )
    return batch.error((output[0] if isinstance(output, tuple) else output).cpu())


def _offsets(batch: Batch) -> torch.Tensor:
    new = torch.tensor([new for _, new in batch.lengths], dtype=torch.int32)
    return torch.nn.functional.pad(new.cumsum(0, dtype=torch.int32), (1, 0))


def common_metadata(batch: Batch, slots: torch.Tensor, device: torch.device):
    from vllm.v1.attention.backend import CommonAttentionMetadata

    lengths = torch.tensor([context + new for context, new in batch.lengths], dtype=torch.int32)
    contexts = torch.tensor([context for context, _ in batch.lengths], dtype=torch.int32)
    offsets = _offsets(batch)
    known = dict(
        query_start_loc=offsets.to(device),
        query_start_loc_cpu=offsets,
        seq_lens=lengths.to(device),
        seq_lens_cpu=lengths,
        _seq_lens_cpu=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_computed_tokens_cpu=contexts,
        _num_computed_tokens_cpu=contexts,
        num_reqs=len(batch.lengths),
        num_actual_tokens=int(offsets[-1]),
        max_query_len=max(new for _, new in batch.lengths),
        max_seq_len=int(lengths.max()),
        block_table_tensor=batch.block_table.to(device),
        slot_mapping=slots,
        causal=True,
    )
    fields = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    return CommonAttentionMetadata(**{name: value for name, value in known.items() if name in fields})


def cache_spec(layer, vllm_config):
    spec = layer.get_kv_cache_spec(vllm_config)
    spec = dataclasses.replace(spec, block_size=PAGE)
    customize = getattr(layer.attn_backend, "customize_spec", None)
    return customize(spec) if customize else spec


def empty_cache(backend, spec, device: torch.device) -> torch.Tensor:
    """The KV cache in the shape and memory order that the tree's backend asks for; NaN where nothing is written."""
    if hasattr(backend, "get_kv_cache_shape"):
        shape = backend.get_kv_cache_shape(BLOCKS, PAGE, models.KV_HEADS, models.HEAD_SIZE)
        return torch.full(shape, float("nan"), dtype=spec.dtype, device=device)
    from vllm.v1 import kv_cache_interface as interface

    layout = backend.supported_kv_cache_layouts()[0]
    shape = (1, *interface.compute_layer_kv_cache_shape_bytes(spec, BLOCKS))
    raw = torch.empty(prod(shape), dtype=torch.int8, device=device)
    raw.view(spec.dtype).fill_(float("nan"))
    strides = interface.compute_layout_strides(spec, BLOCKS, 1, layout)
    return torch.as_strided(raw, shape, strides)[0].view(spec.dtype)


def _key_and_value(layer, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    split = getattr(layer.impl, "_split_kv_cache", None)
    return split(cache) if split else cache.unbind(0)


def _shuffled() -> bool:
    from vllm._aiter_ops import rocm_aiter_ops

    return bool(getattr(rocm_aiter_ops, "is_shuffle_kv_cache_enabled", bool)())


def write(layer, cache: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
    """Write tokens into the cache the way the tree's backend does."""
    if hasattr(layer.impl, "do_kv_cache_update"):
        layer.impl.do_kv_cache_update(layer, keys, values, cache, slots)
        return
    key_cache, value_cache = _key_and_value(layer, cache)
    if _shuffled():
        backend = sys.modules[layer.impl.__class__.__module__]
        write, scale = backend.reshape_and_cache_shuffle_triton, torch.ones(1, device=cache.device)
    else:
        write, scale = torch.ops._C_cache_ops.reshape_and_cache_flash, layer._k_scale
    write(keys, values, key_cache, value_cache, slots, "auto", scale, scale)
