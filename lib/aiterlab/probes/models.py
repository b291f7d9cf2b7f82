# SPDX-License-Identifier: Apache-2.0
"""A Llama and an EAGLE draft of the smallest useful shape, as configuration only: probes never load weights."""

from __future__ import annotations

import json
from pathlib import Path

from aiterlab import records

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 64  # grouped-query attention with the smallest head size of the backend
MAX_MODEL_LEN = 512  # tokens
VOCABULARY = 512

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HEADS * HEAD_SIZE,
    "head_dim": HEAD_SIZE,
    "intermediate_size": 512,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": 1,
    "max_position_embeddings": MAX_MODEL_LEN,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
_EAGLE = _LLAMA | {"architectures": ["EagleLlamaForCausalLM"]}


def write(folder: Path) -> tuple[str, str]:
    """Write both configurations below `folder`; return the paths of the target and the draft."""
    for name, config in (("target", _LLAMA), ("eagle", _EAGLE)):
        path = folder / name / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            records.atomic_write_text(path, json.dumps(config, indent=1))
    return str(folder / "target"), str(folder / "eagle")
