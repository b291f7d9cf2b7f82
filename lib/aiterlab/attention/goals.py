# SPDX-License-Identifier: Apache-2.0
"""Are the kernels as fast as they should be? The bar, row by row, with what was reached in this run.

The bar is stated for NVIDIA's H200, where FlashAttention 3 is what there is to reach: bf16, 32 / 8 heads of 128, pages
of 16. Elsewhere a row without its rival stays empty and says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from aiterlab.attention.workloads import CASES

BESIDE_BF16 = {"decode_64x8k_fp8": "decode_64x8k"}


@dataclass(frozen=True)
class Goal:
    """One number to reach."""

    workload: str
    quantity: str
    wanted: float
    k_and_v: str = "pages"  # where K and V are read from; "contiguous": a prompt's, as the layer made them


def _bar() -> tuple[Goal, ...]:
    speed = {"verify": 1.0, "decode": 1.0, "extend": 0.75, "prefill": 0.75}
    variants = ("_fp8", "_page64", "_page128", "_shuffle")
    attend = [w for w in CASES.values() if w.operation in speed and not w.name.endswith(variants)]
    return (
        *(Goal(w.name, "speed of FA3", speed[w.operation]) for w in attend),
        *(Goal(w.name, "speed of FA3", 0.75, "contiguous") for w in attend if w.operation == "prefill"),
        *(Goal(w.name, "speed of gather + varlen", 1.0) for w in attend if w.operation == "extend"),
        Goal("decode_64x8k", "copy bandwidth", 0.92),
        *(Goal(w.name, "copy bandwidth", 0.80) for w in CASES.values() if w.operation == "gather"),
        Goal("decode_64x8k_fp8", "speed of bf16", 1.7),
    )


GOALS = _bar()


def reached(ratios: pd.DataFrame, two_step: pd.DataFrame) -> pd.DataFrame:
    """One row per goal: wanted, reached (the suite as a multiple of the quantity), met; both missing with a reason."""
    rows = []
    for goal in GOALS:
        number, reason = _number(goal, ratios, two_step)
        met = None if number is None else number >= goal.wanted
        asked = {"workload": goal.workload, "k_and_v": goal.k_and_v, "quantity": goal.quantity, "wanted": goal.wanted}
        rows.append(asked | {"reached": number, "met": met, "reason": reason})
    return pd.DataFrame(rows).astype({"met": "boolean", "reached": "float64"})


def _number(goal: Goal, ratios: pd.DataFrame, two_step: pd.DataFrame) -> tuple[float | None, str | None]:
    mine = ratios
    if len(ratios):
        mine = ratios[(ratios["workload"] == goal.workload) & (ratios["k_and_v"] == goal.k_and_v)]
    if mine.empty:
        return None, "the suite has no time for it in this run"
    if goal.quantity == "speed of FA3":
        numbers, reason = mine["over_fa3"].dropna(), "FA3 did not run"
    elif goal.quantity == "copy bandwidth":
        numbers, reason = mine["share_of_ceiling"].dropna(), "no copy was measured"
    elif goal.quantity == "speed of gather + varlen":
        rows = two_step[(two_step["workload"] == goal.workload) & (two_step["provider"] == "suite")]
        numbers, reason = rows["ratio"], "gather + varlen did not run"
    else:
        beside = ratios[ratios["workload"] == BESIDE_BF16[goal.workload]]
        numbers = beside["suite_us"].iloc[:1] / mine["suite_us"].iloc[0]
        reason = f"{BESIDE_BF16[goal.workload]} was not timed"
    return (float(numbers.min()), None) if len(numbers) else (None, reason)


def shown(bar: pd.DataFrame) -> pd.DataFrame:
    """The goals that this run could judge, then one row for each reason why it could not judge the others."""
    judged, rest = bar[bar["met"].notna()], bar[bar["met"].isna()]
    counts = rest.groupby("reason", sort=False)["workload"].agg(goals="count", cases=lambda names: names.nunique())
    rows = [
        {"workload": f"{row.cases} cases", "quantity": f"{row.goals} goals", "reason": row.Index}
        for row in counts.itertuples()
    ]
    return pd.concat([judged.astype(object), pd.DataFrame(rows, columns=bar.columns, dtype=object)], ignore_index=True)
