# SPDX-License-Identifier: Apache-2.0
"""The configuration that an engine makes of a command line, and one attention layer built as a model builds it.

Everything is the tree's own: `EngineArgs` reads the options, its platform changes what it changes, and the layer's real
constructor asks the real selector. What differs between releases is asked of them, never of a version number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace

from aiterlab import paths
from aiterlab.probes import models
from aiterlab.probes.layer import Layer

OLDER_CHOICE = "VLLM_ATTENTION_BACKEND"  # how a backend is asked for in trees without `attention_config`
DRAFT_CHOICE = "attention_backend"  # a field of the speculative configuration, in trees that have it
PREFIX = "model.layers.0.self_attn.attn"


class _Reached(BaseException):
    """Ends the loading of a draft at the point where its model would be constructed."""


def configuration(layer: Layer, **options):
    """The engine's whole configuration for a model with such a layer.

    Args:
        options: further fields of EngineArgs.
    """
    from vllm.engine.arg_utils import EngineArgs

    target, _ = models.write(paths.cache_dir() / "probe-models", layer)
    if layer.block_size is not None:
        options["block_size"] = layer.block_size
    return EngineArgs(
        model=target,
        skip_tokenizer_init=True,
        dtype=layer.dtype,
        kv_cache_dtype=layer.kv_cache_dtype,
        max_model_len=models.MAX_MODEL_LEN,
        enforce_eager=True,
        load_format="dummy",
        max_num_seqs=8,
        **options,
    ).create_engine_config()


def choose(explicit: str | None) -> tuple[str | None, dict]:
    """Ask for a backend in the tree's own way: through which option, and the fields of EngineArgs that say so.

    Where the tree has no option but an environment variable, this process's environment is changed.
    """
    if explicit is None:
        return None, {}
    if "attention_config" in options_named("attention_config"):
        return "attention_config.backend", {"attention_config": {"backend": explicit}}
    os.environ[OLDER_CHOICE] = explicit
    return OLDER_CHOICE, {}


def options_named(part: str) -> list[str]:
    """The fields of the tree's EngineArgs whose name contains `part`."""
    from vllm.engine.arg_utils import EngineArgs

    return [field.name for field in dataclasses.fields(EngineArgs) if part in field.name]


def speculation(layer: Layer, draft_tokens: int, **options) -> dict:
    """The field of EngineArgs that asks for an EAGLE draft."""
    _, draft = models.write(paths.cache_dir() / "probe-models", layer)
    asked = {"method": "eagle", "model": draft, "num_speculative_tokens": draft_tokens}
    return {"speculative_config": asked | options}


def drafts_choose_themselves() -> bool:
    """Whether the tree lets a draft have a backend of its own."""
    from vllm.config import SpeculativeConfig

    return any(field.name == DRAFT_CHOICE for field in dataclasses.fields(SpeculativeConfig))


def draft_configuration(config, device):
    """The configuration under which the tree constructs its draft model: what its own loading code hands on.

    The loading stops there; nothing is constructed.
    """
    reached = []

    def get_model(*args, vllm_config, **kwargs):
        reached.append(vllm_config)
        raise _Reached

    from vllm.distributed import parallel_state

    alone = SimpleNamespace(world_size=1, rank_in_group=0, is_first_rank=True, is_last_rank=True)
    load, modules = _draft_loader(config, device)
    pipeline = _replaced([parallel_state], "_PP", alone)  # of an engine on one GPU
    with contextlib.suppress(_Reached), _replaced(modules, "get_model", get_model), pipeline:
        load()
    if not reached:
        raise RuntimeError("the tree's code for loading a draft did not come to its model")
    return reached[0]


def _draft_loader(config, device):
    """The tree's function that loads an EAGLE draft, for the model runner it would use, and where it lives."""
    if uses_second_runner(config):
        loading = importlib.import_module("vllm.v1.worker.gpu.spec_decode.eagle.utils")
        return lambda: loading.load_eagle_model(None, config), [loading]
    from vllm.v1.spec_decode.eagle import EagleProposer

    eagle = EagleProposer(config, device, None)
    return lambda: eagle.load_model(None), [sys.modules[cls.__module__] for cls in EagleProposer.__mro__]


def uses_second_runner(config) -> bool:
    """Whether this engine would use the newer of vLLM's two model runners, which loads drafts by other code."""
    from vllm import envs

    asked = getattr(config, "use_v2_model_runner", None)
    return bool(getattr(envs, "VLLM_USE_V2_MODEL_RUNNER", False) if asked is None else asked)


@contextlib.contextmanager
def _replaced(modules, name: str, value) -> Iterator[None]:
    kept = {module: getattr(module, name) for module in modules if hasattr(module, name)}
    for module in kept:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, original in kept.items():
            setattr(module, name, original)


def build(layer: Layer, config):
    """The real attention layer of that kind, inside the configuration that is current."""
    import torch

    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, layer.dtype))  # vLLM does so around the construction of a model
    try:
        return {"decoder": _decoder, "encoder": _encoder, "mla": _latent}[layer.kind](layer, config)
    finally:
        torch.set_default_dtype(default)


def attention_class():
    try:
        from vllm.model_executor.layers.attention import Attention
    except ImportError:
        from vllm.attention.layer import Attention

    return Attention


def _decoder(layer: Layer, config):
    return attention_class()(
        models.HEADS, layer.head_size, layer.head_size**-0.5, models.KV_HEADS,
        cache_config=config.cache_config, prefix=PREFIX,
    )  # fmt: skip


def _encoder(layer: Layer, config):
    try:
        from vllm.model_executor.layers.attention import encoder_only_attention as module
    except ImportError:
        from vllm.attention.layers import encoder_only_attention as module

    return module.EncoderOnlyAttention(
        models.HEADS, layer.head_size, layer.head_size**-0.5, cache_config=config.cache_config, prefix=PREFIX
    )


def _latent(layer: Layer, config):
    """Multi-head latent attention as DeepSeek's models construct it."""
    import torch

    sizes = models.latent_sizes(layer)
    heads, scale = models.LATENT_HEADS, layer.head_size**-0.5
    sizes["kv_b_proj"] = torch.nn.Linear(  # handed on to the backend, which reads its weights after they are loaded
        sizes["kv_lora_rank"], heads * (sizes["qk_nope_head_dim"] + sizes["v_head_dim"]), bias=False, device="meta"
    )
    try:
        from vllm.model_executor.layers.attention import MLAAttention
    except ImportError:
        layers = importlib.import_module("vllm.attention.layer")
        MLAAttention = getattr(layers, "MLAAttention", None)
    if MLAAttention is not None:
        return MLAAttention(heads, scale, cache_config=config.cache_config, prefix=PREFIX, **sizes)
    sizes["qk_head_dim"] = sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"]
    return attention_class()(
        heads, layer.head_size, scale, 1,
        cache_config=config.cache_config, prefix=PREFIX, use_mla=True, indexer=None, **sizes,
    )  # fmt: skip
