# SPDX-License-Identifier: Apache-2.0
"""Train a draft on the target's own generations, unrolled as it will be used: every step reads what the last one wrote.

A position's first step sees the target's true hidden state; the steps after it see the draft's own output, and attend
to true states up to that position plus their own chain (see `model.attend_with_chain`). Input tokens are those the
target really wrote, which is what a chain contains as long as it is accepted.
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aiterlab.records import atomic_write_text, dump_json
from aiterlab.spec_decode.train.export import load_target, save_draft
from aiterlab.spec_decode.train.model import Eagle3Draft, EagleDraft, Shape, Target, new_draft
from aiterlab.spec_decode.train.progress import Budget
from aiterlab.spec_decode.train.target import CLIP, optimiser

TILE = 64  # rows that attention kernels take at a time
STEP_DECAY = 0.9  # weight of a step relative to the one before it: it is reached only if that one was accepted
HARD_WEIGHT = 0.3  # cross-entropy against the target's first choice, beside the one against its whole distribution
FEATURE_WEIGHT = 0.2  # EAGLE only: the output is to be the target's next hidden state


def unroll(
    draft: EagleDraft | Eagle3Draft, target: Target, rows: Tensor, final: Tensor, aux: Tensor | None, steps: int
):
    """Yield (step, hidden for the head, hidden for the next step), [B, T - steps, C], as vLLM would compute them.

    At step s, row i reads token i + 1 + s at position i + s and drafts token i + 2 + s.
    """
    count = rows.shape[1] - steps
    embeds = F.embedding(rows, target.embed_tokens.weight).to(final.dtype)
    hidden = draft.start(final, aux)[:, :count]
    past: list[tuple[Tensor, Tensor]] = []
    for step in range(steps):
        positions = torch.arange(step, step + count, device=rows.device)
        shown, hidden = draft.step(embeds[:, 1 + step : 1 + step + count], hidden, positions, past)
        yield step, shown, hidden


def draft_loss(
    draft: EagleDraft | Eagle3Draft, target: Target, rows: Tensor, final: Tensor, aux: Tensor | None, steps: int
) -> tuple[Tensor, Tensor]:
    """Return the weighted loss and, per step, how often the draft's first choice is the target's."""
    count = rows.shape[1] - steps
    loss, hits, total = rows.new_zeros((), dtype=torch.float32), [], 0.0
    everything = target.logits(final)
    for step, shown, hidden in unroll(draft, target, rows, final, aux, steps):
        wanted = everything[:, 1 + step : 1 + step + count]
        probabilities = wanted.float().softmax(-1)
        first = wanted.argmax(-1)
        if draft.method == "eagle3":
            probabilities = probabilities[..., draft.draft_tokens]
        scores = draft.logits(shown, target).float().log_softmax(-1)
        soft = -(probabilities * scores).sum(-1).mean()
        # The target's first choice within the draft's vocabulary.
        best = probabilities.argmax(-1)
        hard = -scores.gather(-1, best[..., None]).mean()
        weight = STEP_DECAY**step
        loss = loss + weight * ((1 - HARD_WEIGHT) * soft + HARD_WEIGHT * hard)
        if draft.method == "eagle":
            wanted_hidden = final[:, 1 + step : 1 + step + count]
            loss = loss + weight * FEATURE_WEIGHT * F.smooth_l1_loss(hidden.float(), wanted_hidden.float())
        total += weight
        chosen = scores.argmax(-1)
        chosen = draft.draft_tokens[chosen] if draft.method == "eagle3" else chosen
        hits.append((chosen == first).float().mean())
    return loss / total, torch.stack(hits).detach()


def frequent_tokens(rows: np.ndarray, vocab_size: int, count: int) -> Tensor:
    """Return the `count` most frequent tokens, in ascending order."""
    counts = np.bincount(rows.ravel(), minlength=vocab_size)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:count]).astype(np.int64))


def train_draft(
    method: str, generations: Path, model: Path, out: Path, shape: Shape, *, device: str, tokens: int, seconds: float,
    batch: int, steps: int, rate: float, seed: int, compiled: bool,
) -> dict:  # fmt: skip
    """Train, export to `out` and return the record that is written to training.json beside the weights."""
    begin = time.perf_counter()
    place = torch.device(device)
    # cuDNN's attention has given NaN for lengths that are no multiple of its tiles; ours are, whatever `steps` is.
    torch.backends.cuda.enable_cudnn_sdp(False)
    data = np.load(generations, allow_pickle=False)
    data = data[:, : max(data.shape[1] - steps, 0) // TILE * TILE + steps] if data.shape[1] - steps >= TILE else data
    target = load_target(model, shape, torch.bfloat16).to(place)
    draft = new_draft(method, shape, seed).to(place)
    coverage = None
    if method == "eagle3":
        kept = frequent_tokens(data, shape.vocab_size, shape.draft_vocab_size)
        coverage = float(np.isin(data, kept.numpy()).mean())
        draft.draft_tokens.copy_(kept)
        # Start from the target's rows: a head that already knows the words.
        draft.lm_head.weight.data.copy_(target.embed_tokens.weight.float()[draft.draft_tokens])
    data = torch.from_numpy(data.astype(np.int32)).to(place)
    batch = min(batch, len(data))
    generator = torch.Generator(place).manual_seed(seed)

    def loss_of(rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            final, aux = target(rows, aux=method == "eagle3")
        with torch.autocast(place.type, torch.bfloat16):
            return draft_loss(draft, target, rows, final, aux, steps)

    step_loss = torch.compile(loss_of) if compiled else loss_of
    optimizer = optimiser(draft, 0.01)
    per_step = batch * data.shape[1]
    budget = Budget(method, tokens, seconds, rate, warm_up_steps=min(100, max(1, tokens // per_step // 10)))
    order, cursor = torch.randperm(len(data), device=place, generator=generator), 0
    while budget.progress < 1.0:
        if cursor + batch > len(data):
            order, cursor = torch.randperm(len(data), device=place, generator=generator), 0
        rows = data[order[cursor : cursor + batch]].long()
        cursor += batch
        for group in optimizer.param_groups:
            group["lr"] = budget.rate()
        loss, hits = step_loss(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        budget.advance(per_step)
        if budget.step in (1, 2) or budget.step % 50 == 0:
            value = float(loss.detach())  # waits for the device
            if budget.step == 1:
                budget.start_clock()
            if not np.isfinite(value):
                raise FloatingPointError(f"{method}: loss is {value} at step {budget.step}; lower --rate")
            budget.log(loss=value, **{f"match_{i + 1}": hit for i, hit in enumerate(hits.tolist())})
    save_draft(draft, out)
    record = {
        "model": method,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "torch": torch.__version__,
        "seed": seed,
        "shape": shape.as_record(),
        "parameters": sum(p.numel() for p in draft.parameters()),
        "draft_vocabulary_coverage": coverage,
        "batch": batch,
        "length": data.shape[1],
        "unrolled_steps": steps,
        "step_decay": STEP_DECAY,
        "hard_weight": HARD_WEIGHT,
        "feature_weight": FEATURE_WEIGHT if method == "eagle" else None,
        "wall_s": round(time.perf_counter() - begin, 1),
        **budget.record(),
    }
    atomic_write_text(out / "training.json", dump_json(record))
    return record
