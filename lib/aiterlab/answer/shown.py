# SPDX-License-Identifier: Apache-2.0
"""The page's numbers as people read them beside it: names, units, spreads behind numbers, a dash where nothing is."""

from __future__ import annotations

import pandas as pd

from aiterlab.attention.tables import readable

DASH = "—"


def sources(table: pd.DataFrame) -> pd.DataFrame:
    """What was read, from where, or why nothing was."""
    shown = table.drop(columns="kind").assign(made=table["made"].str[:10])
    return shown.fillna(DASH).rename(columns={"reason": "does not count because"})


def verdicts(cells: pd.DataFrame) -> pd.DataFrame:
    """How many cells of each tree got which verdict."""
    counts = cells.groupby(["machine", "tree", "verdict"], sort=False).size().unstack(fill_value=0)
    return counts.astype(int).reset_index().rename_axis(columns=None)


def errors(checks: pd.DataFrame) -> pd.DataFrame:
    """Checks of each provider and dtype: how many, how many right, median and largest share of the tolerance."""
    groups = checks.astype({"error_over_tolerance": float}).groupby(["machine", "provider", "dtype"], sort=False)
    return _plain(
        pd.DataFrame(
            {
                "checks": groups.size(),
                "right": groups["outcome"].agg(lambda outcomes: int((outcomes == "ok").sum())),
                "median error / tolerance": groups["error_over_tolerance"].median(),
                "largest error / tolerance": groups["error_over_tolerance"].max(),
            }
        )
    )


def matches(scores: pd.DataFrame) -> pd.DataFrame:
    """Exact match with its standard error: a line per backend and trial, a column per method."""
    pairs = zip(scores["value"], scores["stderr"], strict=True)
    told = [f"{value:.3f} ± {DASH if pd.isna(error) else f'{error:.3f}'}" for value, error in pairs]
    rows = scores.assign(told=told, trial=scores["task"].astype(str) + ", " + scores["shots"].astype(str) + "-shot")
    rows = rows.drop_duplicates(["machine", "backend", "trial", "method"])
    table = rows.set_index(["machine", "backend", "trial", "samples", "method"])["told"].unstack(sort=False)
    return _plain(table.rename_axis(columns=None))


def kernels(table: pd.DataFrame) -> pd.DataFrame:
    """The range over workloads of each operation and provider: share of the ceiling, and how the suite compares."""
    groups = table.groupby(["machine", "operation", "provider"], sort=False)
    share, times = groups["share_of_ceiling"].agg(["size", "min", "median", "max"]), groups["suite_times"]
    shown = share.set_axis(["workloads", "of ceiling, least", "median", "most"], axis=1)
    spans = {"suite is × as fast, least": times.min(), "at most": times.max()}
    return _plain(shown.assign(**spans))


def fastest(times: pd.DataFrame) -> pd.DataFrame:
    """The fastest K of each method, backend and cell, in milliseconds per token, with the spread of its rounds."""
    rows = times.dropna(subset="speed_up")
    keys = ["machine", "weights", "method", "backend", "batch", "context"]
    best = (
        rows.loc[rows.astype({"speed_up": float}).groupby(keys, sort=False)["speed_up"].idxmax()] if len(rows) else rows
    )
    return pd.DataFrame(
        {
            **{name: best[name] for name in keys},
            "K": best["K"],
            "acceptance": best["acceptance"].fillna(DASH),
            "ms per token": best["ms_per_token"],
            "median round": best["ms_per_token_median"],
            "p80": best["ms_per_token_p80"],
            "× vanilla": best["speed_up"],
        }
    ).reset_index(drop=True)


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    return readable(table.reset_index()).replace("–", DASH)
