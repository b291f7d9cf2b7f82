# SPDX-License-Identifier: Apache-2.0
"""What people look at: the rows of a study as tables, and as what a figure draws.

Rows stay in the record as they are. Here columns get names for people, and what was not measured a dash with a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from aiterlab import paths, records
from aiterlab.attention.tables import plain
from aiterlab.spec_decode import accuracy, cost, latency
from aiterlab.spec_decode.models import Pair
from aiterlab.spec_decode.study import MODELS

KERNELS_STEM = "04_run_attention_kernels"
KERNEL_CASES = ("verify_q4_1x8k", "verify_q4_1x32k")
MOST_DIFFERENCES = 12  # lines of the table
OWN_BACKEND = "vLLM's choice"
_TITLES = {
    "base": "against",
    "near_ties": "near-ties",
    "widest_near_tie_gap": "widest gap",
    "compared_tokens": "tokens compared",
    "request_id": "request",
    "position": "at token",
    "vanilla_token": "vanilla's token",
    "other_token": "other token",
    "acceptance_length": "acceptance length",
    "smallest_p_adjusted": "smallest p (Holm)",
    "largest_distance": "largest distance",
    "as_it_should": "as it should",
    "start_s": "start, s",
    "generate_s": "answers, s",
    "ready_s": "start, s",
    "tokens_per_s": "tokens/s",
    "ttft_ms": "first token, ms",
    "tpot_ms": "per token, ms",
}


@dataclass(frozen=True)
class Shown:
    """What two figures need: speed-up by K, and where a step's time goes."""

    rows: list[dict]
    parts: list[dict]
    title: str
    parts_title: str
    assumed: str | None  # what acceptance was set to, where it was not measured


def models(pairs: Mapping[str, Pair]) -> dict[str, str]:
    """Name target and drafts, without a path of this machine."""
    named = {"target": pairs["vanilla"].target} | {f"draft, {k}": p.draft for k, p in pairs.items() if p.draft}
    home = paths.models_dir()
    return {
        what: f"bundled: {Path(model).name}" if Path(model).parent == home else Path(model).name
        for what, model in named.items()
    }


def facts(rows: Sequence[dict]) -> pd.DataFrame:
    """What happened before the first measured step of each engine."""
    table = pd.DataFrame(rows)
    used = zip(table["target_backends"], table["draft_backends"], strict=True)
    shown = {
        "attends with": [", ".join(dict.fromkeys((*target, *draft))) for target, draft in used],
        "computes in": table["dtype"],
        "import, s": table["import_s"],
        "load, s": table["load_s"],
        "of it compiling, s": table["compile_s"],
        "warm-up, s": table["warm_up_s"],
        "graphs": table["cuda_graph_mode"],
        "mended": table["repairs"].map(lambda names: "; ".join(name.partition(":")[0] for name in names) or None),
    }
    return _dashed(pd.DataFrame(shown).set_index(table["name"].rename(None)))


def losses(rows: Sequence[dict]) -> pd.DataFrame:
    """Greedy answers against vanilla's, over all tasks: one line per engine and what it is held against."""
    if not rows:
        return pd.DataFrame()
    groups = pd.DataFrame(rows).groupby(["engine", "base"], sort=False)
    counts = groups[["requests", "identical", "near_ties", "different", "compared_tokens"]].sum()
    counts["widest_near_tie_gap"] = groups["widest_near_tie_gap"].max().astype(float)
    counts["ok"] = groups["ok"].all()
    return _dashed(counts.reset_index().rename(columns=_TITLES).set_index("engine").rename_axis(index=None))


def differences(rows: Sequence[dict]) -> pd.DataFrame:
    """Where an answer first leaves the one it is held against, faults first, then near-ties by their gap."""
    names = ["engine", "base", "task", "request_id", "position", "vanilla_token", "other_token", "reason"]
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows).sort_values(["near_tie", "gap"], ascending=[True, False])
    shown = table[names].rename(columns=_TITLES).set_index(table["near_tie"].map({True: "near-tie", False: "fault"}))
    if (more := len(shown) - MOST_DIFFERENCES) > 0:
        shown = shown.head(MOST_DIFFERENCES).astype(object)
        shown.loc[f"and {more} more"] = "in the record"
    return _dashed(shown.rename_axis(index=None))


def sampled(rows: Sequence[dict]) -> pd.DataFrame:
    """Sampled continuations against vanilla's distribution."""
    return _verdicts(rows, ("engine", "tests", "smallest_p_adjusted", "band", "largest_distance", "ok", "verdict"))


def broken(rows: Sequence[dict]) -> pd.DataFrame:
    """Engines that were broken on purpose."""
    return _verdicts(rows, ("engine", "task", "acceptance_length", "identical", "different", "as_it_should", "verdict"))


def ranks(rows: Sequence[dict]) -> pd.DataFrame:
    """Tensor and data parallel ranks against one rank."""
    return _verdicts(rows, ("engine", "rank", "acceptance_length", "start_s", "generate_s", "ok", "verdict"))


def served(rows: Sequence[dict]) -> pd.DataFrame:
    """The server, as its client saw it."""
    names = ("engine", "task", "ready_s", "tokens_per_s", "ttft_ms", "tpot_ms", "acceptance_length", "ok", "verdict")
    return _verdicts(rows, names)


def own(accepted: Sequence[dict]) -> list[dict]:
    """The rows of the engines that chose their backend themselves."""
    return [row for row in accepted if row["group"] == MODELS]


def lengths(accepted: Sequence[dict]) -> pd.DataFrame:
    """Acceptance length with its 95 % interval: a line per engine, a column per task and temperature."""
    rows = [
        {"engine": row["engine"], "where": f"{row['task']}, T = {row['temperature']:g}", "length": _interval(row)}
        for row in own(accepted)
    ]
    table = pd.DataFrame(rows, columns=["engine", "where", "length"])
    shown = table.pivot_table(index="engine", columns="where", values="length", aggfunc="first", sort=False)
    return _dashed(shown.rename_axis(index=None, columns=None))


def positions(accepted: Sequence[dict]) -> pd.DataFrame:
    """Greedy acceptance by position, of each method's engine with the most draft tokens, and the counts behind it."""
    rows = [row for row in own(accepted) if not row["temperature"]]
    most = {
        row["method"]: max(other["draft_tokens"] for other in rows if other["method"] == row["method"]) for row in rows
    }
    table = [
        {
            "engine": row["engine"],
            "task": row["task"],
            "accepted of drafted": f"{row['accepted']:,} of {row['drafted']:,}",
            "by position, %": _percent(row["rates"]),
            "given the one before, %": _percent(row["conditional_rates"]),
            "steps without a draft": row["undrafted"],
            "counters and steps": row["disagreement"] or "agree",
        }
        for row in rows
        if row["draft_tokens"] == most[row["method"]]
    ]
    return pd.DataFrame(table).set_index("engine").rename_axis(index=None) if table else pd.DataFrame()


def accuracy_markdown(scores: Sequence[accuracy.Score]) -> str:
    """lm-eval's own table, per engine and backend, as pull requests quote it."""
    return accuracy.markdown(scores) if scores else "lm-eval was not asked."


def scores(found: Sequence[accuracy.Score]) -> list[dict]:
    """Scores as rows of a record."""
    return [asdict(one) for one in found]


def times(rows: Sequence[dict]) -> list[dict]:
    """Pace, spread and speed-ups of each engine and cell."""
    return latency.summary(rows)


def predictions(rows: Sequence[dict]) -> list[dict]:
    """The cost model against what was measured; the models and the shape apart."""
    return [
        {"group": kind} | row
        for kind, part in (("models", _of(rows, True)), ("shape", _of(rows, False)))
        for row in latency.compare(part)
    ]


def predicted(rows: Sequence[dict]) -> pd.DataFrame:
    """The cost model's table; errors in percent of what was measured."""
    shown = [
        {
            "weights": row["group"],
            "method": row["method"],
            "backend": row["backend"] or OWN_BACKEND,
            "cell": f"{row['batch']}x{row['context']}",
            "K": row["K"],
            "tokens per step": f"{row['tokens_per_step']:.2f} ({row['acceptance']})",
            "measured": f"{row['measured_speed_up']:.2f} ×",
            "predicted": f"{row['predicted_speed_up']:.2f} ×",
            "error": f"{row['relative_error']:+.1%}",
            "error, K left out": None if row["left_out_error"] is None else f"{row['left_out_error']:+.1%}",
            "nothing accepted": f"{row['worst_case_speed_up']:.2f} ×",
            "median round": f"{row['median_speed_up']:.2f} ×",
        }
        for row in rows
    ]
    return _dashed(pd.DataFrame(shown))


def best(rows: Sequence[dict]) -> pd.DataFrame:
    """The fastest K of each method, backend, batch and context; 0 where vanilla decoding is faster."""
    found = [
        {
            "weights": kind,
            "method": method,
            "backend": backend or OWN_BACKEND,
            "sequences": batch,
            "context": context,
        }
        | {"best K": k}
        for kind, part in (("models", _of(rows, True)), ("shape", _of(rows, False)))
        for (method, backend, batch, context), k in latency.best_draft_tokens(part).items()
    ]
    return pd.DataFrame(found)


def against(rows: Sequence[dict]) -> list[dict]:
    """This project's paged kernel against the other backends, on the shape."""
    return latency.against_backends(_of(rows, False))


def ratios(rows: Sequence[dict]) -> pd.DataFrame:
    """`against` for people."""
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    names = [
        "method",
        "K",
        "batch",
        "context",
        "acceptance",
        "ours_tok_s",
        "other",
        "other_tok_s",
        "ratio",
    ]
    renamed = {
        "ours_tok_s": "SUITE_PAGED, tok/s",
        "other": "against",
        "other_tok_s": "its tok/s",
        "ratio": "times as fast",
    }
    return table[names].rename(columns=renamed)


def figures(rows: Sequence[dict], compared: Sequence[dict]) -> dict[str, Shown]:
    """What there is to draw of speed-ups and parts of a step: the models, and the shape if it was timed."""
    shown = {}
    for kind, real in (("models", True), ("shape", False)):
        part = [row for row in _of(rows, real) if row["group"] != "backends"]
        if any(row["speed_up"] is not None and row["K"] for row in part):
            shown[kind] = _shown(part, [row for row in compared if row["group"] == kind], real)
    return shown


def throughput(rows: Sequence[dict]) -> list[dict]:
    """Tokens per second of each backend with a draft, at the long contexts of the shape."""
    return [
        {
            "backend": row["backend"],
            "context": row["context"],
            "tokens_per_s": row["steady_tok_s"],
            "tokens_per_s_low": row["steady_p20_tok_s"],
            "reason": row["reason"],
        }
        for row in rows
        if row["group"] == "backends" and row["K"]
    ]


def kernels(device: str) -> list[dict]:
    """Attention's own times from the kernels' record: of this run if there is one, else the reference of this GPU."""
    found = [paths.run_dir() / KERNELS_STEM / records.RECORD_NAME]
    found += sorted((paths.results_dir() / "reference").glob(f"*/{KERNELS_STEM}/{records.RECORD_NAME}"))
    for path in found:
        if path.is_file() and (record := records.load_record(path))["card"].get("device_name") == device:
            columns = record["timings"]
            rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
            return [row for row in rows if row["workload"] in KERNEL_CASES and row["median_us"]]
    return []


def proposals(table: pd.DataFrame) -> pd.DataFrame:
    """What each tree's EAGLE proposer said to AITER's metadata, and what the pull requests say of it."""
    if table.empty:
        return table
    titles = {
        "tree": "tree",
        "switch": "switch",
        "draft_tokens": "K",
        "check": "check of the metadata",
        "check_expected": "expected",
        "proposal": "whole proposal",
        "proposal_expected": "expected of it",
        "agrees": "agrees",
    }
    return _dashed(table[list(titles)].rename(columns=titles))


def record_rows(frame: pd.DataFrame) -> dict[str, list]:
    """A frame for a record; nothing of an empty one."""
    return {} if frame.empty else plain(frame)


def _shown(part: Sequence[dict], compared: Sequence[dict], real: bool) -> Shown:
    model = {_place(row): row for row in compared}
    cells = list(dict.fromkeys((row["batch"], row["context"]) for row in part if row["speed_up"] is not None))
    several = len(cells) > 1
    rows, parts = [], []
    for row in part:
        where = f", {row['batch']} x {row['context']}" if several else ""
        found = model.get(_place(row), {})
        if row["K"] and (row["batch"], row["context"]) in cells:
            low = row["speed_up"] * row["steady_p20_tok_s"] / row["steady_tok_s"] if row["speed_up"] else None
            rows.append(
                {"series": row["method"] + where, "method": row["method"], "draft_tokens": row["K"]}
                | {"speedup": row["speed_up"], "speedup_low": low, "predicted": found.get("predicted_speed_up")}
                | {"reason": row["reason"]}
            )
        if (row["batch"], row["context"]) == cells[0]:
            parts.append(
                {"series": row["method"], "draft_tokens": row["K"], "step_ms": row["marked_step_ms"]}
                | {name: row[f"marked_{name}"] for name in _PARTS}
                | {"reason": row["reason"]}
            )
    winner = max((row for row in rows if row["speedup"]), key=lambda row: row["speedup"])
    what = "the models that ship" if real else "the shape of Llama-3.1-8B"
    fastest = f"{winner['series']} is fastest with K = {winner['draft_tokens']}"
    title = f"On {what}, {fastest}: {winner['speedup']:.2f} times vanilla"
    whole = [row for row in parts if row["draft_tokens"] and row["step_ms"]]
    share = sum(row["host_ms"] or 0 for row in whole) / sum(row["step_ms"] for row in whole) if whole else None
    parts_title = (
        f"On {what}, the host takes {share:.0%} of a step" if share is not None else f"Parts of a step on {what}"
    )
    return Shown(_drawn(rows), _vanilla_everywhere(parts), title, parts_title, None if real else ASSUMED)


ASSUMED = f"rates per position as published ({cost.PUBLISHED_SOURCE})"
_PARTS = ("draft_ms", "verify_ms", "sample_ms", "host_ms")
_MOST_SERIES = 6


def _drawn(rows: list[dict]) -> list[dict]:
    """As many series as a figure can hold."""
    names = list(dict.fromkeys(row["series"] for row in rows))[:_MOST_SERIES]
    return [row for row in rows if row["series"] in names]


def _vanilla_everywhere(parts: list[dict]) -> list[dict]:
    """Vanilla's step beside those of every method."""
    vanilla = [row for row in parts if not row["draft_tokens"]][:1]
    methods = dict.fromkeys(row["series"] for row in parts if row["draft_tokens"])
    return [
        *(one | {"series": method} for method in methods for one in vanilla),
        *(row for row in parts if row["draft_tokens"]),
    ]


def _place(row: dict) -> tuple:
    return tuple(row[name] for name in ("backend", "method", "batch", "context", "K"))


def _of(rows: Iterable[dict], real: bool) -> list[dict]:
    return [row for row in rows if (row["group"] == MODELS) == real]


def _interval(row: dict) -> str:
    if row["acceptance_length"] is None:
        return "– (no draft was made)"
    if row["acceptance_length_low"] is None:
        return f"{row['acceptance_length']:.2f} (no interval: {row['reason']})"
    return f"{row['acceptance_length']:.2f} ({row['acceptance_length_low']:.2f}–{row['acceptance_length_high']:.2f})"


def _percent(rates: Sequence[float | None] | None) -> str:
    return "–" if rates is None else " ".join("–" if rate is None else f"{100 * rate:.0f}" for rate in rates)


def _verdicts(rows: Sequence[dict], names: Sequence[str]) -> pd.DataFrame:
    return _dashed(
        pd.DataFrame(rows, columns=list(names)).rename(columns=_TITLES).set_index("engine").rename_axis(index=None)
    )


def _dashed(table: pd.DataFrame) -> pd.DataFrame:
    return table.astype(object).where(table.notna(), "–")
