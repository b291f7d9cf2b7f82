# SPDX-License-Identifier: Apache-2.0
"""Write target and drafts in the layout that transformers and vLLM load, and read them back; safetensors and JSON."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from aiterlab.records import atomic_write_bytes, atomic_write_text, dump_json
from aiterlab.spec_decode.train.model import DRAFTS, Eagle3Draft, EagleDraft, Shape, Target
from aiterlab.spec_decode.train.tokenizer import BOS_ID, EOS_ID, PAD_ID

WEIGHTS = "model.safetensors"


def _llama_config(shape: Shape) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "initializer_range": 0.02,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def target_config(shape: Shape) -> dict:
    """Return the config.json of the target."""
    return {
        "architectures": ["LlamaForCausalLM"],
        **_llama_config(shape),
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "tie_word_embeddings": True,
    }


def draft_config(method: str, shape: Shape) -> dict:
    """Return the config.json of a draft; vLLM takes the method's name from the engine's arguments, not from here."""
    config = {
        "architectures": ["EagleLlamaForCausalLM" if method == "eagle" else "Eagle3LlamaForCausalLM"],
        **_llama_config(shape),
        "intermediate_size": shape.draft_intermediate_size,
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
    }
    if method == "eagle3":
        config |= {
            "draft_vocab_size": shape.draft_vocab_size,
            "target_hidden_size": shape.hidden_size,
            "eagle_aux_hidden_state_layer_ids": list(shape.aux_layers),
        }
    return config


def half(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters as contiguous bf16 tensors on the CPU."""
    return {n: p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in module.named_parameters()}


def save_target(target: Target, folder: Path, tokenizer_file: Path) -> Path:
    """Write the target's folder: weights, configs and tokenizer."""
    weights = {f"model.{name}": weight for name, weight in half(target).items()}
    atomic_write_bytes(folder / WEIGHTS, save(weights, metadata={"format": "pt"}))
    atomic_write_text(folder / "config.json", dump_json(target_config(target.shape)))
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "do_sample": False}
    atomic_write_text(folder / "generation_config.json", dump_json(generation))
    atomic_write_bytes(folder / "tokenizer.json", tokenizer_file.read_bytes())
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "model_max_length": target.shape.max_positions,
        "clean_up_tokenization_spaces": False,
    }
    atomic_write_text(folder / "tokenizer_config.json", dump_json(described))
    return folder


def save_draft(draft: EagleDraft | Eagle3Draft, folder: Path) -> Path:
    """Write a draft's folder; embeddings (and EAGLE's head) are not in it, vLLM shares the target's."""
    weights = half(draft)
    if draft.method == "eagle3":
        tokens = draft.draft_tokens.cpu()
        weights["d2t"] = tokens - torch.arange(len(tokens))
        weights["t2d"] = torch.zeros(draft.shape.vocab_size, dtype=torch.bool).index_fill_(0, tokens, True)
    atomic_write_bytes(folder / WEIGHTS, save(weights, metadata={"format": "pt"}))
    atomic_write_text(folder / "config.json", dump_json(draft_config(draft.method, draft.shape)))
    return folder


def _read(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def load_target(folder: Path, shape: Shape, dtype: torch.dtype = torch.float32) -> Target:
    """Read an exported target back, for drafting and evaluation."""
    target = Target(shape)
    target.load_state_dict({name.removeprefix("model."): weight for name, weight in _read(folder).items()})
    return target.to(dtype).requires_grad_(False)


def load_draft(folder: Path, method: str, shape: Shape, dtype: torch.dtype = torch.float32) -> EagleDraft | Eagle3Draft:
    """Read an exported draft back."""
    draft = DRAFTS[method](shape)
    weights = _read(folder)
    offsets = weights.pop("d2t", None)
    weights.pop("t2d", None)
    draft.load_state_dict(weights)
    draft = draft.to(dtype).requires_grad_(False)
    if offsets is not None:
        draft.draft_tokens.copy_(torch.arange(len(offsets)) + offsets)
    return draft
