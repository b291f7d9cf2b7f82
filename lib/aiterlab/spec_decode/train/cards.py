# SPDX-License-Identifier: Apache-2.0
"""Write the model cards and the manifest from the records of a training run, so that no number is typed by hand."""

import hashlib
import json
from pathlib import Path

from aiterlab.records import atomic_write_text, dump_json, load_record

MANIFEST = "manifest.json"
ONE_RUN = "one run of the recipe"


def sha256(path: Path) -> str:
    """Return a file's hash."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_manifest(models: Path, data: dict, runs: str) -> dict:
    """Write manifest.json: every file with size and hash, how the weights were made, every source with its licence."""
    files = sorted(p for p in models.rglob("*") if p.is_file() and p.name != MANIFEST and not p.name.startswith("."))
    manifest = {
        "files": {p.relative_to(models).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files},
        "runs": runs,
        "data": data,
    }
    atomic_write_text(models / MANIFEST, dump_json(manifest))
    return manifest


def write_cards(models: Path, data: dict, runs: str | None = None) -> None:
    """Write README.md of the folder and of each model, then the manifest over everything.

    Args:
        runs: which runs of the recipe made the weights, in words; what the manifest says already if None.
    """
    runs = runs or _known_runs(models / MANIFEST) or ONE_RUN
    data = data | {"held_out_projects": sorted(set(data["held_out_projects"]))}
    evaluation = load_record(models / "evaluation.json")
    training = {name: load_record(models / name / "training.json") for name in ("target", "eagle", "eagle3")}
    atomic_write_text(models / "target" / "README.md", _target_card(training["target"], evaluation, data))
    for name in ("eagle", "eagle3"):
        atomic_write_text(models / name / "README.md", _draft_card(training[name], evaluation))
    atomic_write_text(models / "README.md", _overview(training, evaluation, data, runs))
    write_manifest(models, data, runs)


def read_data_manifest(corpus: Path) -> dict:
    """Read what `corpus` wrote about its sources."""
    return json.loads((corpus / "data.json").read_text(encoding="utf-8"))


def _known_runs(manifest: Path) -> str | None:
    return json.loads(manifest.read_text(encoding="utf-8")).get("runs") if manifest.is_file() else None


def _table(head: list, rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join("–" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def _acceptance(evaluation: dict, method: str, prompt: str) -> str:
    """Show one line per task and temperature, one column per number of new tokens."""
    cells: dict[tuple, dict[int, str]] = {}
    for r in evaluation["acceptance"]:
        if r["method"] == method and r["prompt"] == prompt and r["acceptance_length"] is not None:
            spread = f"{r['p10_of_16_prompts']:.2f}–{r['p90_of_16_prompts']:.2f}"
            line = cells.setdefault((r["task"], r["temperature"]), {})
            line[r["new_tokens"]] = f"{r['acceptance_length']:.2f} ± {r['standard_error']:.2f} ({spread})"
    columns = evaluation["new_tokens"]
    rows = [[*key, *(line.get(count) for count in columns)] for key, line in cells.items()]
    return _table(["task", "temperature", *(f"{count} new tokens" for count in columns)], rows)


def _lengths(evaluation: dict) -> tuple[int, int]:
    """Return a short and the longest number of new tokens."""
    measured = evaluation["new_tokens"]
    return 64 if 64 in measured else min(measured), max(measured)


def _greedy(evaluation: dict, method: str) -> list[dict]:
    """Return the rows of greedy decoding after whole prompts, for a short and the longest output."""
    return [
        r
        for r in evaluation["acceptance"]
        if (r["method"], r["prompt"], r["temperature"]) == (method, "whole", 0)
        and r["new_tokens"] in _lengths(evaluation)
    ]


def _positions(evaluation: dict, method: str) -> str:
    rows = [
        [r["task"], r["new_tokens"], *(f"{rate:.2f}" for rate in r["per_position"])]
        for r in _greedy(evaluation, method)
    ]
    return _table(["task", "new tokens", *range(1, evaluation["draft_tokens"] + 1)], rows)


def _chains(evaluation: dict, method: str) -> str:
    found = [
        r
        for r in evaluation["acceptance_by_draft_tokens"]
        if r["method"] == method and r["new_tokens"] in _lengths(evaluation)
    ]
    rows = [[r["task"], r["new_tokens"], *(f"{a:.2f}" for a in r["acceptance_length"])] for r in found]
    return _table(["task", "new tokens", *(f"K = {k}" for k in found[0]["draft_tokens"])], rows)


def _projects(evaluation: dict, method: str) -> str:
    said = []
    for r in _greedy(evaluation, method):
        if r.get("by_project"):
            least, most = (choose(r["by_project"].items(), key=lambda pair: pair[1]) for choose in (min, max))
            said.append(
                f"{r['task']}, {r['new_tokens']} tokens: {least[1]:.2f} ({least[0]}) to {most[1]:.2f} ({most[0]})"
            )
    return "; ".join(said)


def _loops(evaluation: dict) -> str:
    cells: dict[tuple, dict[int, str]] = {}
    for r in evaluation["outputs"]:
        line = cells.setdefault((r["task"], r["prompt"], r["temperature"]), {})
        line[r["new_tokens"]] = f"{100 * r['ending_in_a_loop']:.0f} %"
    columns = evaluation["new_tokens"]
    rows = [[*key, *(line.get(count) for count in columns)] for key, line in cells.items()]
    return _table(["task", "prompt", "temperature", *(f"{count} new tokens" for count in columns)], rows)


def _training_line(record: dict) -> str:
    return (
        f"{record['parameters'] / 1e6:.2f} M parameters; {record['tokens'] / 1e6:.0f} M tokens in {record['steps']} "
        f"steps\non one {record['device']}: {record['train_s']:.0f} s, with start, compilation and export "
        f"{record['wall_s']:.0f} s; seed {record['seed']}. The curve is in training.json."
    )


def _target_card(record: dict, evaluation: dict, data: dict) -> str:
    shape, size = record["shape"], data["text_bytes"]
    projects = len({s["name"] for s in data["sources"] if s["split"] == "train"})
    losses = _table(["task", "loss"], [[t, f"{loss:.3f}"] for t, loss in record["heldout_loss_nats_per_token"].items()])
    scores = [
        [setting, v["exercises"], f"{v['exact_match']:.3f} ± {v['standard_error']:.3f}"]
        for setting, v in evaluation["arithmetic_exact_match"].items()
    ]
    return f"""# A small target for speculative decoding

A Llama of {shape["layers"]} layers and hidden size {shape["hidden_size"]} with a byte-level vocabulary of
{shape["vocab_size"]} tokens (digits one by one), so that speculative decoding can be studied offline in a real engine.
It is a test object: it imitates the form of Python code and its documentation, and knows nothing.

**Training.** {_training_line(record)}

**Data.** {size["code"] / 1e6:.0f} MB of Python source, {size["prose"] / 1e6:.0f} MB of documentation and
{size["arithmetic"] / 1e6:.0f} MB of generated exercises, from {projects} projects under permissive licences (MIT, BSD,
Apache-2.0, PSF, ISC); names, versions, licences and hashes are in ../manifest.json.
Held out as whole projects: {", ".join(data["held_out_projects"])}.

**Held-out loss** (nats per token, weights as shipped):

{losses}

**Arithmetic**: exact match on exercises that training never saw, greedy, {_where(evaluation)}:

{_table(["setting", "exercises", "exact match ± s.e."], scores)}

**It repeats itself.** Share of outputs that end in a loop ({evaluation["loop"]}):

{_loops(evaluation)}

**Limits.** Trained on windows of {record["length"]} tokens: longer contexts run (up to {shape["max_positions"]}) but
mean little. English and Python only. What repeats is easily drafted, so acceptance grows with the length of the output.
Not for any use in which what it says matters. It may reproduce fragments of its sources.

Licence: Apache-2.0. Made by `python -m aiterlab.spec_decode.train`.
"""


def _within(evaluation: dict, method: str) -> str:
    size = evaluation["subset_of_prompts"]
    shares = [r[f"share_of_{size}_prompts_within_10_percent"] for r in _greedy(evaluation, method)]
    return f" Within 10 % of the mean, greedy: {100 * min(shares):.0f} to {100 * max(shares):.0f} % of trials."


def _prompt_lengths(evaluation: dict) -> str:
    medians = {r["task"]: r["prompt_tokens_median"] for r in evaluation["outputs"] if r["prompt"] == "whole"}
    return ", ".join(f"{median:.0f} ({task})" for task, median in medians.items())


def _where(evaluation: dict) -> str:
    return f"on a {evaluation['device']} in {evaluation['dtype']}"


def _draft_card(record: dict, evaluation: dict) -> str:
    method, shape = record["model"], record["shape"]
    if method == "eagle3":
        layers = ", ".join(map(str, shape["aux_layers"]))
        how = (
            f"reads the target's hidden states before layers {layers} (the last: before its final norm)\n"
            f"and has a head over {shape['draft_vocab_size']} of {shape['vocab_size']} tokens "
            f"({100 * record['draft_vocabulary_coverage']:.1f} % of what the target writes)"
        )
    else:
        how = "reads the target's last hidden state and shares its embedding and head"
    prompts = max(r["prompts"] for r in evaluation["acceptance"])
    short = next(r["prompt"] for r in evaluation["acceptance"] if r["prompt"] != "whole")
    return f"""# An {"EAGLE-3" if method == "eagle3" else "EAGLE"} draft for ../target

One layer; {how}.

**Training.** {_training_line(record)}
It learned from the target's own generations (greedy and sampled) continuing training prompts, unrolled
over {record["unrolled_steps"]} steps.

**Acceptance length**, bonus token included, K = {evaluation["draft_tokens"]} draft tokens, on {prompts} prompts
per task from projects that no training saw (and exercises that it never saw). Evaluated {_where(evaluation)}, by the
recipe's own evaluator. Mean ± standard error (10th–90th percentile of trials of
{evaluation["subset_of_prompts"]} prompts):

{_acceptance(evaluation, method, "whole")}

The prompts have {_prompt_lengths(evaluation)} tokens (median). After only their {short}:

{_acceptance(evaluation, method, short)}

**How to compare.** Take the column of your number of new tokens: the target soon repeats itself, and what repeats is
easily drafted, so longer outputs raise acceptance (../target/README.md counts the loops). With prompts of the same kind
that you choose yourself, {evaluation["subset_of_prompts"]} at a time, expect a value inside the brackets four times out
of five; more prompts narrow them as 1/√n.{_within(evaluation, method)}
Projects differ too, greedy: {_projects(evaluation, method)}.

**Rate by position**, greedy, K = {evaluation["draft_tokens"]}: share of drafts accepted up to here.

{_positions(evaluation, method)}

**Acceptance length by number of draft tokens K**, greedy:

{_chains(evaluation, method)}

**Limits.** Fits this target only. Learned on sequences of {record["length"]} tokens and {record["unrolled_steps"]}
draft steps; acceptance may fall beyond. Other kinds of text are drafted worse, or better where the target repeats.

Licence: Apache-2.0. Made by `python -m aiterlab.spec_decode.train`.
"""


def _overview(training: dict[str, dict], evaluation: dict, data: dict, runs: str) -> str:
    short, longest = _lengths(evaluation)

    def length(method: str, task: str, count: int) -> str:
        rows = [r for r in _greedy(evaluation, method) if (r["task"], r["new_tokens"]) == (task, count)]
        return f"{rows[0]['acceptance_length']:.2f}" if rows else "–"

    tasks = list(dict.fromkeys(r["task"] for r in evaluation["acceptance"]))
    head = ["model", "trained in", "weights", *tasks]
    rows = [
        [
            f"[{name}]({name}/README.md)",
            f"{record['wall_s']:.0f} s",
            f"{2 * record['parameters'] / 1e6:.1f} MB",
            *(None if name == "target" else f"{length(name, t, short)} / {length(name, t, longest)}" for t in tasks),
        ]
        for name, record in training.items()
    ]
    devices = " and ".join(sorted({record["device"] for record in training.values()}))
    return f"""# Bundled models

A target and its two drafts, small enough to ship. By task: acceptance length (tokens per step, bonus token included),
greedy, K = {evaluation["draft_tokens"]}, after {short} / {longest} new tokens.

{_table(head, rows)}

Longer outputs repeat themselves and are drafted better; the cards give more lengths, temperatures, K and the spread.
Trained on one {devices}: {runs}.
Evaluated {_where(evaluation)}.

| file | what |
| --- | --- |
| heldout/ | prompts of projects that none was trained on ({", ".join(data["held_out_projects"])}); held-out exercises |
| [evaluation.json](evaluation.json) | acceptance, loops and exact match after training |
| [manifest.json](manifest.json) | hash of every file; every source with version, licence and hash |

The held-out prompts are excerpts of their projects, each under the licence that its line names.
"""
