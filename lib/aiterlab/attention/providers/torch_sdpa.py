# SPDX-License-Identifier: Apache-2.0
"""Provider `torch_sdpa`: torch's scaled_dot_product_attention, which picks one of its own back ends.

It knows neither pages nor ragged batches. So K and V are contiguous beforehand, which is not timed, and sequences of
unequal lengths are one call each.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from aiterlab.attention.inputs import Inputs
from aiterlab.attention.providers.provider import ATTEND, Implementation, Launch, Limits, Provider, deliver
from aiterlab.attention.workloads import Workload
from aiterlab.policy import Answer


def _prepare(inputs: Inputs, out: torch.Tensor) -> Launch:
    sequences = inputs.workload.sequences
    if len(set(sequences)) == 1 and inputs.workload.tokens:
        return _batched(inputs, out)
    q = inputs.q.split([new for _, new in sequences])
    k, v = (part.split(list(inputs.workload.lengths)) for part in (inputs.k, inputs.v))
    outs = out.split([new for _, new in sequences])
    calls = [
        (part, _heads_first(q[i], 1), _heads_first(k[i], 1), _heads_first(v[i], 1), _mask(inputs, *sequence))
        for i, (part, sequence) in enumerate(zip(outs, sequences, strict=True))
        if sequence[1]
    ]

    def launch() -> None:
        for part, query, key, value, mask in calls:
            part.copy_(_attend(inputs, query, key, value, mask)[0].transpose(0, 1))

    return launch


def _batched(inputs: Inputs, out: torch.Tensor) -> Launch:
    count = len(inputs.workload.sequences)
    query, key, value = (_heads_first(part, count) for part in (inputs.q, inputs.k, inputs.v))
    mask = _mask(inputs, *inputs.workload.sequences[0])

    def launch() -> None:
        result = _attend(inputs, query, key, value, mask).transpose(1, 2)
        deliver(out, result.view_as(out) if result.is_contiguous() else result.reshape(out.shape))

    return launch


def _heads_first(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """[count * n, H, D] as [count, H, n, D]."""
    return tokens.unflatten(0, (count, -1)).transpose(1, 2)


def _attend(inputs: Inputs, query, key, value, mask) -> torch.Tensor:
    """[B, H, new, D]; `mask` is a tensor, or whether torch's own causal mask fits."""
    grouped = query.shape[1] != key.shape[1]
    scale = inputs.softmax_scale
    if isinstance(mask, bool):
        return scaled_dot_product_attention(query, key, value, is_causal=mask, scale=scale, enable_gqa=grouped)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)


def _mask(inputs: Inputs, context: int, new: int):
    """Torch's causal flag is aligned top left: it fits a whole prompt; a single token sees every key."""
    w = inputs.workload
    if not w.window and not w.alibi:
        if not w.causal or new == 1:
            return False
        if not context:
            return True
        from torch.nn.attention.bias import causal_lower_right  # imports Triton, which must not come too early

        return causal_lower_right(new, context + new)
    device = inputs.q.device
    distance = torch.arange(context + new, device=device) - torch.arange(context, context + new, device=device)[:, None]
    left, right = inputs.window_size[0], 0 if w.causal else inputs.window_size[1]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    if not w.alibi:
        return ~hidden
    bias = inputs.alibi_slopes[:, None, None] * distance
    return bias.masked_fill(hidden, float("-inf")).to(inputs.q.dtype)


def _refuses(w: Workload) -> str | None:
    if any(new and context < 0 for context, new in w.sequences):
        return "a row without a visible key is NaN in torch"
    return None


TORCH_SDPA = Provider(
    "torch_sdpa",
    (
        Implementation(
            "torch_sdpa",
            "sdpa",
            Limits(ATTEND, layouts=("NHD", "SHUFFLE"), softcap=False, non_causal=True),
            _prepare,
            refuses=_refuses,
            note="K and V contiguous beforehand: gathering them is not timed",
        ),
    ),
    available=lambda: Answer(True, f"torch {torch.__version__}"),
)
