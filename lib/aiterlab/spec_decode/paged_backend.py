# SPDX-License-Identifier: Apache-2.0
"""What does a whole engine gain when every step of it, verify included, attends through `attention.paged`?

A custom attention backend for vLLM: `register` enters it in vLLM's own registry as CUSTOM, and an engine takes it by
that name. It keeps vLLM's Triton backend in everything but the two places that cost: the kernel, and the write of new
keys, which is vLLM's C++ operator instead of a Triton launch. Being derived from that backend it also has its cache
layout (which differs between vLLM versions), and on ROCm its metadata is on the list that the drafter admits.

Two things decide how fast it is:

- Splits. A CUDA graph is captured once and replayed at every length, so the number of programs that share the keys
  follows from `max_model_len` and never from the step. A program divides the keys that there really are; one that
  finds none writes one number per row, and `merge` skips it.
- Python. The draft model's attention runs outside of CUDA graphs, K times a step. Triton's own launch looks at every
  argument to find the compiled variant; here a layer names the variant and replaces the arguments that change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
from triton import knobs
from vllm import _custom_ops
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

from aiterlab.attention import arguments, merge, paged, tuning

NAME = "SUITE_PAGED"
# Places of what changes from step to step or from layer to layer in the kernels' lists of arguments.
_OUT, _LSE, _TABLE_STRIDE, _SEQUENCES, _TOKENS = 3, 4, 24, 11, 12


def register() -> None:
    """Enter the backend in vLLM's registry, as CUSTOM."""
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.SuitePagedBackend")


def implementation() -> str:
    """Name what computes here: the kernel, or without a GPU (and without Triton's interpreter) its eager twin."""
    return "eager" if current_platform.is_cpu() and not knobs.runtime.interpret else "triton"


class SuitePagedBackend(TritonAttentionBackend):
    """What vLLM asks before it takes a backend."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]

    @staticmethod
    def get_name() -> str:
        """Name in logs; vLLM looks backends up by name, and knows ours as CUSTOM."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SuitePagedImpl]:
        """Class of a layer's attention."""
        return SuitePagedImpl

    @staticmethod
    def get_builder_cls() -> type[SuitePagedMetadataBuilder]:
        """Class that describes a batch to the layers."""
        return SuitePagedMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int]:
        """Page sizes of the kernel; newer vLLM asks for each kind of cache."""
        return list(arguments.PAGE_SIZES)

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """Tell whether the engine's block is one of the kernel's pages, or several."""
        return block_size is None or block_size % arguments.PAGE_SIZES[0] == 0

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Tell whether the kernel has tiles for this head size."""
        return head_size % 8 == 0 and head_size <= arguments.LARGEST_HEAD

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders only: an encoder has no paged cache."""
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_sink(cls) -> bool:
        """No sinks."""
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """No bidirectional ranges."""
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Causal only."""
        return False

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        """ALiBi as published, not of the square root."""
        return False

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """The kernel skips what lies outside of the window."""
        return True

    @classmethod
    def supports_rswa(cls) -> bool:
        """No window that spares a prefix."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """How the keys are split depends on the batch, and with it the rounding."""
        return False


@dataclass
class SuitePagedMetadata(TritonAttentionMetadata):
    """A batch as the layers see it: vLLM's fields, and how the kernel is cut for it."""

    cut: paged.Cut | None = None
    partial: torch.Tensor | None = None  # [splits, T, H, D] float32, one for all layers
    partial_lse: torch.Tensor | None = None  # [splits, H, T] float32


class SuitePagedMetadataBuilder(TritonAttentionMetadataBuilder):
    """Describes a batch to the layers, and owns the memory in which partial results wait for `merge`.

    Graphs are captured for batches whose sequences all have one query token, or all K + 1. A batch of prompts would
    need another cut at every length, so it runs between the piecewise graphs.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        heads = {layers[name].num_heads for name in layer_names if name in layers} or {self.num_heads_q}
        if len(heads) > 1:
            raise ValueError(
                f"{NAME}: layers of one group have {sorted(heads)} query heads, and the kernel has one cut"
            )
        itemsize = 4 if vllm_config.model_config.dtype == torch.float32 else kv_cache_spec.dtype.itemsize
        window = getattr(kv_cache_spec, "sliding_window", None)
        self._shape = {
            "heads": heads.pop(),
            "kv_heads": kv_cache_spec.num_kv_heads,
            "head_size": kv_cache_spec.head_size,
            "kv_bytes": itemsize,
            "left": window - 1 if window else -1,
            "max_seqlen_k": vllm_config.model_config.max_model_len,
        }
        speculative = vllm_config.speculative_config
        self._decode_lengths = (1, 1 + (speculative.num_speculative_tokens if speculative else 0))
        self._known: dict[tuple[int, int, int], tuple[paged.Cut | None, Any, Any]] = {}
        self._impl = implementation()
        if self._impl == "eager":  # computes without a cut
            return
        # Graphs remember addresses, so what they use is never made anew: one buffer, as large as any decode needs.
        most = 0
        for sequences in range(1, vllm_config.scheduler_config.max_num_seqs + 1):
            for length in set(self._decode_lengths):
                cut = self._cut(sequences * length, sequences, length)
                most = max(most, cut.splits * sequences * length if cut.splits > 1 else 0)
        self._buffer = torch.empty(most * self._row, dtype=torch.float32, device=device)

    @property
    def _row(self) -> int:
        """Numbers that a partial result takes: one query token, all of its heads, their LSEs."""
        return self._shape["heads"] * (self._shape["head_size"] + 1)

    def _cut(self, tokens: int, sequences: int, max_query_len: int) -> paged.Cut:
        return paged.cut(self.device, tokens=tokens, sequences=sequences, max_seqlen_q=max_query_len, **self._shape)

    def _workspace(self, cut: paged.Cut, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        heads, head_size = self._shape["heads"], self._shape["head_size"]
        rows = cut.splits * tokens
        buffer = self._buffer
        if buffer.numel() < rows * self._row:  # a short prompt; such a batch is never captured
            buffer = torch.empty(rows * self._row, dtype=torch.float32, device=self.device)
        values = rows * heads * head_size
        return (
            buffer[:values].view(cut.splits, tokens, heads, head_size),
            buffer[values : values + rows * heads].view(cut.splits, heads, tokens),
        )

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> SuitePagedMetadata:
        """Describe a batch."""
        base = super().build(0, common_attn_metadata, fast_build)
        key = (base.num_actual_tokens, common_attn_metadata.num_reqs, base.max_query_len)
        known = self._known.get(key)
        if known is None:
            cut = self._cut(*key) if self._impl == "triton" else None
            known = (cut, *(self._workspace(cut, key[0]) if cut and cut.splits > 1 else (None, None)))
            if key[2] in self._decode_lengths:
                self._known[key] = known
        return SuitePagedMetadata(**vars(base), cut=known[0], partial=known[1], partial_lse=known[2])


class SuitePagedImpl(TritonAttentionImpl):
    """Attention of one layer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        unsupported = {
            "attention sinks": self.sinks is not None,
            "ALiBi of the square root": self.use_alibi_sqrt,
            "chunked local attention": self.chunk_lookback != -1,
            f"attention of type {self.attn_type}": self.attn_type != AttentionType.DECODER,
        }
        if reason := next((name for name, holds in unsupported.items() if holds), None):
            raise NotImplementedError(f"{NAME} has no {reason}: choose another attention backend")
        self.supports_quant_query_input = False  # queries stay as they are; an fp8 cache is decoded by the kernel
        self._impl = implementation()
        self._window = arguments.window(self.sliding_window, causal=True)
        self._quantised = self.kv_cache_dtype.startswith("fp8")
        self._kv_cache = self._keys = self._values = None
        self._variants: dict[tuple, tuple[Any, list[Any], tuning.Config]] = {}
        self._merge_variants: dict[tuple, tuple[Any, list[Any]]] = {}

    def fused_output_quant_supported(self, quant_key) -> bool:
        """The output is written in its own dtype."""
        return False

    def _split(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [blocks, page, H_kv, D] of a layer's cache; made once, as views cost microseconds.

        vLLM 0.20 has [blocks, 2, page, H_kv, D]; later versions pack a head's key and value: [blocks, H_kv, page, 2 D].
        """
        if kv_cache is not self._kv_cache:
            if kv_cache.ndim == 5:
                keys, values = kv_cache.unbind(1)
            else:
                keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
            if self._quantised:
                keys, values = keys.view(self.fp8_dtype), values.view(self.fp8_dtype)
            self._kv_cache, self._keys, self._values = kv_cache, keys, values
            self._variants.clear()
        return self._keys, self._values

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        """Write new keys and values to their pages; a slot below 0 is none."""
        keys, values = self._split(kv_cache)
        if not keys.is_cuda:
            for cache, new in ((keys, key), (values, value)):
                real = slot_mapping >= 0
                page, place = slot_mapping[real] // cache.shape[1], slot_mapping[real] % cache.shape[1]
                cache[page, place] = new[: len(slot_mapping)][real].to(cache.dtype)
            return
        _custom_ops.reshape_and_cache_flash(
            key, value, keys, values, slot_mapping, self.kv_cache_dtype, layer._k_scale, layer._v_scale
        )

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ) -> torch.Tensor:
        """Attend [T, H, D] queries to the cache, which holds their own keys already."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(f"{NAME} does not quantise its output")
        if attn_metadata is None:  # vLLM measures the memory that the rest of the model needs
            return output.fill_(0)
        keys, values = self._split(kv_cache)
        if self._impl == "eager":
            self._attend(attn_metadata, layer, query, keys, values, output)
        else:
            self._launch(attn_metadata, layer, query, keys, values, output)
        return output

    def _attend(self, batch, layer, query, keys, values, output) -> None:
        """Attend through `paged.attend`, with all of its checks."""
        paged.attend(
            query[: batch.num_actual_tokens], keys, values, cu_seqlens_q=batch.query_start_loc,
            seqused_k=batch.seq_lens, block_table=batch.block_table, max_seqlen_q=batch.max_query_len,
            max_seqlen_k=batch.max_seq_len, out=output[: batch.num_actual_tokens], impl=self._impl,
            **self._options(layer) | {"window_size": self.sliding_window},
        )  # fmt: skip

    def _options(self, layer) -> dict[str, Any]:
        return {
            "softmax_scale": self.scale,
            "softcap": float(self.logits_soft_cap),
            "alibi_slopes": self.alibi_slopes,
            "k_descale": layer._k_scale if self._quantised else None,
            "v_descale": layer._v_scale if self._quantised else None,
        }

    def _launch(self, batch, layer, query, keys, values, output) -> None:
        """Launch the compiled variant for this kind of batch, or have Triton make it the first time.

        It depends on what Triton specialises on: constants, strides, and whether addresses are multiples of 16.
        """
        cut = batch.cut
        split = cut.splits > 1
        out, lse = (batch.partial, batch.partial_lse) if split else (output, None)
        starts, lengths, table = batch.query_start_loc, batch.seq_lens, batch.block_table
        grid = (cut.blocks * self.num_kv_heads, cut.splits, 1)
        addresses = query.data_ptr() | output.data_ptr() | starts.data_ptr() | lengths.data_ptr() | table.data_ptr()
        key = (
            id(cut.config), cut.one_block, split, query.stride(0), query.stride(1), output.stride(0),
            output.stride(1), addresses & 15,
        )  # fmt: skip
        variant = self._variants.get(key)
        if variant is None:
            parameters = paged.kernel_arguments(
                cut, query, keys, values, out, lse, starts, lengths, table, window=self._window, layout="NHD",
                dtype=output.dtype, **self._options(layer),
            )  # fmt: skip
            parameters[_SEQUENCES], parameters[_TOKENS] = len(lengths), batch.num_actual_tokens
            compiled = paged._paged_kernel[grid](*parameters, **cut.config.options)
            if compiled is not None:  # Triton's interpreter compiles nothing
                self._variants[key] = compiled, parameters, cut.config  # held, so that its id stays its own
        else:
            compiled, parameters, _ = variant
            parameters[0] = query
            parameters[_OUT : _OUT + 5] = out, lse, starts, lengths, table
            parameters[_SEQUENCES], parameters[_TOKENS] = len(lengths), batch.num_actual_tokens
            parameters[_TABLE_STRIDE] = table.stride(0)
            compiled[grid](*parameters)
        if split:
            self._merge(batch, output)

    def _merge(self, batch, output) -> None:
        """Join the parts: `merge.merge` without its checks."""
        cut, partial, tokens = batch.cut, batch.partial, batch.num_actual_tokens
        grid = (tokens, self.num_heads, 1)
        parts, stride = triton.next_power_of_2(cut.splits), partial.stride(0)
        key = (parts, stride & 15, output.stride(0), output.stride(1), output.data_ptr() & 15)
        variant = self._merge_variants.get(key)
        if variant is None:
            pdl = tuning.chained()
            parameters = [
                partial, batch.partial_lse, output, None, tokens, cut.splits, *partial.stride()[:3],
                *output.stride()[:2], self.head_size, triton.next_power_of_2(self.head_size), parts, False, pdl,
            ]  # fmt: skip
            options = {"num_warps": 4} | ({"launch_pdl": True} if pdl else {})
            compiled = merge._merge_kernel[grid](*parameters, **options)
            if compiled is not None:
                self._merge_variants[key] = compiled, parameters
            return
        compiled, parameters = variant
        parameters[:7] = partial, batch.partial_lse, output, None, tokens, cut.splits, stride
        compiled[grid](*parameters)
