# SPDX-License-Identifier: Apache-2.0
"""Write the model cards and the manifest from the records of a training run, so that no number is typed by hand."""

import hashlib
import json
from pathlib import Path

from aiterlab.records import atomic_write_text, dump_json, load_record

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """Return a file's hash."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_manifest(models: Path, data: dict) -> dict:
    """Write manifest.json: every file with size and hash, every source with its licence."""
    files = sorted(p for p in models.rglob("*") if p.is_file() and p.name != MANIFEST and not p.name.startswith("."))
    manifest = {
        "files": {p.relative_to(models).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files},
        "data": data,
    }
    atomic_write_text(models / MANIFEST, dump_json(manifest))
    return manifest


def write_cards(models: Path, data: dict) -> None:
    """Write README.md of the folder and of each model, then the manifest over everything."""
    evaluation = load_record(models / "evaluation.json")
    for name, text in {
        "target": _target_card(load_record(models / "target" / "training.json"), evaluation, data),
        "eagle": _draft_card(load_record(models / "eagle" / "training.json"), evaluation),
        "eagle3": _draft_card(load_record(models / "eagle3" / "training.json"), evaluation),
    }.items():
        atomic_write_text(models / name / "README.md", text)
    atomic_write_text(models / "README.md", _overview(data))
    write_manifest(models, data)


def read_data_manifest(corpus: Path) -> dict:
    """Read what `corpus` wrote about its sources."""
    return json.loads((corpus / "data.json").read_text(encoding="utf-8"))


def _table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join("–" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def _acceptance(evaluation: dict, method: str) -> str:
    rows = [
        [
            r["task"],
            r["temperature"],
            r["prompts"],
            f"{r['acceptance_length']:.2f} ± {r['standard_error'] or 0:.2f}",
            f"{r['p10_over_prompts']:.2f} to {r['p90_over_prompts']:.2f}",
            ", ".join(f"{p:.2f}" for p in r["per_position"]),
        ]
        for r in evaluation["acceptance"]
        if r["method"] == method and r["acceptance_length"] is not None
    ]
    head = ["task", "temperature", "prompts", "acceptance length ± s.e.", "10th to 90th percentile", "per position"]
    return _table(head, rows)


def _training_line(record: dict) -> str:
    return (
        f"{record['parameters'] / 1e6:.2f} M parameters; {record['tokens'] / 1e6:.0f} M tokens in {record['steps']} "
        f"steps, {record['train_s']:.0f} s (and {record['compile_s']:.0f} s of compilation) "
        f"on one {record['device']}; seed {record['seed']}. "
        "The curve is in training.json."
    )


def _target_card(record: dict, evaluation: dict, data: dict) -> str:
    losses = record["heldout_loss_nats_per_token"]
    scores = evaluation["arithmetic_exact_match"]
    size = data["text_bytes"]
    return f"""# A small target for speculative decoding

A Llama of {record["shape"]["layers"]} layers and hidden size {
        record["shape"]["hidden_size"]
    } with a byte-level vocabulary
of {
        record["shape"]["vocab_size"]
    } tokens (digits one by one), so that speculative decoding can be studied offline in a real
engine. It is a test object: it imitates the form of Python code and its documentation, and knows nothing.

**Training.** {_training_line(record)}

**Data.** {size["code"] / 1e6:.0f} MB of Python source, {size["prose"] / 1e6:.0f} MB of documentation and
{size["arithmetic"] / 1e6:.0f} MB of generated exercises, from {
        len({s["name"] for s in data["sources"] if s["split"] == "train"})
    }
projects under permissive licences (MIT, BSD, Apache-2.0, PSF, ISC); names, versions, licences and hashes in
../manifest.json.
Held out as whole projects: {", ".join(data["held_out_projects"])}.

**Held-out loss** (nats per token, weights as shipped):

{_table(["task", "loss"], [[task, f"{loss:.3f}"] for task, loss in losses.items()])}

**Arithmetic, exact match on exercises that training never saw**:

{
        _table(
            ["setting", "exercises", "exact match ± s.e."],
            [[k, v["exercises"], f"{v['exact_match']:.3f} ± {v['standard_error']:.3f}"] for k, v in scores.items()],
        )
    }

**Limits.** Trained on windows of {record["length"]} tokens: longer contexts run (up to {
        record["shape"]["max_positions"]
    }) but
mean little. English and Python only. Greedy text often repeats itself, which also raises acceptance. Not for any use in
which what it says matters. It may reproduce fragments of its sources.

Licence: Apache-2.0. Made by `python -m aiterlab.spec_decode.train`.
"""


def _draft_card(record: dict, evaluation: dict) -> str:
    eagle3 = record["model"] == "eagle3"
    name = "EAGLE-3" if eagle3 else "EAGLE"
    how = (
        f"reads the target's hidden states before layers {', '.join(map(str, record['shape']['aux_layers']))} "
        "(the last: before its final norm) and has a head over "
        f"{record['shape']['draft_vocab_size']} of {record['shape']['vocab_size']} tokens "
        f"({100 * record['draft_vocabulary_coverage']:.1f} % of what the target writes)"
        if eagle3
        else "reads the target's last hidden state and shares its embedding and head"
    )
    return f"""# An {name} draft for ../target

One layer; {how}.

**Training.** {_training_line(record)} It learned from the target's own generations (greedy and sampled) continuing
training prompts, unrolled over {record["unrolled_steps"]} steps.

**Acceptance** on held-out projects, {evaluation["draft_tokens"]} draft tokens, {evaluation["new_tokens"]} new tokens
a prompt, bonus token included, by the recipe's own evaluator:

{_acceptance(evaluation, record["model"])}

The spread is over prompts. **Limits.** Fits this target only. Learned on sequences of {record["length"]} tokens;
acceptance may fall on longer ones. Text of other kinds is drafted worse, or better where the target repeats itself.

Licence: Apache-2.0. Made by `python -m aiterlab.spec_decode.train`.
"""


def _overview(data: dict) -> str:
    return f"""# Bundled models

| folder | what |
| --- | --- |
| target | the model that speaks |
| eagle, eagle3 | its drafts |
| heldout | prompts of projects that none was trained on ({", ".join(data["held_out_projects"])}); held-out exercises |
| evaluation.json | acceptance and exact match after training |
| manifest.json | hash of every file; every source with version, licence and hash |

The held-out prompts are excerpts of their projects, each under the licence that its line names.
"""
