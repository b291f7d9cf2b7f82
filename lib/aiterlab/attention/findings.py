# SPDX-License-Identifier: Apache-2.0
"""Sentences computed from the tables: what the notebook concludes, on whatever machine it ran."""

from __future__ import annotations

import pandas as pd

from aiterlab.attention.providers.place import Place


def correctness(checked: pd.DataFrame) -> str:
    """Whether every check was within its limit, and how far from it the largest error stays."""
    asked = checked[checked["outcome"] != "refused"]
    wrong = asked[asked["outcome"] != "ok"]
    if asked.empty:
        return "Nothing was checked"
    if wrong.empty:
        largest = asked["error_over_tolerance"].astype(float).max()
        count = len(asked[["provider", "implementation"]].drop_duplicates())
        return f"{len(asked)} checks of {count} implementations are right, errors up to {largest:.0%} of the tolerance"
    names = sorted(set(wrong["provider"] + " " + wrong["implementation"]))
    return f"{len(wrong)} of {len(asked)} checks are wrong or failed ({', '.join(names)})"


def speed(ratios: pd.DataFrame, place: Place, device: str) -> str:
    """How the suite's kernels compare, or why their times mean nothing."""
    if place.interpreted:
        return "Times are those of Triton's interpreter on a CPU: they say nothing about a GPU"
    if ratios.empty:
        return f"On {device} nothing was timed"
    told = []
    for name, words in (("fa3", "FA3"), ("vllm_triton", "vLLM's Triton kernels")):
        over = ratios[f"over_{name}"].dropna().astype(float)
        if len(over):
            told.append(
                f"{over.min():.2f}–{over.max():.2f} times as fast as {words} ({(over >= 1).sum()} of {len(over)} ≥ 1)"
            )
    return f"On {device} the suite is " + (" and ".join(told) or "timed without a rival to compare with")


def ceiling(rated: pd.DataFrame, place: Place) -> str:
    """How close the suite comes to what plain torch reached in the same run, and where memory or products limit."""
    mine = rated[(rated["provider"] == "suite") & rated["share_of_ceiling"].notna()]
    if mine.empty:
        return "No rate was measured beside a ceiling"
    if place.interpreted:
        fewest = 1 / mine["share_of_ceiling"].max()
        return f"Under the ceilings by a factor of {fewest:,.0f} and more: the limit is Triton's interpreter"
    told = []
    for unit, words in (("TB/s", "of copy bandwidth"), ("TFLOP/s", "of the matrix product's rate")):
        best = mine[mine["unit"] == unit].groupby("workload")["share_of_ceiling"].max()
        if len(best):
            told.append(f"{best.min():.2g} to {best.max():.2g} {words}")
    return f"The suite's fastest routes reach {' and '.join(told)}"


def bar(goals: pd.DataFrame) -> str:
    """How many goals were met, and by how much the others were missed."""
    judged = goals[goals["met"].notna()]
    if judged.empty:
        return "The bar is stated for an H200: no row of it could be judged here"
    missed = judged[~judged["met"].astype(bool)]
    text = f"{len(judged) - len(missed)} of {len(judged)} goals are met"
    told = [
        f"{row.workload} from {row.k_and_v} {row.reached:.2f} of {row.quantity}, wanted {row.wanted:g}"
        for row in missed.itertuples()
    ]
    return text + (f"; missed: {'; '.join(told)}" if told else "")


def two_step(table: pd.DataFrame, place: Place) -> str:
    """What gathering first costs."""
    if table.empty:
        return "Gather-then-attend was not timed beside a fused kernel"
    slower = (table["ratio"] > 1).sum()
    span = f"{table['ratio'].min():.2g} to {table['ratio'].max():.2g}"
    told = f"athering first takes {span} times as long as attending from the pages ({slower} of {len(table)} slower)"
    return f"In Triton's interpreter g{told}" if place.interpreted else f"G{told}"


def code(isa: pd.DataFrame) -> str:
    """Whether the suite's kernels keep to registers on AMD GPUs, and how many waves of them fit."""
    mine = isa[(isa["provider"] == "suite") & isa["reason"].isna()] if len(isa) else isa
    if mine.empty:
        return "No kernel of the suite was compiled for an AMD GPU"
    where = " and ".join(mine["arch"].unique())
    spills = mine[(mine["vgpr_spills"] + mine["sgpr_spills"] + mine["scratch_bytes"]) > 0]
    held = "none" if spills.empty else f"{len(spills)}"
    waves = mine["waves_per_simd"].dropna()
    least = f", and at least {waves.min():g} waves of each fit on a SIMD" if len(waves) else ""
    return f"Of {len(mine)} kernels of the suite for {where} {held} spills or needs scratch{least}"


def whole(correctness: str, speed: str, registers: str, goals: pd.DataFrame, place: Place) -> str:
    """The one sentence for the head of the report."""
    judged = goals["met"].notna().any()
    parts = (
        [correctness, registers, speed]
        if place.interpreted
        else [correctness, speed, bar(goals) if judged else registers]
    )
    return "; ".join(part if index == 0 else part[0].lower() + part[1:] for index, part in enumerate(parts)) + "."
