# SPDX-License-Identifier: Apache-2.0
"""Waves per SIMD of every kernel on AMD GPUs, and which of them spill."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from aiterlab.plots.style import INK, PROVIDERS, WRONG

GOAL = 2  # waves per SIMD: one computes while the other waits


def occupancy(rows: pd.DataFrame, title: str) -> Figure:
    """One bar per kernel, a panel per architecture; spills and scratch are written in red beside the bar.

    Args:
        rows: columns arch, workload, provider, launcher, reason, waves_per_simd, limited_by, vgprs, lds_bytes and what
            spills (see `attention.isa.table`). Of kernels that one launch starts, the first is drawn: the one that
            attends. A kernel that could not be compiled has no bar but its reason.
    """
    first = rows.drop_duplicates(["arch", "workload", "provider", "launcher"])
    architectures = list(first["arch"].unique())
    lines = list(first[["workload", "provider", "launcher"]].drop_duplicates().itertuples(index=False, name=None))
    lines.sort(key=lambda line: list(first["workload"].unique()).index(line[0]))
    places = _places(lines)
    fig, axes = plt.subplots(
        1,
        len(architectures),
        figsize=(2.6 + 3.0 * len(architectures), 1.4 + 0.26 * (places[-1] + 1)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, arch in zip(axes[0], architectures, strict=True):
        panel = first[first["arch"] == arch].set_index(["workload", "provider", "launcher"])
        _frame(ax, arch, places[-1], most=16 if (panel["waves_per_simd"] > 8).any() else 8)
        for y, line in zip(places, lines, strict=True):
            if line in panel.index:
                _bar(ax, y, panel.loc[line], PROVIDERS[line[1]])
    axes[0, 0].set_yticks(places, [launcher for _, _, launcher in lines], fontsize=8.5)
    for y, (workload, _, _) in zip(places, lines, strict=True):
        if workload not in [line[0] for line in lines[: places.index(y)]]:
            axes[0, 0].text(-0.02, y - 0.85, workload, transform=axes[0, 0].get_yaxis_transform(), ha="right",
                            va="center", fontsize=9, fontweight="bold", color=INK)  # fmt: skip
    fig.suptitle(title, fontsize=12, fontweight="bold", color=INK, x=0.01, ha="left")
    seen = [name for name in PROVIDERS if name in set(first["provider"])]
    handles = [Patch(facecolor=PROVIDERS[name], label=name) for name in seen]
    handles.append(Patch(facecolor=WRONG, label="spills, or needs scratch memory"))
    fig.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=9)
    return fig


def _places(lines: list[tuple[str, str, str]]) -> list[float]:
    """Heights of the bars, with room for a heading over each workload."""
    places, y, before = [], 0.0, None
    for workload, _, _ in lines:
        y += 1 if workload == before else 2.1
        places.append(y)
        before = workload
    return places


def _bar(ax, y: float, row: pd.Series, colour: str) -> None:
    grey = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 7.5, "color": "#777777"}
    if not pd.isna(row["reason"]):
        ax.text(0.015, y, _short(row["reason"]), style="italic", **grey)
        return
    waves = row["waves_per_simd"]
    if pd.isna(waves):
        ax.text(0.015, y, f"{row['vgprs']} VGPRs, waves not known", **grey)
        return
    spilled = row["vgpr_spills"] + row["sgpr_spills"]
    wrong = spilled or row["scratch_bytes"] or waves == 0
    ax.barh(y, waves, height=0.78, color=colour, edgecolor=WRONG if wrong else "none", linewidth=1.4)
    note = f"{row['vgprs']} VGPRs" if waves else f"{row['lds_bytes'] // 1024} KiB of LDS do not fit"
    if waves and row["limited_by"] == "LDS":
        note += f", {row['lds_bytes'] // 1024} KiB LDS"
    if spilled:
        note += f", {spilled} spilled"
    elif row["scratch_bytes"]:
        note += f", {row['scratch_bytes']} B scratch"
    text = ax.text(waves + 0.02 * ax.get_xlim()[1], y, note, va="center", fontsize=7.5, color=WRONG if wrong else INK)
    text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # the goal's line passes behind


def _short(reason: str) -> str:
    return reason if len(reason) <= 44 else reason[:43] + "…"


def _frame(ax, arch: str, last: float, most: int) -> None:
    ax.axvline(GOAL, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    ax.set(xlim=(0, 1.7 * most), ylim=(last + 0.8, 0.4))
    ax.set_xticks(range(0, most + 1, most // 4))
    ax.set_xlabel("waves per SIMD (dashed: the goal)", fontsize=9, loc="left")
    ax.set_title(arch, fontsize=11, fontweight="bold", color=INK, loc="left")
    ax.tick_params(axis="y", length=0, colors=INK)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
