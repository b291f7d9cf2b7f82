# SPDX-License-Identifier: Apache-2.0
"""Let the target write: the drafts learn from its own continuations, and acceptance is measured on them."""

import io
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aiterlab.records import atomic_write_bytes, atomic_write_text, dump_json
from aiterlab.spec_decode.train.batches import Windows
from aiterlab.spec_decode.train.corpus import load_tokens
from aiterlab.spec_decode.train.export import load_target
from aiterlab.spec_decode.train.model import Shape, Target

PROMPT_LENGTHS = (24, 64, 128, 192, 256)
TEMPERATURES = ((0.0, 0.5), (0.7, 0.25), (1.0, 0.25))  # (temperature, share of the rows)


@torch.no_grad()
def write(
    target: Target, prompts: Tensor, lengths: Tensor, total: int, temperatures: Tensor, generator: torch.Generator
) -> Tensor:
    """Continue every row to `total` tokens with a key/value cache.

    Args:
        prompts: [B, S] tokens, rows padded on the right with anything.
        lengths: [B] how many tokens of each row are its prompt.
        temperatures: [B]; 0 takes the most likely token.
    """
    batch, shortest = prompts.shape[0], int(lengths.min())
    tokens = torch.zeros(batch, total, dtype=torch.long, device=prompts.device)
    width = min(total, prompts.shape[1])
    tokens[:, :width] = prompts[:, :width]
    caches = target.empty_caches(batch, total)
    # Gumbel-max: the largest of logits - log(exponential) is a sample, without a softmax over the vocabulary.
    warm = temperatures > 0
    sampling = bool(warm.any())
    scale = torch.where(warm, temperatures, 1.0)[:, None]
    noise = torch.empty(batch, target.shape.vocab_size, device=prompts.device)
    hidden, _ = target(tokens[:, :shortest], caches)
    for position in range(shortest, total):
        logits = target.logits(hidden[:, -1]).float()
        greedy = logits.argmax(-1)
        if sampling:
            noise.exponential_(generator=generator)
            greedy = torch.where(warm, (logits / scale - noise.log()).argmax(-1), greedy)
        tokens[:, position] = torch.where(position < lengths, tokens[:, position], greedy)
        if position + 1 < total:
            hidden, _ = target(tokens[:, position : position + 1], caches, position)
    return tokens


def generate_corpus(
    corpus: Path, model: Path, out: Path, shape: Shape, *, device: str, tokens: int, length: int, batch: int, seed: int
) -> dict:
    """Write about `tokens` tokens of prompts and continuations, in rows of `length`, to `out` (npy, uint16)."""
    begin = time.perf_counter()
    place = torch.device(device)
    dtype = torch.bfloat16
    target = load_target(model, shape, dtype).to(place)
    windows = Windows(load_tokens(corpus / "tokens.bin"), place, seed)
    batch = min(batch, max(1, tokens // length // len(PROMPT_LENGTHS)))
    rounds = max(len(PROMPT_LENGTHS), round(tokens / (batch * length)))
    rows, written = [], 0
    for index in range(rounds):
        prompt_length = min(PROMPT_LENGTHS[index % len(PROMPT_LENGTHS)], length // 2)
        prompts = windows.prompts(batch, prompt_length)
        # Rows come sorted by task; deal the temperatures out evenly over them.
        cut = torch.tensor([share for _, share in TEMPERATURES], device=place).cumsum(0)
        dealt = (torch.arange(batch, device=place) * 0.618034) % 1.0
        values = torch.tensor([t for t, _ in TEMPERATURES], device=place)
        temperatures = values[torch.searchsorted(cut, dealt).clamp(max=len(values) - 1)]
        lengths = torch.full((batch,), prompt_length, device=place)
        rows.append(write(target, prompts, lengths, length, temperatures, windows.generator).to("cpu").numpy())
        written += batch * (length - prompt_length)
        spent = time.perf_counter() - begin
        print(f"generate: {written / 1e6:.1f} M new tokens, {written / spent / 1e6:.3f} Mtok/s, "
              f"left {spent / (index + 1) * (rounds - index - 1):.0f} s", flush=True)  # fmt: skip
    whole = np.concatenate(rows).astype(np.uint16)
    np.random.default_rng(seed).shuffle(whole)
    buffer = io.BytesIO()
    np.save(buffer, whole, allow_pickle=False)
    atomic_write_bytes(out, buffer.getvalue())
    record = {
        "rows": len(whole),
        "length": length,
        "tokens": int(whole.size),
        "generated_tokens": written,
        "prompt_lengths": list(PROMPT_LENGTHS),
        "temperatures": [list(pair) for pair in TEMPERATURES],
        "seed": seed,
        "wall_s": round(time.perf_counter() - begin, 1),
    }
    atomic_write_text(out.with_suffix(".json"), dump_json(record))
    return record
