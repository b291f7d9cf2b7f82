# SPDX-License-Identifier: Apache-2.0
"""Train the target: a plain Llama, bf16 autocast over fp32 weights, windows drawn on the device."""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aiterlab.records import atomic_write_text, dump_json
from aiterlab.spec_decode.train.batches import Windows
from aiterlab.spec_decode.train.corpus import TASKS, load_tokens
from aiterlab.spec_decode.train.export import load_target, save_target
from aiterlab.spec_decode.train.model import Shape, Target
from aiterlab.spec_decode.train.progress import Budget

BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0


def optimiser(module: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=BETAS, fused=trained[0].is_cuda)


def train_target(
    corpus: Path, out: Path, shape: Shape, *, device: str, tokens: int, seconds: float, batch: int, length: int,
    rate: float, seed: int, compiled: bool,
) -> dict:  # fmt: skip
    """Train, export to `out` and return the record that is written to training.json beside the weights."""
    begin = time.perf_counter()
    arrays = load_tokens(corpus / "tokens.bin")
    place = torch.device(device)
    windows = Windows(arrays, place, seed)
    target = Target(shape).initialise(seed).to(place)
    target.compute_dtype = torch.bfloat16

    def loss_of(rows: Tensor) -> Tensor:
        hidden, _ = target(rows[:, :-1])
        return F.cross_entropy(target.logits(hidden).flatten(0, 1).float(), rows[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if compiled else loss_of
    optimizer = optimiser(target, WEIGHT_DECAY)
    budget = Budget("target", tokens, seconds, rate, warm_up_steps=min(200, max(1, tokens // (batch * length) // 10)))
    while budget.progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = budget.rate()
        with torch.autocast(place.type, torch.bfloat16):
            loss = step_loss(windows.draw(batch, length + 1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(target.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        budget.advance(batch * length)
        if budget.step in (1, 2) or budget.step % 100 == 0:
            value = float(loss.detach())  # waits for the device
            if budget.step == 1:
                budget.start_clock()
            if not np.isfinite(value):
                raise FloatingPointError(f"target: loss is {value} at step {budget.step}; lower --rate")
            budget.log(loss=value, norm=float(norm), rate=optimizer.param_groups[0]["lr"])
    save_target(target, out, corpus / "tokenizer.json")
    # Measured on the exported weights (rounded to bf16), since these are what users load.
    losses = heldout_losses(load_target(out, shape, torch.bfloat16).to(place), arrays, length)
    record = {
        "model": "target",
        "device": _device_name(place),
        "torch": torch.__version__,
        "seed": seed,
        "shape": shape.as_record(),
        "parameters": sum(p.numel() for p in target.parameters()),
        "batch": batch,
        "length": length,
        "weight_decay": WEIGHT_DECAY,
        "betas": list(BETAS),
        "corpus_tokens": {name: len(array) for name, array in arrays.items()},
        "heldout_loss_nats_per_token": losses,
        "wall_s": round(time.perf_counter() - begin, 1),
        **budget.record(),
    }
    atomic_write_text(out / "training.json", dump_json(record))
    print(f"target: held-out loss {losses}", flush=True)
    return record


@torch.no_grad()
def heldout_losses(
    target: Target, arrays: dict[str, np.ndarray], length: int, limit: int = 400_000
) -> dict[str, float]:
    """Return the mean loss per token on text of held-out projects, by task."""
    losses = {}
    for task in TASKS:
        tokens = torch.from_numpy(arrays[f"heldout_{task}"][:limit].astype(np.int64))
        size = min(length, len(tokens) - 1)
        rows = tokens[: (len(tokens) - 1) // size * size + 1].unfold(0, size + 1, size)
        total = 0.0
        for part in rows.split(32):
            part = part.to(target.embed_tokens.weight.device)
            logits = target.logits(target(part[:, :-1])[0])
            total += float(F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum"))
        losses[task] = round(total / (rows.shape[0] * size), 4)
    return losses


def _device_name(place: torch.device) -> str:
    return torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
