# SPDX-License-Identifier: Apache-2.0
"""What a model asks of attention: the part of a question that neither the machine nor the user's choice decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["decoder", "encoder", "mla"]
Role = Literal["target", "draft"]
HEAD_SIZES = {"decoder": 64, "encoder": 64, "mla": 576}  # of a layer that states none; 576 is DeepSeek's


@dataclass(frozen=True)
class Layer:
    """One attention layer of a model, as its configuration and the command line describe it.

    Raises:
        ValueError: no such layer.
    """

    kind: Kind = "decoder"
    role: Role = "target"  # draft: the layer of an EAGLE head, under the configuration that vLLM makes for drafts
    head_size: int | None = None  # None: the usual one of the kind; of latent attention: of what is cached
    dtype: str = "float16"  # bfloat16 too: selection alone computes nothing
    kv_cache_dtype: str = "auto"
    block_size: int | None = 16  # tokens per KV cache page; None: left to vLLM

    def __post_init__(self) -> None:
        for name, known in (("kind", get_args(Kind)), ("role", get_args(Role))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        if self.head_size is None:
            object.__setattr__(self, "head_size", HEAD_SIZES[self.kind])
        if self.kind == "mla" and self.head_size <= 64:
            raise ValueError(f"a latent attention layer caches more than 64 values a token, not {self.head_size}")
        if self.role == "draft" and self.kind != "decoder":
            raise ValueError(f"a draft's layer is a decoder's, not {self.kind}")
