# SPDX-License-Identifier: Apache-2.0
"""Does vLLM's EAGLE proposer accept AITER's attention metadata, and can it draft with AITER's attention?

After its first pass a proposer that drafts more than one token checks that the type of the attention metadata is one
it allows. The regression (vllm-project/vllm#32902) allowed AITER's type only with the switch at 1; the fix (#33749)
allows it wherever the backend exists. Each proposal is made twice: whole, with the draft's attention computed by the
tree's AITER backend and held against float64, and with that attention left out, because in the regressed tree it dies
before the check is reached. The proposer, its metadata builder, the attention layer and the layout of the paged cache
are the tree's own. The draft around the layer is a stand-in: a few matrices with random weights.

`propose` runs in a probe's process, `table` in the one that asks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from aiterlab import trees as states
from aiterlab.machines import Machine
from aiterlab.machines.description import with_switch
from aiterlab.probes import cells, failure, models, pool

# The fourth is cured but for the proposer: there a whole proposal reaches the check and is rejected.
TREES = ("release:0.15.1", "regressed", "hotfixed", "hotfixed-without-7", "release:0.16.0")
SWITCHES = ("unset", "1")  # with "0" every one of these trees answers as with "unset"
DRAFT_TOKENS = (1, 3)
COLUMNS = ["tree", "arch", "switch", "draft_tokens", "metadata", "check", "check_expected", "proposal"]
COLUMNS += ["proposal_expected", "agrees", "check_message", "proposal_message", "passes", "max_abs_error", "tolerance"]
COLUMNS += ["simulated", "stand_ins", "no_answer_reason"]
REFUSAL = "Unsupported attention metadata type"  # how vLLM's message begins, in every tree
# (tokens cached, tokens that the target verified) of each sequence; the first one drafts on into its second page.
LENGTHS = ((14, 2), (17, 3))
WIDTH = models.HEADS * models.HEAD_SIZE  # of the hidden states


class Draft:
    """One layer of an EAGLE head with random weights, around vLLM's own attention layer; remembers every pass."""

    def __init__(self, layer, dtype, device, *, attends: bool) -> None:
        import torch

        self.layer, self.attends, self.passes = layer, attends, []
        self.sizes = [heads * models.HEAD_SIZE for heads in (models.HEADS, models.KV_HEADS, models.KV_HEADS)]
        generator = torch.Generator().manual_seed(1)

        def weights(rows: int, columns: int):
            return (torch.randn(rows, columns, generator=generator) / rows**0.5).to(device, dtype)

        self.embedding, self.merge = weights(models.VOCABULARY, WIDTH), weights(2 * WIDTH, WIDTH)
        self.projections = weights(WIDTH, sum(self.sizes))

    def __call__(self, input_ids, positions, inputs_embeds, hidden_states):
        import torch
        from vllm.forward_context import get_forward_context

        merged = torch.cat([self.embedding[input_ids], hidden_states], dim=-1) @ self.merge
        query, key, value = (merged @ self.projections).split(self.sizes, dim=-1)
        metadata = get_forward_context().attn_metadata[self.layer.layer_name]
        self.passes.append([type(metadata).__name__, query, key, value])
        output = self.layer(query, key, value) if self.attends else torch.zeros_like(query)
        self.passes[-1].append(output)
        return merged + output, merged + output  # for the logits, and for the next pass

    def compute_logits(self, hidden_states):
        return hidden_states @ self.embedding.T


def propose(layer, config, proposer, package: Path, dtype, device) -> dict:
    """Let `proposer` draft, whole and with the draft's attention left out; one answer for each."""
    answers = {}
    for name, attends in (("whole", True), ("without_attention", False)):
        draft = Draft(layer, dtype, device, attends=attends)
        try:
            answer = _propose(layer, config, proposer, draft, dtype, device)
        except Exception as error:
            answer = failure.describe(error, package)
            answer["rejected"] = answer["type"] == "ValueError" and answer["message"].startswith(REFUSAL)
        answers[name] = answer | {"metadata": [kind for kind, *_ in draft.passes]}
    return answers


def _propose(layer, config, proposer, draft: Draft, dtype, device) -> dict:
    import torch
    from vllm.v1.worker.utils import AttentionGroup

    from aiterlab.probes import drive

    spec = drive.cache_spec(layer, config)
    group = AttentionGroup(layer.attn_backend, [layer.layer_name], spec, 0)
    group.create_metadata_builders(config, device, None)
    batch = drive.Batch.make(LENGTHS, dtype, seed=0)
    cache = drive.empty_cache(layer.attn_backend, spec, device)
    drive.write(layer, cache, *(part.to(device) for part in batch.cached()))
    layer.kv_cache = [cache] if isinstance(layer.kv_cache, list) else cache

    # What the model runner tells the proposer once the models are loaded; releases differ in where they look.
    proposer.model, proposer.runner = draft, SimpleNamespace(attn_groups=[[group]])
    proposer.attn_layer_names, proposer._draft_attn_layer_names = [layer.layer_name], {layer.layer_name}
    proposer.draft_attn_groups, proposer.block_size = [group], spec.block_size

    slots = batch.new()[2]
    common = drive.common_metadata(batch, slots.to(device), device)
    common.seq_lens = common.seq_lens.clone()  # the proposer counts on in place, on the host once more
    generator = torch.Generator().manual_seed(2)
    arguments = {
        "num_speculative_tokens": proposer.num_speculative_tokens,
        "target_token_ids": torch.randint(models.VOCABULARY, (len(slots),), generator=generator, dtype=torch.int32),
        "target_positions": torch.cat([torch.arange(cached, cached + new) for cached, new in LENGTHS]),
        "target_hidden_states": torch.randn(len(slots), WIDTH, generator=generator).to(dtype),
        "next_token_ids": torch.randint(models.VOCABULARY, (len(LENGTHS),), generator=generator, dtype=torch.int32),
        "token_indices_to_sample": None,
        "last_token_indices": None,  # its older name
        "common_attn_metadata": common,
        "sampling_metadata": SimpleNamespace(all_greedy=True, temperature=None),
    }
    asked = [name for name in inspect.signature(proposer.propose).parameters if name in arguments]
    drafted = proposer.propose(**{name: _on(device, arguments[name]) for name in asked})
    answer = {"outcome": "ok", "rejected": False, "drafted": drafted.tolist()}
    if draft.attends:
        error, limit = _error(batch, draft)
        answer |= {"outcome": "ok" if error <= limit else "wrong", "max_abs_error": error, "tolerance": limit}
    return answer


def _on(device, value):
    return value.to(device) if hasattr(value, "device") else value


def _error(batch, draft: Draft) -> tuple[float, float]:
    """Largest distance of the attention of any pass from float64, and the largest allowed."""
    import torch

    from aiterlab.attention import reference
    from aiterlab.probes import drive

    worst, limit = 0.0, 0.0
    cached = [[part[:length].flatten(1) for part, (length, _) in zip(parts, LENGTHS, strict=True)]
              for parts in (batch.keys, batch.values)]  # fmt: skip
    for number, (_, *tensors) in enumerate(draft.passes):
        tokens = [new if number == 0 else 1 for _, new in LENGTHS]
        parts = [tensor.cpu().split(tokens) for tensor in tensors]
        for i, (query, key, value, output) in enumerate(zip(*parts, strict=True)):
            for known, new in zip(cached, (key, value), strict=True):
                known[i] = torch.cat([known[i], new])
            shaped = (query, cached[0][i], cached[1][i], output)
            *operands, output = (part.unflatten(-1, (-1, models.HEAD_SIZE)) for part in shaped)
            distance = (output.double() - reference.attend(*operands, drive.SCALE)).abs().max().item()
            worst = max(worst, distance) if distance == distance else float("inf")  # NaN: read where nothing is
            limit = max(limit, reference.tolerance(*operands, drive.SCALE))
    return worst, limit


def table(
    trees: Sequence[str] = TREES,
    switches: Sequence[str] = SWITCHES,
    draft_tokens: Sequence[int] = DRAFT_TOKENS,
    *,
    arch: str = "gfx942",
    workers: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> pd.DataFrame:
    """Ask every tree at every switch with AITER's backend chosen by name, and hold it against the pull requests.

    Returns one line per tree, switch and number of draft tokens. `check`: the type of the metadata was accepted,
    rejected or not asked for (one draft token needs no check). `proposal`: what a whole proposal came to. `agrees` is
    None where the pull requests say nothing about the tree, or where nothing was found (`no_answer_reason`).

    Args:
        arch: a simulated GPU, or `native`.
        workers, progress: as in `probes.ask`.
    """
    base = Machine("native") if arch == "native" else Machine(arch=arch)
    asked, lines = [], []
    for name in trees:
        try:
            tree = states.get(name)
        except states.TreeError as error:  # such as no network: a line that says so, and the others are asked
            about = {"tree": name, "arch": base.arch, "no_answer_reason": str(error)}
            lines += [about | {"switch": s, "draft_tokens": count} for s in switches for count in draft_tokens]
            continue
        asked += [
            cells.Cell(tree, with_switch(base, switch), cells.EXPLICIT, tuple(draft_tokens)) for switch in switches
        ]
    rows = pool.ask(asked, workers=workers, progress=progress) if asked else []
    return pd.DataFrame([*(line(row, count) for row in rows for count in draft_tokens), *lines], columns=COLUMNS)


def line(row: dict, draft_tokens: int) -> dict:
    """One line of the table from the row of one cell."""
    facts = row["facts"].get("proposer", {})
    answers = facts.get("proposals", {}).get(str(draft_tokens))
    whole, alone = (answers[name] if answers else {} for name in ("whole", "without_attention"))
    found = (_check(alone, draft_tokens), _proposal(whole)) if answers else (None, None)
    said = expected(row["tree"], row["switch"], draft_tokens)
    return {
        **{name: row[name] for name in ("tree", "arch", "switch")},
        "draft_tokens": draft_tokens,
        "metadata": ", ".join(dict.fromkeys(whole.get("metadata", []) + alone.get("metadata", []))) or None,
        "check": found[0],
        "check_expected": said[0],
        "proposal": found[1],
        "proposal_expected": said[1],
        "agrees": None if None in (*said, *found) else found == said,
        "check_message": _message(alone),
        "proposal_message": _message(whole),
        "passes": len(whole.get("metadata", [])) if whole.get("outcome") in ("ok", "wrong") else None,
        "max_abs_error": whole.get("max_abs_error"),
        "tolerance": whole.get("tolerance"),
        "simulated": row["simulated"],
        "stand_ins": len(row["facts"].get("stand_ins", [])),
        "no_answer_reason": None if answers else row["no_answer_reason"] or _message(facts),
    }


def expected(tree: str, switch: str, draft_tokens: int) -> tuple[str | None, str | None]:
    """What the pull requests say of the check and of a whole proposal; None of a tree that they do not name."""
    lacks_fix = tree in ("regressed", "hotfixed-without-7")
    if not (lacks_fix or tree == "hotfixed" or tree.startswith(("release:", "hotfixed:"))):
        return None, None
    rejects = lacks_fix and switch != "1"
    check = "not made" if draft_tokens == 1 else "rejected" if rejects else "accepted"
    if tree == "regressed" and rejects:  # its attention, in the first pass, is worse off than its proposer
        return check, str(cells.Verdict.TRAPPED)
    return check, "rejected" if check == "rejected" else "drafts"


def finding(lines: pd.DataFrame) -> str:
    """Where the proposer rejects AITER's metadata, and whether that is what the pull requests say."""
    checked = lines[lines["draft_tokens"] > 1]
    rejected = checked[checked["check"] == "rejected"]
    where = "; ".join(
        f"{tree} at {', '.join(part['switch'].unique())}" for tree, part in rejected.groupby("tree", sort=False)
    )
    said = lines["agrees"].dropna()
    return (
        f"With more than one draft token, vLLM's EAGLE proposer rejects AITER's metadata in {len(rejected)} of"
        f" {checked['check'].count()} cases ({where or 'none'}); {int(said.sum())} of {len(said)} lines agree with the"
        f" pull requests, {lines['check'].isna().sum()} gave no answer."
    )


def _check(answer: dict, draft_tokens: int) -> str:
    """What became of the check, told by a proposal in which little else can fail."""
    if answer["rejected"]:
        return "rejected"
    if answer["outcome"] == "error":
        return "not reached"
    return "not made" if draft_tokens == 1 else "accepted"


def _proposal(answer: dict) -> str:
    if answer["rejected"]:
        return "rejected"
    if answer["outcome"] != "error":
        return "drafts" if answer["outcome"] == "ok" else "wrong attention"
    trapped = answer["type"] == "AttributeError" and cells.TRAP in answer["message"]
    return str(cells.Verdict.TRAPPED if trapped else cells.Verdict.BROKEN)


def _message(answer: dict) -> str | None:
    return f"{answer['type']}: {answer['message']}" if answer.get("outcome") == "error" else None
