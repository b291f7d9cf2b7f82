# SPDX-License-Identifier: Apache-2.0
"""vLLM's own compiled extensions, and packages that a ROCm machine has as binaries built for it.

A tree's Python imports `vllm._C` and its sisters for their side effect: they register operators. The stand-ins
register the two that the attention backend calls, when the tree imports them and not before.
"""

from __future__ import annotations

import contextlib
import enum
import re
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType

import torch

from aiterlab import importing
from aiterlab.machines import ledger

_EXTENSION = re.compile(r"vllm\._(\w+_)?C(_stable_libtorch)?$")
_FLASH_ATTN = {
    "flash_attn",
    "flash_attn.flash_attn_triton_amd",
    "flash_attn.ops",
    "flash_attn.ops.triton",
    "flash_attn.ops.triton.rotary",
}
_TORCHVISION = {"torchvision", "torchvision.transforms"}
_ORIGIN = "simulated ROCm build"
_libraries: list = []  # operators live as long as the library that defined them


def install(flash_attn: bool) -> None:
    """Serve vLLM's compiled extensions; serve flash-attn if it is installed on the described machine."""
    importing.serve(lambda name: bool(_EXTENSION.match(name)), _fill_extension, _ORIGIN)
    if flash_attn:
        importing.serve(_FLASH_ATTN.__contains__, _fill_flash_attn, _ORIGIN)
    if find_spec("torchvision") is None:
        from transformers.utils import is_torchvision_available

        is_torchvision_available()  # transformers remembers that there is none, and keeps to its own code paths
        importing.serve(_TORCHVISION.__contains__, _fill_torchvision, _ORIGIN)


def _fill_extension(module: ModuleType) -> None:
    ledger.stood_in("vLLM's compiled extensions, by name; two operators registered")
    if module.__name__ in ("vllm._C", "vllm._C_stable_libtorch") and not _libraries:
        for namespace, schema, function in _OPERATORS:
            library = torch.library.Library(namespace, "FRAGMENT")
            library.define(schema)
            library.impl(function.__name__, function, "CPU")
            _libraries.append(library)


def reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale) -> None:
    """Write new keys and values into the paged cache.

    Args:
        key, value: [tokens, kv_heads, head_size]; may be padded beyond the slot mapping
        key_cache, value_cache: [blocks, page, kv_heads, head_size]
        slot_mapping: [tokens] int64, `block * page + offset`; negative slots are skipped

    Raises:
        NotImplementedError: a quantised cache.
    """
    if kv_cache_dtype not in ("auto", "float16"):
        raise NotImplementedError(
            f"the stand-in for the cache write does not quantise (kv_cache_dtype={kv_cache_dtype!r})"
        )
    ledger.stood_in("torch.ops._C_cache_ops.reshape_and_cache_flash (HIP) -> torch")
    page = key_cache.shape[1]
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    tokens = slot_mapping.shape[0]
    key_cache[slots // page, slots % page] = key[:tokens][kept]
    value_cache[slots // page, slots % page] = value[:tokens][kept]


def merge_attn_states(
    output,
    output_lse,
    prefix_output,
    prefix_lse,
    suffix_output,
    suffix_lse,
    prefill_tokens_with_context=None,
    output_scale=None,
) -> None:
    """Merge two partial attentions over disjoint keys by their log-sum-exp; releases until 0.16 do it in Triton.

    Args:
        output, prefix_output, suffix_output: [tokens, heads, head_size]
        output_lse, prefix_lse, suffix_lse: [heads, tokens]

    Raises:
        NotImplementedError: a quantised output, or a batch of which only a part has context.
    """
    if prefill_tokens_with_context not in (None, output.shape[0]) or output_scale is not None:
        raise NotImplementedError("the stand-in for merge_attn_states merges whole, unquantised batches")
    ledger.stood_in("torch.ops._C.merge_attn_states (HIP) -> torch")
    lse = torch.logaddexp(prefix_lse, suffix_lse)
    prefix_weight, suffix_weight = ((part - lse).exp().t().unsqueeze(-1) for part in (prefix_lse, suffix_lse))
    output.copy_(prefix_output.float() * prefix_weight + suffix_output.float() * suffix_weight)
    if output_lse is not None:
        output_lse.copy_(lse)


_OPERATORS = (
    (
        "_C_cache_ops",
        "reshape_and_cache_flash(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
        " Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()",
        reshape_and_cache_flash,
    ),
    (
        "_C",
        "merge_attn_states(Tensor(a!) output, Tensor(b!)? output_lse, Tensor prefix_output, Tensor prefix_lse,"
        " Tensor suffix_output, Tensor suffix_lse, int? prefill_tokens_with_context=None, Tensor? output_scale=None)"
        " -> ()",
        merge_attn_states,
    ),
)


class _NamedOperator:
    """An operator of a compiled extension of which nobody needs more than that it has a name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, overload: str) -> _NamedOperator:
        if overload.startswith("__"):
            raise AttributeError(overload)
        return _NamedOperator(f"{self._name}.{overload}")

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f"{self._name} is present on the simulated machine by name only")


@contextlib.contextmanager
def operators_by_name() -> Iterator[None]:
    """While code is imported that only names operators of vLLM's compiled extensions, every such name is there.

    Not for longer: a tree may ask whether an operator exists and choose another path if it does not.
    """
    namespace = torch._ops._OpNamespace
    lookup = namespace.__getattr__

    def __getattr__(self, name: str):
        try:
            return lookup(self, name)
        except AttributeError:
            if name.startswith("__") or not _EXTENSION.match(f"vllm.{self.name}"):
                raise
            ledger.stood_in("operators of vLLM's compiled extensions, by name, while code that names them is imported")
            return _NamedOperator(f"torch.ops.{self.name}.{name}")

    namespace.__getattr__ = __getattr__
    try:
        yield
    finally:
        namespace.__getattr__ = lookup


def _fill_torchvision(module: ModuleType) -> None:
    """The one name that a tree's imports reach for on the way to the EAGLE proposer."""

    class InterpolationMode(enum.Enum):
        NEAREST, BILINEAR, BICUBIC = "nearest", "bilinear", "bicubic"

    ledger.stood_in("torchvision, by name only")
    module.InterpolationMode = InterpolationMode


def _fill_flash_attn(module: ModuleType) -> None:
    def only_compiled(*args, **kwargs):
        raise NotImplementedError(f"{module.__name__} is present on the simulated machine by name only")

    ledger.stood_in("flash_attn, by name only")
    module.flash_attn_varlen_func = module.apply_rotary = only_compiled
