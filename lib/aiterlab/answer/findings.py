# SPDX-License-Identifier: Apache-2.0
"""Sentences made from the tables, each with the machine that it holds on: a title per panel, one for all of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import pandas as pd

from aiterlab.answer.sources import EAGLE, FIX, KERNELS
from aiterlab.answer.tables import Frames, missing

TRAP = "builtin trap"  # the verdict of a cell that met Python's builtin in the place of the module
RIVALS = {
    "flash_attn": "FlashAttention",
    "vllm_triton": "vLLM's Triton",
    "aiter": "AITER's",
    "aiter_triton": "AITER's Triton",
}
WEIGHTS = {"models": "the models that ship", "shape": "the shape of Llama-3.1-8B, acceptance assumed"}
HOTFIXED, EAGLES = "hotfixed", ("eagle", "eagle3")
NOTEBOOKS = {"fix": FIX, "error": KERNELS, "kernels": KERNELS} | dict.fromkeys(
    ("match", "tokens", "backends", "acceptance"), EAGLE
)


def panels(frames: Frames) -> dict[str, str]:
    """The finding of each panel on the first machine it has; where its notebook has no record, why."""
    absent = missing(frames["sources"])
    told = _told({name: table if name == "sources" else _first(table) for name, table in frames.items()})
    return {
        name: text or f"— {absent.get(NOTEBOOKS[name], 'not run: nothing of the kind is in these records')}"
        for name, text in told.items()
    }


def whole(frames: Frames) -> str:
    """The one sentence for the head of the report: fix, errors, answers, speed and kernels, on every machine."""
    told = _told(frames)
    parts = [told[name] for name in ("fix", "error", "match", "tokens", "kernels") if told[name]]
    text = "; ".join(part if index == 0 else part[0].lower() + part[1:] for index, part in enumerate(parts))
    return f"{text or 'No record to answer from'}."


def lacking(frames: Frames) -> str:
    """Which notebooks the answer has to do without, and why."""
    return "; ".join(missing(frames["sources"]).values()) or "Every notebook has a record that counts"


def _told(frames: Frames) -> dict[str, str]:
    return {
        "fix": fix(frames["cells"]),
        "error": error(frames["checks"]),
        "match": match(frames["scores"], frames["greedy"]),
        "kernels": kernels(frames["kernels"]),
        "tokens": tokens(frames["times"]),
        "backends": backends(frames["times"]),
        "acceptance": acceptance(frames["acceptance"]),
    }


def description(titles: Mapping[str, str], headline: str) -> str:
    """The page in words, for those who cannot see it."""
    return f"One page, seven panels. {headline}. " + " ".join(
        f"Panel {letter}: {text.rstrip('.')}." for letter, text in zip("abcdefg", titles.values(), strict=True)
    )


def headline(frames: Frames) -> str:
    """The page's title: the same numbers in fewer words, those of each notebook's first machine."""
    cells, checks, scores, times = (_first(frames[name]) for name in ("cells", "checks", "scores", "times"))
    told: dict[str, list[str]] = {}
    if len(cells):
        met = cells.assign(met=cells["verdict"] == TRAP).groupby("tree", sort=False)["met"].sum()
        cured = met[met.index.str.startswith(HOTFIXED)]
        found = f"the fix takes {met.max()} broken cells to {cured.max()}" if len(cured) else f"{met.max()} cells break"
        told.setdefault(cells["machine"].iloc[0], []).append(found)
    if len(checks):
        wrong, largest = int((checks["outcome"] != "ok").sum()), checks["error_over_tolerance"].astype(float).max()
        kept = f"kernel errors stay within {largest:.0%} of their tolerance"
        told.setdefault(checks["machine"].iloc[0], []).append(
            f"{wrong} of {len(checks)} kernel checks fail" if wrong else kept
        )
    if differences := list(_differences(scores)):
        inside = all(abs(difference) <= error for difference, error in differences)
        where = "" if inside else "not everywhere "
        found = f"EAGLE's exact match is {where}vanilla's within a standard error"
        told.setdefault(scores["machine"].iloc[0], []).append(found)
    best = {words: found for weights, words in WEIGHTS.items() if (found := _best_eagle(times, weights)) is not None}
    if best:
        found = _and(f"{number:.2f} times as fast on {words}" for words, number in best.items())
        told.setdefault(times["machine"].iloc[0], []).append(f"EAGLE is up to {found}")
    sentence = "; ".join(f"on {machine} {_and(parts)}" for machine, parts in told.items())
    return _sentence(sentence) or "No record to answer from"


def fix(cells: pd.DataFrame) -> str:
    """How many cells end in the builtin, tree by tree."""
    if cells.empty:
        return ""
    counts = cells.assign(met=cells["verdict"] == TRAP).groupby("tree", sort=False)["met"].agg(["sum", "size"])
    broken, clean = counts[counts["sum"] > 0], counts[counts["sum"] == 0]
    where = f"on {_and(cells['machine'].unique())}"
    if broken.empty:
        return f"None of {len(cells)} cells ends in Python's builtin aiter {where} ({_and(clean.index)})"
    told = _and(f"{row['sum']} of {row['size']} cells of {tree}" for tree, row in broken.iterrows())
    cured = f", none of {_and(clean.index)}" if len(clean) else ""
    return f"Before and after the fix: {told} end in Python's builtin aiter {where}{cured}"


def error(checks: pd.DataFrame) -> str:
    """How far within their tolerance the kernels stay."""
    told = []
    for machine, mine in _by_machine(checks):
        wrong, largest = int((mine["outcome"] != "ok").sum()), mine["error_over_tolerance"].astype(float).max()
        if wrong:
            told.append(f"{wrong} of {len(mine)} checks of kernels are wrong or failed on {machine}")
        else:
            told.append(
                f"{len(mine)} checks of kernels are right on {machine}, errors up to {largest:.0%} of the tolerance"
            )
    return "; ".join(told)


def match(scores: pd.DataFrame, greedy: pd.DataFrame) -> str:
    """Whether a draft changes greedy tokens, and whether answers with it score as those without."""
    told = []
    for machine in dict.fromkeys([*scores["machine"], *greedy["machine"]]):
        parts, tokens = [], greedy[greedy["machine"] == machine]
        if len(tokens):
            different = int(tokens["different"].sum())
            verb = "differ" if different else "are vanilla's"
            parts.append(
                f"{different or ''} greedy answers {verb} ({tokens['compared_tokens'].sum():,} tokens)".strip()
            )
        if differences := list(_differences(scores[scores["machine"] == machine])):
            inside = sum(abs(difference) <= error for difference, error in differences)
            largest = max(abs(difference) for difference, _ in differences)
            parts.append(
                f"exact match with a draft is vanilla's within a standard error in {inside} of {len(differences)}, "
                f"off by {largest:.3f} at most"
            )
        told.append(f"on {machine} " + ", ".join(parts))
    return _sentence("; ".join(told))


def kernels(table: pd.DataFrame) -> str:
    """How close the suite comes to the ceiling, and how it compares with each vendor's fastest kernel."""
    told = []
    for machine, mine in _by_machine(table):
        suite = mine[mine["provider"] == "suite"]["share_of_ceiling"].dropna()
        if mine["kind"].iloc[0] != "gpu":
            told.append(f"on {machine} Triton's interpreter ran, which says nothing about a GPU")
            continue
        spans = (
            f"{_span(times)} times as fast as {name}"
            for provider, name in RIVALS.items()
            if len(times := mine[mine["provider"] == provider]["suite_times"].dropna())
        )
        reached = (
            f"the suite's kernels reach {_span(suite)} of the ceiling" if len(suite) else "the suite was not timed"
        )
        told.append(", ".join([f"on {machine} {reached}", *spans]))
    return _sentence("; ".join(told))


def tokens(times: pd.DataFrame) -> str:
    """The fastest method and K on each machine, on real weights and on the shape."""
    told = []
    for machine, mine in _by_machine(times):
        found = (_fastest(mine[mine["weights"] == weights], what) for weights, what in WEIGHTS.items())
        if parts := list(filter(None, found)):
            aside = "" if mine["kind"].iloc[0] == "gpu" else ", which says nothing about a GPU,"
            told.append(f"on {machine}{aside} " + ", ".join(parts))
    return _sentence("; ".join(told))


def _fastest(rows: pd.DataFrame, what: str) -> str:
    rows = rows[(rows["K"] > 0) & (rows["group"] != "backends")].dropna(subset="speed_up")
    if rows.empty:
        return ""
    best = rows.loc[rows["speed_up"].astype(float).idxmax()]
    cell = f"{best['batch']}x{context(best['context'])}"
    return f"{best['method']} with K = {best['K']} has {best['speed_up']:.2f} times vanilla's speed on {what} ({cell})"


def backends(times: pd.DataFrame) -> str:
    """What a drafted token takes with each attention backend at the longest context, as a multiple of the fastest."""
    told = []
    for machine, mine in _by_machine(longest(times)):
        drafted = mine[mine["K"] > 0].dropna(subset="ms_per_token").sort_values("ms_per_token")
        if len(drafted) > 1:
            first, last = drafted.iloc[0], drafted.iloc[-1]
            times_as_long = last["ms_per_token"] / first["ms_per_token"]
            where = f"{first['method']}, K = {first['K']}, {machine}"
            told.append(
                f"{last['backend']} takes {times_as_long:.1f} times as long a token as {first['backend']} "
                f"({context(first['context'])} tokens, {where})"
            )
    return _sentence("; ".join(told))


def acceptance(table: pd.DataFrame) -> str:
    """How much of the first and of the last position is accepted."""
    if table.empty:
        return ""
    mine = table[table["machine"] == table["machine"].iloc[0]]
    first = mine[mine["position"] == 1]["rate"]
    last = mine[mine["position"] == mine.groupby("method")["position"].transform("max")]["rate"]
    machine = mine["machine"].iloc[0]
    return f"Greedy drafts are accepted at {_percent(first)} in first position, {_percent(last)} in last on {machine}"


def longest(times: pd.DataFrame) -> pd.DataFrame:
    """The rows in which backends took turns, at the longest context of each machine."""
    rows = times[times["group"] == "backends"]
    return rows[rows["context"] == rows.groupby("machine")["context"].transform("max")]


def context(tokens: int) -> str:
    """A number of tokens as people write it."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def _differences(scores: pd.DataFrame) -> Iterator[tuple[float, float]]:
    """Each drafted score less vanilla's of the same backend and trial, and the standard error of the two."""
    trial = ["backend", "task", "shots", "filter"]
    vanilla = scores[scores["method"] == "vanilla"].set_index(trial)
    for row in scores[scores["method"] != "vanilla"].itertuples():
        key = tuple(getattr(row, name) for name in trial)
        if key in vanilla.index:
            mine = vanilla.loc[[key]].iloc[0]
            yield row.value - mine["value"], math.hypot(row.stderr or 0, mine["stderr"] or 0)


def _best_eagle(times: pd.DataFrame, weights: str) -> float | None:
    rows = times[
        (times["weights"] == weights) & times["method"].str.startswith("eagle") & (times["group"] != "backends")
    ]
    best = rows["speed_up"].astype(float).max()
    return None if math.isnan(best) else best


def _first(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first machine."""
    return table[table["machine"] == table["machine"].iloc[0]] if len(table) else table


def _by_machine(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    yield from table.groupby("machine", sort=False)


def _span(numbers: pd.Series) -> str:
    low, high = numbers.astype(float).min(), numbers.astype(float).max()
    return f"{low:.2g}" if math.isclose(low, high) else f"{low:.2g}–{high:.2g}"


def _percent(rates: pd.Series) -> str:
    return f"{rates.min():.0%}–{rates.max():.0%}" if len(rates) > 1 else f"{rates.iloc[0]:.0%}"


def _and(parts: Iterable[str]) -> str:
    parts = list(parts)
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
