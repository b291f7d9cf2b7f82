# SPDX-License-Identifier: Apache-2.0
"""Models of the smallest useful shape, as configuration only: probes never load weights.

A Llama for a decoder's layer, a BERT for an encoder's, a DeepSeek for latent attention, and an EAGLE draft.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from aiterlab import records
from aiterlab.probes.layer import Layer

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 64  # grouped-query attention with the smallest head size of the backend
LATENT_HEADS = 16  # AITER's latent attention takes 16 or 128 of them
ROPE_SIZE, NOPE_SIZE, VALUE_SIZE = 64, 128, 128  # DeepSeek's, of the parts of a latent attention head
MAX_MODEL_LEN = 512  # tokens
VOCABULARY = 512
DRAFT = "EagleLlamaForCausalLM"


def latent_sizes(layer: Layer) -> dict[str, int | None]:
    """The sizes of a latent attention layer, as vLLM names them; the cached head is the latent part and the rope."""
    return {
        "q_lora_rank": None,
        "kv_lora_rank": layer.head_size - ROPE_SIZE,
        "qk_nope_head_dim": NOPE_SIZE,
        "qk_rope_head_dim": ROPE_SIZE,
        "v_head_dim": VALUE_SIZE,
    }


def _target(layer: Layer) -> dict:
    heads = LATENT_HEADS if layer.kind == "mla" else HEADS
    width = heads * (NOPE_SIZE if layer.kind == "mla" else layer.head_size)
    common = {
        "hidden_size": width,
        "intermediate_size": 512,
        "num_attention_heads": heads,
        "num_hidden_layers": 1,
        "max_position_embeddings": MAX_MODEL_LEN,
        "vocab_size": VOCABULARY,
        "torch_dtype": "float16",
    }
    if layer.kind == "encoder":
        return common | {"model_type": "bert", "architectures": ["BertModel"], "type_vocab_size": 2}
    common |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    if layer.kind == "mla":
        about = {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "num_key_value_heads": heads}
        return common | about | latent_sizes(layer)
    return common | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "head_dim": layer.head_size,
        "num_key_value_heads": KV_HEADS,
    }


def architectures(layers: Iterable[Layer]) -> list[str]:
    """The names by which vLLM's registry knows the models of such layers, each once."""
    found = []
    for layer in layers:
        found += _target(layer)["architectures"] + [DRAFT] * (layer.role == "draft")
    return list(dict.fromkeys(found))


def write(folder: Path, layer: Layer | None = None) -> tuple[str, str]:
    """Write the configurations for such a layer below `folder`; return the paths of the target and the draft."""
    layer = layer or Layer()
    target = _target(layer)
    draft = _target(Layer(head_size=layer.head_size)) | {"architectures": [DRAFT]}
    written = []
    for name, config in ((layer.kind, target), ("eagle", draft)):
        text = json.dumps(config, indent=1)
        path = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}" / "config.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            records.atomic_write_text(path, text)
        written.append(str(path.parent))
    return written[0], written[1]
