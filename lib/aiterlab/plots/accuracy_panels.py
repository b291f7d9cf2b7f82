# SPDX-License-Identifier: Apache-2.0
"""The accuracy panels of the answer's page: errors of kernels, scores of engines."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from aiterlab.plots.page import SMALL, TEXT, blank
from aiterlab.plots.spec_decode import BACKENDS, MARKERS
from aiterlab.plots.style import FAINT, INK, PROVIDERS, WRONG

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
LEAST, MOST = 1e-2, 4.0  # shares of the tolerance: exact ones are drawn at the left edge, what has none at the right


def error(ax: Axes, checks: pd.DataFrame, absent: pd.DataFrame) -> None:
    """Every check's error as a share of its tolerance: a line per provider and dtype."""
    if checks.empty:
        blank(ax)
        return
    machines = list(checks["machine"].unique())
    absent = absent[~absent["provider"].isin(checks["provider"])].drop_duplicates("provider")
    lines = []
    for provider in PROVIDERS:
        mine = checks[checks["provider"] == provider]
        lines += [(provider, dtype) for dtype in SHORT if dtype in set(mine["dtype"])]
        lines += [(provider, None) for _ in absent.index[absent["provider"] == provider]]
    ax.axvspan(1, MOST, color="#F9E3E3", zorder=0)
    ax.axvline(1, color=WRONG, linewidth=1.2, zorder=1)
    for y, (provider, dtype) in enumerate(lines):
        if dtype is None:
            why = absent[absent["provider"] == provider]["reason"].iloc[0]
            ax.text(LEAST, y, f"— not run: {why}", fontsize=SMALL, color=FAINT, va="center", zorder=4,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
            continue
        rows = checks[(checks["provider"] == provider) & (checks["dtype"] == dtype)]
        for place, machine in enumerate(machines):
            _shares(ax, y, rows[rows["machine"] == machine], PROVIDERS[provider], hollow=place > 0)
        largest = rows["error_over_tolerance"].astype(float).max()
        told = ("—" if np.isnan(largest) else f"{largest:.0%}") + f" ({len(rows)})"
        ax.annotate(told, (1.03, y), xycoords=("axes fraction", "data"), va="center", fontsize=SMALL, color=INK)
    _grouped(ax, [(provider, SHORT.get(dtype, "")) for provider, dtype in lines], PROVIDERS)
    ax.set(xscale="log", xlim=(LEAST * 0.8, MOST), ylim=(len(lines) - 0.4, -0.6))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}"))
    ax.set_xlabel("error against float64 / tolerance   (left edge: exact)", fontsize=TEXT, labelpad=1)
    ax.annotate("tolerance", (1, 1), (-2, 1), xycoords=("data", "axes fraction"), textcoords="offset points",
                ha="right", fontsize=SMALL, color=WRONG)  # fmt: skip
    ax.annotate("largest\n(checks)", (1.03, 1), (0, 1), xycoords="axes fraction", textcoords="offset points",
                fontsize=SMALL, color=FAINT, linespacing=1.0)  # fmt: skip
    machine_key(ax, machines)


def _grouped(ax: Axes, lines: list[tuple[str, str]], colours: Mapping[str, str]) -> None:
    """Name the lines of a panel: what differs within a group at the axis, the group's name beside it."""
    ax.set_yticks(range(len(lines)), [name for _, name in lines], fontsize=SMALL)
    for group in dict.fromkeys(group for group, _ in lines):
        at = [y for y, line in enumerate(lines) if line[0] == group]
        ax.annotate(group, (0, sum(at) / len(at)), (-29, 0), xycoords=("axes fraction", "data"),
                    textcoords="offset points", ha="right", va="center", fontsize=TEXT, color=colours.get(group, INK),
                    fontweight="bold")  # fmt: skip
        if at[0]:
            ax.axhline(at[0] - 0.5, color="#E2E2E2", linewidth=0.7)


def _shares(ax: Axes, y: float, rows: pd.DataFrame, colour: str, hollow: bool) -> None:
    shares = rows["error_over_tolerance"].astype(float)
    there = shares.dropna().clip(LEAST, 0.7 * MOST)
    style = (
        {"facecolor": "none", "edgecolor": colour, "linewidth": 0.6} if hollow else {"color": colour, "linewidth": 0}
    )
    ax.scatter(there, np.full(len(there), y), s=9, alpha=0.7 if hollow else 0.45, zorder=3, **style)
    missing = int(shares.isna().sum())
    ax.scatter([0.7 * MOST] * bool(missing), [y] * bool(missing), marker="x", s=16, color=colour, zorder=3)


def match(ax: Axes, scores: pd.DataFrame) -> None:
    """Exact match with its standard error: a line per machine and backend, its trials one below the other."""
    if scores.empty:
        blank(ax)
        return
    low, first = 1.0, scores["machine"].iloc[0]
    names = []
    for y, ((machine, backend), rows) in enumerate(scores.groupby(["machine", "backend"], sort=False)):
        colour = PROVIDERS.get(BACKENDS.get(backend), INK)
        names.append((backend if machine == first else f"{short(machine)} {backend}", colour))
        heights = np.linspace(-0.3, 0.3, len(rows)) if len(rows) > 1 else [0.0]
        for at, row in zip(y + np.array(heights), rows.sort_values("shots", kind="stable").itertuples(), strict=True):
            spread = 0.0 if pd.isna(row.stderr) else row.stderr
            low = min(low, row.value - spread)
            ax.plot([row.value - spread, row.value + spread], [at, at], color=colour, linewidth=1.1, zorder=2)
            ax.scatter(row.value, at, s=12, marker=MARKERS.get(row.method, "o"), zorder=3, edgecolor=colour,
                       linewidth=0.9, facecolor="white" if row.method == "vanilla" else colour)  # fmt: skip
        ax.annotate(f"n = {rows['samples'].max():.0f}", (1.03, y), xycoords=("axes fraction", "data"), va="center",
                    fontsize=SMALL, color=FAINT)  # fmt: skip
    ax.set_yticks(range(len(names)), [name for name, _ in names], fontsize=SMALL, fontweight="bold")
    for label, (_, colour) in zip(ax.get_yticklabels(), names, strict=True):
        label.set_color(colour)
    ax.set(xlim=(max(0.0, low - 0.01), 1.002), ylim=(len(names) - 0.5, -0.5))
    trials = ", then ".join(f"{shots}-shot" for shots in sorted(scores["shots"].unique()))
    ax.set_xlabel(f"exact match, {scores['task'].iloc[0]} ({trials})", fontsize=TEXT, labelpad=1)


def short(machine: str) -> str:
    """A machine's name where there is little room: its model, or that it is a CPU, with the sign of the page's note."""
    return "CPU*" if machine.startswith("CPU") else machine.split()[-1]


def machine_key(ax: Axes, machines: list[str]) -> None:
    """Which machine is filled and which is hollow, where there are two."""
    if len(machines) < 2:
        return
    fills = (INK, "white")
    handles = [
        Line2D([], [], marker="o", linestyle="", markeredgecolor=INK, markerfacecolor=fill, markersize=3.5, label=name)
        for name, fill in zip(machines, fills, strict=False)
    ]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.05, 1.0), ncols=1, frameon=False, fontsize=SMALL,
              borderaxespad=0, borderpad=0, handletextpad=0.1, labelspacing=0.2)  # fmt: skip
