# SPDX-License-Identifier: Apache-2.0
"""Measure acceptance as vLLM would, on held-out prompts, without an engine.

The target writes; the draft is unrolled at every position of what was written. A round of speculative decoding that
starts at a position accepts as many drafts as agree with what follows. For greedy decoding that is vLLM's result
exactly; at a temperature, vLLM accepts a drafted token with the target's probability of it, which is how often the
target, sampling on its own, writes just this token: the same law.

One text per prompt and temperature serves every number of new tokens (its beginning) and of draft tokens (the rounds
are laid out anew for each). A small target begins to repeat itself, and what repeats is easily drafted: acceptance
grows with the length of the output, so a number without that length says little.
"""

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aiterlab import provenance
from aiterlab.records import atomic_write_text, dump_json
from aiterlab.spec_decode.train.corpus import read_jsonl
from aiterlab.spec_decode.train.draft import unroll
from aiterlab.spec_decode.train.export import load_draft, load_target
from aiterlab.spec_decode.train.generate import write
from aiterlab.spec_decode.train.model import DRAFTS, Eagle3Draft, EagleDraft, Shape, Target
from aiterlab.spec_decode.train.tokenizer import EOS_ID, load_tokenizer

TASK_FILES = ("code", "prose", "arithmetic")
DRAFT_TOKENS = 5  # of the full table
LONGEST_CHAIN = 7  # greedy decoding is measured for 1 to so many draft tokens
SHORT_PROMPT = 32  # tokens; greedy decoding is measured on the prompts' beginnings too
BATCH, PART = 32, 16  # prompts written side by side (at all temperatures); rows drafted side by side
SUBSET = 16  # prompts of one imagined trial
RESAMPLES = 2000
LOOP_TAIL, LOOP_PERIOD = 32, 16  # an output ends in a loop if its last 32 tokens have a period of at most 16


@torch.no_grad()
def matches(draft: EagleDraft | Eagle3Draft, target: Target, rows: Tensor, steps: int, first: int = 0) -> Tensor:
    """Return [B, T - steps - 1, steps]: at row i, is the draft of step s the token i + 2 + s that was written?

    Rows before `first` are left False: in a prompt no round begins.
    """
    count = rows.shape[1] - steps - 1
    final, aux = target(rows, aux=draft.method == "eagle3")
    agreed = torch.zeros(len(rows), count, steps, dtype=torch.bool, device=rows.device)
    for step, shown, _ in unroll(draft, target, rows, final, aux, steps):
        chosen = draft.logits(shown[:, first:count], target).argmax(-1)
        chosen = draft.draft_tokens[chosen] if draft.method == "eagle3" else chosen
        agreed[:, first:, step] = chosen == rows[:, 2 + step + first : 2 + step + count]
    return agreed


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


def summarise(per_prompt: list[np.ndarray], steps: int, seed: int = 0) -> dict:
    """Return acceptance length (bonus included), how it varies with the prompts, rates per position, a histogram.

    Whole prompts are drawn again, since rounds of one text are alike: as many as there are for the standard error,
    and 16 at a time for what a trial with that many prompts may find (10th and 90th percentile).
    """
    per_prompt = [a for a in per_prompt if len(a)]
    if not per_prompt:
        return {"prompts": 0, "acceptance_length": None}
    whole = np.concatenate(per_prompt)
    length = 1 + whole.mean()
    trials = _resample(per_prompt, SUBSET, seed)
    return {
        "prompts": len(per_prompt),
        "rounds": len(whole),
        "acceptance_length": round(float(length), 4),
        "standard_error": round(float(_resample(per_prompt, len(per_prompt), seed).std()), 4),
        f"p10_of_{SUBSET}_prompts": round(float(np.quantile(trials, 0.1)), 3),
        f"p90_of_{SUBSET}_prompts": round(float(np.quantile(trials, 0.9)), 3),
        f"share_of_{SUBSET}_prompts_within_10_percent": round(float((abs(trials / length - 1) <= 0.1).mean()), 3),
        "per_position": [round(float((whole > k).mean()), 4) for k in range(steps)],
        "histogram": np.bincount(whole, minlength=steps + 1).tolist(),
    }


def _resample(per_prompt: list[np.ndarray], size: int, seed: int) -> np.ndarray:
    """Return the acceptance lengths of random choices of `size` prompts, a prompt counting by its rounds."""
    accepted, count = np.asarray([(a.sum(), len(a)) for a in per_prompt], dtype=float).T
    drawn = np.random.default_rng(seed).integers(len(per_prompt), size=(RESAMPLES, size))
    return 1 + accepted[drawn].sum(1) / count[drawn].sum(1)


def loops(body: list[int]) -> bool:
    """Say whether a text's last 32 tokens repeat with a period of at most 16."""
    tail = body[-LOOP_TAIL:]
    return len(tail) == LOOP_TAIL and any(tail[p:] == tail[:-p] for p in range(1, LOOP_PERIOD + 1))


def evaluate(
    models: Path, shape: Shape, *, device: str, new_tokens: tuple[int, ...], temperatures: tuple[float, ...], seed: int,
    limit: int,
) -> dict:  # fmt: skip
    """Measure both drafts on every held-out task and temperature, and the arithmetic score; writes evaluation.json."""
    begin = time.perf_counter()
    place = torch.device(device)
    # As vLLM computes. It matters: the digits of a new exercise are near-ties that bf16 rounds to ties, and target and
    # draft break these alike; in float32, greedy exercises are accepted 8 % less.
    dtype = torch.bfloat16
    tokenizer = load_tokenizer(models / "target" / "tokenizer.json")
    target = load_target(models / "target", shape, dtype).to(place)
    drafts = {m: load_draft(models / m, m, shape, dtype).to(place) for m in DRAFTS if (models / m).is_dir()}
    table, chains, outputs, scores = [], [], [], {}
    cases = [(task, None, temperatures) for task in TASK_FILES]
    cases += [(task, SHORT_PROMPT, (0.0,)) for task in ("code", "prose")]
    for task, cut, heats in cases:
        records = read_jsonl(models / "heldout" / f"{task}.jsonl")
        if task == "arithmetic":
            scores = _exact_match(target, tokenizer, records, place)
        records = _spread(records, limit)
        encoded = [tokenizer.encode(r["text"]).ids[:cut] for r in records]
        lengths = [len(ids) for ids in encoded]
        prompt = "whole" if cut is None else f"first {cut} tokens"
        texts = _continue(target, encoded, max(new_tokens), heats, place, seed)
        for temperature, rows in texts.items():
            greedy = temperature == 0.0
            bodies = [row[n : n + max(new_tokens)].tolist() for row, n in zip(rows, lengths, strict=True)]
            for count in new_tokens:
                kept = [_until_end(body[:count]) for body in bodies]
                share = sum(map(loops, kept)) / len(kept)
                ended = sum(body[-1] == EOS_ID for body in kept) / len(kept)
                outputs.append({"task": task, "prompt": prompt, "prompt_tokens_median": float(np.median(lengths)),
                                "temperature": temperature, "new_tokens": count, "prompts": len(kept),
                                "ending_in_a_loop": round(share, 3), "ended_before": round(ended, 3)})  # fmt: skip
            for method, draft in drafts.items():
                agreed = _agreed(draft, target, rows, lengths, LONGEST_CHAIN if greedy else DRAFT_TOKENS, place)
                for count in new_tokens:
                    ends = [n + len(_until_end(body[:count])) for n, body in zip(lengths, bodies, strict=True)]

                    def laid_out(steps, agreed=agreed, ends=ends, lengths=lengths):
                        return [rounds(a[:, :steps], n, e) for a, n, e in zip(agreed, lengths, ends, strict=True)]

                    where = {"method": method, "task": task, "prompt": prompt, "temperature": temperature}
                    where["new_tokens"] = count
                    row = {**where, "draft_tokens": DRAFT_TOKENS, **summarise(laid_out(DRAFT_TOKENS), DRAFT_TOKENS)}
                    if greedy and task != "arithmetic":
                        row["by_project"] = _by_project(records, laid_out(DRAFT_TOKENS))
                    table.append(row)
                    if greedy and cut is None:
                        ks = range(1, LONGEST_CHAIN + 1)
                        found = [summarise(laid_out(k), k)["acceptance_length"] for k in ks]
                        chains.append({**where, "draft_tokens": [*ks], "acceptance_length": found})
                    print(f"evaluate: {method} {task}, {prompt} prompts, T={temperature} {count} tokens: "
                          f"{row['acceptance_length']} ± {row.get('standard_error')}", flush=True)  # fmt: skip
    record = {
        "draft_tokens": DRAFT_TOKENS,
        "new_tokens": list(new_tokens),
        "seed": seed,
        "device": _machine(place),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "subset_of_prompts": SUBSET,
        "loop": f"the last {LOOP_TAIL} tokens have a period of at most {LOOP_PERIOD}",
        "acceptance": table,
        "acceptance_by_draft_tokens": chains,
        "outputs": outputs,
        "arithmetic_exact_match": scores,
        "wall_s": round(time.perf_counter() - begin, 1),
    }
    atomic_write_text(models / "evaluation.json", dump_json(record))
    print(f"evaluate: arithmetic {scores}", flush=True)
    return record


def _spread(records: list[dict], limit: int) -> list[dict]:
    """Choose at most `limit` records, evenly over the file."""
    count = min(limit, len(records))
    return [records[i * len(records) // count] for i in range(count)]


def _continue(
    target: Target, encoded: list[list[int]], new: int, temperatures: tuple[float, ...], place: torch.device, seed: int
) -> dict[float, list[np.ndarray]]:  # fmt: skip
    """Let the target continue every prompt at every temperature; each row holds prompt, text and a chain's length more.

    The surplus gives a row's last round something to agree with.
    """
    texts: dict[float, list] = {t: [None] * len(encoded) for t in temperatures}
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # of like length: little padding
    generator = torch.Generator(place).manual_seed(seed)
    for start in range(0, len(order), BATCH):
        cells = [(t, i) for t in temperatures for i in order[start : start + BATCH]]
        lengths = torch.tensor([len(encoded[i]) for _, i in cells])
        total = int(lengths.max()) + new + LONGEST_CHAIN + 1
        prompts = torch.zeros(len(cells), total, dtype=torch.long)
        for row, (_, i) in enumerate(cells):
            prompts[row, : len(encoded[i])] = torch.tensor(encoded[i])
        heat = torch.tensor([t for t, _ in cells], device=place)
        written = write(target, prompts.to(place), lengths.to(place), total, heat, generator).cpu().numpy()
        for row, (t, i) in zip(written, cells, strict=True):
            texts[t][i] = row[: len(encoded[i]) + new + LONGEST_CHAIN + 1]
    return texts


def _agreed(
    draft: EagleDraft | Eagle3Draft, target: Target, rows: list[np.ndarray], lengths: list[int], steps: int,
    place: torch.device,
) -> list[np.ndarray]:  # fmt: skip
    """Return `matches` for rows of different length."""
    order, found = sorted(range(len(rows)), key=lambda i: len(rows[i])), [None] * len(rows)
    for start in range(0, len(order), PART):
        part = order[start : start + PART]
        padded = np.zeros((len(part), max(len(rows[i]) for i in part)), dtype=np.int64)
        for line, i in enumerate(part):
            padded[line, : len(rows[i])] = rows[i]
        first = min(lengths[i] for i in part) - 1
        agreed = matches(draft, target, torch.from_numpy(padded).to(place), steps, first).cpu().numpy()
        for line, i in enumerate(part):
            found[i] = agreed[line, : len(rows[i]) - steps - 1]
    return found


def _by_project(records: list[dict], per_prompt: list[np.ndarray]) -> dict[str, float]:
    projects: dict[str, list[np.ndarray]] = {}
    for record, accepted in zip(records, per_prompt, strict=True):
        projects.setdefault(record["source"].split()[0], []).append(accepted)
    return {name: round(float(1 + np.concatenate(parts).mean()), 3) for name, parts in sorted(projects.items())}


def _until_end(body: list[int]) -> list[int]:
    """Cut a text after its EOS."""
    return body[: body.index(EOS_ID) + 1] if EOS_ID in body else body


def _machine(place: torch.device) -> str:
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    model = provenance.collect().get("cpu_model") or "unnamed"
    return f"CPU ({model}, {torch.get_num_threads()} threads)"


def _exact_match(target: Target, tokenizer, records: list[dict], place: torch.device) -> dict:
    """Ask every exercise, greedily; right is what stands on the line of the answer and nothing else."""
    encoded = [tokenizer.encode(r["text"]).ids for r in records]
    rows = _continue(target, encoded, 16, (0.0,), place, 0)[0.0]
    results: dict[str, list[bool]] = {}
    for record, row, ids in zip(records, rows, encoded, strict=True):
        said = tokenizer.decode(row[len(ids) : len(ids) + 16].tolist()).split("\n")[0].strip()
        results.setdefault(record["setting"], []).append(said == record["answer"])
    return {
        setting: {
            "exercises": len(right),
            "exact_match": round(float(np.mean(right)), 4),
            "standard_error": round(float((np.mean(right) * (1 - np.mean(right)) / len(right)) ** 0.5), 4),
        }
        for setting, right in results.items()
    }
