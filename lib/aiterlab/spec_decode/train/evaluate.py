# SPDX-License-Identifier: Apache-2.0
"""Measure acceptance as vLLM would, on held-out prompts, without an engine.

The target writes; the draft is unrolled at every position of what was written. A round of speculative decoding that
starts at a position accepts as many drafts as agree with what follows. For greedy decoding that is vLLM's result
exactly; at a temperature, vLLM accepts a drafted token with the target's probability of it, which is how often the
target, sampling on its own, writes just this token: the same law.
"""

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aiterlab.records import atomic_write_text, dump_json
from aiterlab.spec_decode.train.corpus import read_jsonl
from aiterlab.spec_decode.train.draft import unroll
from aiterlab.spec_decode.train.export import load_draft, load_target
from aiterlab.spec_decode.train.generate import write
from aiterlab.spec_decode.train.model import Eagle3Draft, EagleDraft, Shape, Target
from aiterlab.spec_decode.train.tokenizer import EOS_ID, load_tokenizer

TASK_FILES = ("code", "prose", "arithmetic")


@torch.no_grad()
def matches(draft: EagleDraft | Eagle3Draft, target: Target, rows: Tensor, steps: int) -> Tensor:
    """Return [B, T - steps - 1, steps]: at row i, is the draft of step s the token i + 2 + s that was written?"""
    count = rows.shape[1] - steps - 1
    final, aux = target(rows, aux=draft.method == "eagle3")
    agreed = []
    for step, shown, _ in unroll(draft, target, rows, final, aux, steps):
        chosen = draft.logits(shown, target).argmax(-1)
        chosen = draft.draft_tokens[chosen] if draft.method == "eagle3" else chosen
        agreed.append(chosen[:, :count] == rows[:, 2 + step : 2 + step + count])
    return torch.stack(agreed, dim=-1)


def rounds(agreed: np.ndarray, prompt: int, end: int) -> np.ndarray:
    """Return how many drafts each round accepts, for one row.

    Args:
        agreed: [T', K] of `matches`.
        prompt: the prompt's length; the prefill's own token has index `prompt`, so the first round is row prompt - 1.
        end: one past the last token that counts.
    """
    accepted, at = [], prompt - 1
    leading = np.cumprod(agreed, axis=1).sum(axis=1)
    while at + 2 < end and at < len(leading):
        count = int(leading[at])
        accepted.append(count)
        at += count + 1
    return np.asarray(accepted, dtype=np.int64)


def summarise(per_prompt: list[np.ndarray], steps: int) -> dict:
    """Return acceptance length (bonus included), its standard error over prompts, rates per position, a histogram."""
    per_prompt = [a for a in per_prompt if len(a)]
    if not per_prompt:
        return {"prompts": 0, "acceptance_length": None}
    whole = np.concatenate(per_prompt)
    means = np.asarray([1 + a.mean() for a in per_prompt])
    return {
        "prompts": len(per_prompt),
        "rounds": len(whole),
        "acceptance_length": round(float(1 + whole.mean()), 4),
        "standard_error": round(float(means.std(ddof=1) / len(means) ** 0.5), 4) if len(means) > 1 else None,
        "p10_over_prompts": round(float(np.quantile(means, 0.1)), 3),
        "p90_over_prompts": round(float(np.quantile(means, 0.9)), 3),
        "per_position": [round(float((whole > k).mean()), 4) for k in range(steps)],
        "histogram": np.bincount(whole, minlength=steps + 1).tolist(),
    }


def evaluate(
    models: Path, shape: Shape, *, device: str, steps: int, new_tokens: int, temperatures: tuple[float, ...], seed: int,
    limit: int | None = None,
) -> dict:  # fmt: skip
    """Measure both drafts on every held-out task and temperature, and the arithmetic score; writes evaluation.json."""
    begin = time.perf_counter()
    place, dtype = torch.device(device), torch.bfloat16
    tokenizer = load_tokenizer(models / "target" / "tokenizer.json")
    target = load_target(models / "target", shape, dtype).to(place)
    drafts = {
        m: load_draft(models / m, m, shape, dtype).to(place) for m in ("eagle", "eagle3") if (models / m).is_dir()
    }
    table, scores = [], {}
    for task in TASK_FILES:
        records = read_jsonl(models / "heldout" / f"{task}.jsonl")[:limit]
        encoded = [tokenizer.encode(r["text"]).ids for r in records]
        lengths = torch.tensor([len(ids) for ids in encoded], device=place)
        total = int(lengths.max()) + new_tokens
        prompts = torch.zeros(len(encoded), total, dtype=torch.long, device=place)
        for row, ids in enumerate(encoded):
            prompts[row, : len(ids)] = torch.tensor(ids, device=place)
        for temperature in temperatures:
            generator = torch.Generator(place).manual_seed(seed)
            heat = torch.full((len(encoded),), temperature, device=place)
            # Beyond what is judged by `steps + 1` tokens, so that a row's last round has something to agree with.
            written = write(target, prompts, lengths, total + steps + 1, heat, generator)
            if task == "arithmetic" and temperature == 0.0:
                scores = _exact_match(tokenizer, records, written.tolist(), lengths.tolist())
            ends = [_end(row, int(n), new_tokens) for row, n in zip(written.tolist(), lengths, strict=True)]
            for method, draft in drafts.items():
                parts = [matches(draft, target, part, steps).cpu().numpy() for part in written.split(64)]
                agreed = np.concatenate(parts)
                per_prompt = [rounds(agreed[i], int(n), ends[i]) for i, n in enumerate(lengths)]
                row = {"method": method, "task": task, "temperature": temperature, **summarise(per_prompt, steps)}
                table.append(row)
                shown = f"{row['acceptance_length']} ± {row.get('standard_error')} {row.get('per_position')}"
                print(f"evaluate: {method} {task} T={temperature}: {shown}", flush=True)
    record = {
        "draft_tokens": steps,
        "new_tokens": new_tokens,
        "seed": seed,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "acceptance": table,
        "arithmetic_exact_match": scores,
        "wall_s": round(time.perf_counter() - begin, 1),
    }
    atomic_write_text(models / "evaluation.json", dump_json(record))
    print(f"evaluate: arithmetic {scores}", flush=True)
    return record


def _end(row: list[int], prompt: int, new_tokens: int) -> int:
    """Return one past the row's last token: at its EOS, or after `new_tokens`."""
    body = row[prompt : prompt + new_tokens]
    return prompt + (body.index(EOS_ID) + 1 if EOS_ID in body else len(body))


def _exact_match(tokenizer, records: list[dict], rows: list[list[int]], lengths: list[int]) -> dict:
    results: dict[str, list[bool]] = {}
    for record, row, length in zip(records, rows, lengths, strict=True):
        said = tokenizer.decode(row[length : length + 16]).split("\n")[0].strip()
        results.setdefault(record["setting"], []).append(said == record["answer"])
    return {
        setting: {
            "exercises": len(right),
            "exact_match": round(float(np.mean(right)), 4),
            "standard_error": round(float((np.mean(right) * (1 - np.mean(right)) / len(right)) ** 0.5), 4),
        }
        for setting, right in results.items()
    }
