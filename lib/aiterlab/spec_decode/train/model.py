# SPDX-License-Identifier: Apache-2.0
"""Compute the target and its two drafts in plain torch, exactly as vLLM and transformers do when they load the export.

Everything that differs between EAGLE and EAGLE-3 is in `EagleDraft` and `Eagle3Draft`; the rest is the Llama block.
Dimensions: B sequences, T tokens, C hidden size, H query heads, G key/value heads, D head size, V vocabulary.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes that target and drafts share."""

    vocab_size: int = 4096
    hidden_size: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 768
    max_positions: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    draft_intermediate_size: int = 1024
    draft_vocab_size: int = 3584  # EAGLE-3 only: the most frequent tokens of the target's generations
    aux_layers: tuple[int, int, int] = (2, 5, 8)  # hidden states before these layers; 8 of 8: before the final norm

    def as_record(self) -> dict:
        """Return the sizes as JSON values."""
        return {**asdict(self), "aux_layers": list(self.aux_layers)}


class RMSNorm(nn.Module):
    """Llama's norm: fp32 inside, scaled by a learned weight after rounding back."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight.to(x.dtype)


def rotation(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [..., D] of rotary embedding in the half-split (NeoX, Hugging Face) layout, in fp32."""
    inverse = 1.0 / (theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim))
    angles = positions.float()[..., None] * inverse
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, heads, T, D] by tables that broadcast against it."""
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-right, left), dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention; the projections apart from the product, since drafts attend in their own way."""

    def __init__(self, shape: Shape, input_size: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.q_proj = nn.Linear(input_size, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(input_size, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(input_size, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden_size, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries [B, H, T, D], rotated keys and values [B, G, T, D]."""
        batch, tokens, _ = x.shape
        q = self.q_proj(x).view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def output(self, attended: Tensor) -> Tensor:
        """Merge heads [B, H, T, D] and project back to the hidden size."""
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Llama's gated SiLU."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map the hidden size to itself."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer of the target."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = Attention(shape, shape.hidden_size)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = MLP(shape.hidden_size, shape.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor] | None, start: int) -> Tensor:
        """Attend causally; with a cache [B, G, S, D] write T new tokens at `start` and attend to all before them."""
        q, k, v = self.self_attn.project(self.input_layernorm(x), cos, sin)
        end = start + x.shape[1]
        if cache is not None:
            cache[0][:, :, start:end] = k
            cache[1][:, :, start:end] = v
            k, v = cache[0][:, :, :end], cache[1][:, :, :end]
        # A prefill starts at 0 (plain causal); a decode step has one query that sees everything before it.
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0 and x.shape[1] > 1, enable_gqa=True)
        x = x + self.self_attn.output(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class Target(nn.Module):
    """LlamaForCausalLM with tied embeddings; the parameter names are those of its checkpoint."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.compute_dtype: torch.dtype | None = None  # of the residual stream while training under autocast
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)

    def initialise(self, seed: int) -> "Target":
        """Draw all weights from one generator: N(0, 0.02), residual outputs scaled by depth."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = 0.02 / (2 * self.shape.layers) ** 0.5 if deep else 0.02
                weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale)
        return self

    def forward(
        self, tokens: Tensor, caches: list[tuple[Tensor, Tensor]] | None = None, start: int = 0, aux: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the hidden states after the final norm [B, T, C] and, if asked, the auxiliary ones [B, T, 3C]."""
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        cos, sin = rotation(positions, self.shape.head_dim, self.shape.rope_theta)
        x = self.embed_tokens(tokens)
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        kept = []
        for index, layer in enumerate(self.layers):
            if aux and index in self.shape.aux_layers:
                kept.append(x)
            x = layer(x, cos, sin, caches[index] if caches else None, start)
        if aux and len(self.layers) in self.shape.aux_layers:
            kept.append(x)
        return self.norm(x), torch.cat(kept, dim=-1) if aux else None

    def logits(self, hidden: Tensor) -> Tensor:
        """Project normed hidden states onto the vocabulary."""
        return F.linear(hidden, self.embed_tokens.weight.to(hidden.dtype))

    def empty_caches(self, batch: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Return one empty key/value cache [B, G, S, D] per layer, in the weights' dtype."""
        size = (batch, self.shape.kv_heads, tokens, self.shape.head_dim)
        weight = self.embed_tokens.weight
        return [(weight.new_zeros(size), weight.new_zeros(size)) for _ in self.layers]


def attend_with_chain(q: Tensor, keys: Tensor, values: Tensor, chain: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attend causally to the first pass's tokens, and to the query's own later draft steps.

    This is what a draft sees in vLLM's KV cache: accepted tokens from the first pass (true hidden states), then one
    entry for every token that it has drafted since.

    Args:
        q: [B, H, T, D]; row i belongs to the chain that starts at position i.
        keys, values: [B, G, T, D] of the first pass; row i sees 0..i.
        chain: keys and values [B, G, T, D] of the later steps; row i sees row i of each.
    """
    groups = q.shape[1] // keys.shape[1]
    tokens, size = q.shape[-2:]
    if not chain:
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scale = size**-0.5
    scores = (q @ keys.transpose(-1, -2)).float() * scale
    unseen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(unseen, float("-inf"))
    own = [(q * k.repeat_interleave(groups, 1)).float().sum(-1, keepdim=True) * scale for k, _ in chain]
    weights = torch.cat([scores, *own], dim=-1).softmax(-1).to(q.dtype)
    attended = weights[..., :tokens] @ values
    for step, (_, v) in enumerate(chain):
        attended = attended + weights[..., tokens + step, None] * v.repeat_interleave(groups, 1)
    return attended


class DraftLayer(nn.Module):
    """What both drafts share: attention over first pass and chain, then the MLP; the norms differ."""

    def __init__(self, shape: Shape, input_size: int):
        super().__init__()
        self.self_attn = Attention(shape, input_size)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = MLP(shape.hidden_size, shape.draft_intermediate_size)

    def forward(
        self, x: Tensor, residual: Tensor, positions: Tensor, past: list[tuple[Tensor, Tensor]], theta: float
    ) -> Tensor:
        """Return the layer's output [B, T, C] and append this step's keys and values to `past`."""
        cos, sin = rotation(positions, self.self_attn.head_dim, theta)
        q, k, v = self.self_attn.project(x, cos, sin)
        first, chain = (past[0], [*past[1:], (k, v)]) if past else ((k, v), [])
        past.append((k, v))
        residual = residual + self.self_attn.output(attend_with_chain(q, *first, chain))
        return residual + self.mlp(self.post_attention_layernorm(residual))


class EagleDraft(nn.Module):
    """EagleLlamaForCausalLM: fc over (next token, hidden), one layer without input norm, the target's own lm_head."""

    method = "eagle"

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.fc = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=False)
        self.layers = nn.ModuleList([DraftLayer(shape, shape.hidden_size)])

    def start(self, final: Tensor, aux: Tensor | None) -> Tensor:
        """Return the first hidden states: the target's, after its final norm."""
        return final

    def step(self, embeds: Tensor, hidden: Tensor, positions: Tensor, past: list) -> tuple[Tensor, Tensor]:
        """Draft one token everywhere: (hidden for the head, hidden for the next step), here the same, not normed."""
        x = self.fc(torch.cat((embeds, hidden), dim=-1))
        x = self.layers[0](x, x, positions, past, self.shape.rope_theta)
        return x, x

    def logits(self, hidden: Tensor, target: Target) -> Tensor:
        """Score the whole vocabulary with the target's head."""
        return target.logits(hidden)


class Eagle3Draft(nn.Module):
    """Eagle3LlamaForCausalLM: three hidden states fused by fc, a layer with a doubled input, a head of its own."""

    method = "eagle3"

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.fc = nn.Linear(3 * shape.hidden_size, shape.hidden_size, bias=False)
        self.midlayer = DraftLayer(shape, 2 * shape.hidden_size)
        self.midlayer.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.midlayer.hidden_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.draft_vocab_size, bias=False)
        # Target token of every draft token; exported as vLLM's offsets d2t and mask t2d.
        self.register_buffer("draft_tokens", torch.arange(shape.draft_vocab_size), persistent=False)

    def start(self, final: Tensor, aux: Tensor | None) -> Tensor:
        """Return the first hidden states: three of the target's, fused."""
        return self.fc(aux)

    def step(self, embeds: Tensor, hidden: Tensor, positions: Tensor, past: list) -> tuple[Tensor, Tensor]:
        """Draft one token everywhere: (normed hidden for the head, hidden before the norm for the next step)."""
        x = torch.cat((self.midlayer.input_layernorm(embeds), self.midlayer.hidden_norm(hidden)), dim=-1)
        x = self.midlayer(x, hidden, positions, past, self.shape.rope_theta)
        return self.norm(x), x

    def logits(self, hidden: Tensor, target: Target) -> Tensor:
        """Score the draft vocabulary; `draft_tokens` says which target tokens these are."""
        return self.lm_head(hidden)


DRAFTS = {"eagle": EagleDraft, "eagle3": Eagle3Draft}


def new_draft(method: str, shape: Shape, seed: int) -> EagleDraft | Eagle3Draft:
    """Return a draft with all weights drawn from one generator, N(0, 0.02), and `fc` starting as "pass it on"."""
    draft = DRAFTS[method](shape)
    generator = torch.Generator().manual_seed(seed)
    for weight in draft.parameters():
        if weight.dim() == 2:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    # The last block of fc's input is the target's most informed hidden state: start from handing it through.
    size = shape.hidden_size
    draft.fc.weight.data[:, -size:] += torch.eye(size)
    return draft
