# SPDX-License-Identifier: Apache-2.0
"""Sentences computed from the rows: what the notebook concludes, on whatever machine it ran."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from aiterlab.probes import proposer
from aiterlab.spec_decode.accuracy import Score, within_error
from aiterlab.spec_decode.engine import SUITE_PAGED
from aiterlab.spec_decode.study import VANILLA
from aiterlab.spec_decode.tables import MODELS, own


def lossless(greedy: Sequence[dict], sampled: Sequence[dict], broken: Sequence[dict]) -> str:
    """Whether any draft changed a token, and whether the checks could have told."""
    if not greedy:
        return "Nothing was compared with vanilla decoding"
    wrong = sorted({row["engine"] for row in greedy if row["different"]})
    thin = sorted({row["engine"] for row in greedy if not row["ok"] and not row["different"]})
    engines = {row["engine"] for row in greedy}
    ties, tokens = sum(row["near_ties"] for row in greedy), sum(row["compared_tokens"] for row in greedy)
    told = f"{len(engines)} engines give vanilla's greedy tokens ({tokens:,} compared, {_count(ties, 'near-tie')})"
    if wrong:
        told = f"Greedy answers are not vanilla's in {', '.join(wrong)}"
    if thin:
        told += f"; near-ties leave too little to compare in {', '.join(thin)}"
    for row in sampled:
        found = f"{'the same' if row['ok'] else 'another'} distribution"
        found = found if row["verified"] else "too few samples to tell"
        told += f"; at temperature 1 {found} with {row['engine']}"
    if broken:
        missed = [row["engine"] for row in broken if row["as_it_should"] is False]
        untold = [row["engine"] for row in broken if row["as_it_should"] is None]
        told += "; " + ("broken engines were told apart" if not missed else f"not noticed: {', '.join(missed)}")
        told += f"; too few samples to judge {', '.join(untold)}" if untold else ""
    return told


def acceptance(accepted: Sequence[dict]) -> str:
    """How many tokens a greedy step gives with the most draft tokens of each method, by task."""
    rows = _longest(accepted)
    if not rows:
        return "No draft was made"
    told = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        lengths = ", ".join(f"{row['task']} {row['acceptance_length']:.2f}" for row in mine)
        told.append(f"{method} (K = {mine[0]['draft_tokens']}) {lengths}")
    return f"Tokens per step: {'; '.join(told)}"


def histogram(accepted: Sequence[dict]) -> str:
    """How often a step gives all that it can."""
    rows = _longest(accepted)
    if not rows:
        return "No draft was made"
    best = max(rows, key=lambda row: row["acceptance_length"])
    full = best["steps_by_tokens"][-1] / max(1, best["steps"])
    return f"{best['method']} on {best['task']}: {full:.0%} of the steps give all {best['draft_tokens'] + 1} tokens"


def strongest(accepted: Sequence[dict]) -> str:
    """Name the engine whose draft is accepted most often."""
    return max(_longest(accepted), key=lambda row: row["acceptance_length"])["engine"]


def speed(times: Sequence[dict], predictions: Sequence[dict]) -> str:
    """What the fastest K gives on the models, and on the shape, and how well it was predicted."""
    told = []
    for kind, what in ((MODELS, "the models that ship"), ("shape", "the shape of Llama-3.1-8B (acceptance assumed)")):
        rows = [row for row in predictions if row["group"] == kind]
        if not rows:
            continue
        best = max(rows, key=lambda row: row["measured_speed_up"])
        where = f"{best['batch']} x {best['context']}"
        errors = [abs(row["relative_error"]) for row in rows]
        told.append(
            f"on {what} {best['method']} with K = {best['K']} decodes {best['measured_speed_up']:.2f} times as fast as "
            f"vanilla ({where}), predicted to within {max(errors):.0%} at every K"
        )
    return _sentence("; ".join(told)) if told else "No speed-up was measured"


def backends(ratios: Sequence[dict], compared: pd.DataFrame) -> str:
    """What this project's paged kernel is worth in an engine, and whether the backends agree."""
    told = []
    for other in dict.fromkeys(row["other"] for row in ratios):
        rows = [row for row in ratios if row["other"] == other and row["K"]]
        spans = ", ".join(f"{row['ratio']:.2f} at {row['context'] // 1024}k" for row in rows)
        told.append(f"{spans} times the tokens per second of {other}")
    text = (
        f"on the shape of Llama-3.1-8B (acceptance assumed) {SUITE_PAGED} gives " + " and ".join(told) if told else ""
    )
    if len(compared) and len(asked := compared[compared["outputs_agree"].notna()]):
        agree = int(asked["outputs_agree"].astype(bool).sum())
        verb = "agrees" if len(asked) == 1 else "agree"
        text += f"{'; ' if text else ''}{agree} of {_count(len(asked), 'explicit backend')} {verb} with the others"
    return _sentence(text) or "No backend was compared"


def others(scores: Sequence[Score], ranks: Sequence[dict], served: Sequence[dict], proposals: pd.DataFrame) -> str:
    """Accuracy, ranks, server and proposer, a sentence each, where they were asked."""
    told = []
    if scores and len(held := within_error(scores, VANILLA)):
        inside = held["within"].dropna().astype(bool)
        worst = held["difference"].abs().max()
        told.append(
            f"scores of lm-eval differ from vanilla's by {worst:.3f} at most, {inside.sum()} of {len(inside)} within "
            "two standard errors"
        )
    if ranks:
        right = [row for row in ranks if row["ok"]]
        unasked = [row for row in ranks if row["ok"] is None]
        told.append(f"{len(right)} of {len(ranks) - len(unasked)} ranks give one rank's tokens")
        if len(unasked) == len(ranks):
            told[-1] = "no ranks could be run beside one another"
    if served:
        right = sum(row["ok"] for row in served)
        verb = "gets" if len(served) == 1 else "get"
        told.append(f"behind vllm serve {right} of {_count(len(served), 'task')} {verb} the same tokens")
    if len(proposals):
        told.append(proposer.finding(proposals).rstrip("."))
    return " ".join(f"{_sentence(one)}." for one in told)


def whole(*parts: str) -> str:
    """The one sentence for the head of the report."""
    return "; ".join(part if index == 0 else part[0].lower() + part[1:] for index, part in enumerate(parts)) + "."


def _longest(accepted: Iterable[dict]) -> list[dict]:
    """Of each method and task the greedy row with the most draft tokens."""
    rows = [row for row in own(accepted) if not row["temperature"] and row["acceptance_length"] is not None]
    most = {method: max(row["draft_tokens"] for row in rows if row["method"] == method) for method in _methods(rows)}
    return [row for row in rows if row["draft_tokens"] == most[row["method"]]]


def _methods(rows: Iterable[dict]) -> set[str]:
    return {row["method"] for row in rows}


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
