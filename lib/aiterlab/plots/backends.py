# SPDX-License-Identifier: Apache-2.0
"""Figures of the backend's cells: which of them work, and how right the numbers are."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from aiterlab.plots.style import INK

# Colour-blind safe (after Okabe and Ito), and every square carries a sign of its own.
VERDICTS = {
    "works": ("#009E73", "✓", "AITER's backend works, checked in float64"),
    "other backend": ("#C9DDEE", "·", "another backend chosen"),
    "refused": ("#E3E3E3", "–", "refused, with a reason"),
    "not installed": ("#B9B9B9", "∅", "import error that names AITER"),
    "builtin trap": ("#D1121B", "✗", "builtin trap: AttributeError at the first prompt"),
    "broken": ("#E69F00", "!", "another exception, or a wrong number"),
    "no answer": ("#FFFFFF", "?", "the probe got no answer"),
}
SELECTIONS = {"auto": "auto-selection", "ROCM_AITER_FA": "ROCM_AITER_FA\nasked for by name"}


def truth_table(cells: pd.DataFrame, title: str) -> Figure:
    """One square per cell: a panel per tree and kind of selection, architectures down, AITER and switch across.

    Args:
        cells: columns tree, arch, aiter, switch, selection and verdict; one line per square.
    """
    trees, architectures = list(cells["tree"].unique()), list(cells["arch"].unique())
    columns = list(cells[["aiter", "switch"]].drop_duplicates().itertuples(index=False, name=None))
    selections = [name for name in SELECTIONS if name in set(cells["selection"])]
    fig, axes = plt.subplots(
        len(selections),
        len(trees),
        figsize=(
            1.3 + len(trees) * (0.36 * len(columns) + 0.35),
            1.9 + len(selections) * (0.36 * len(architectures) + 0.75),
        ),
        squeeze=False,
        layout="constrained",
    )
    lines = cells.set_index(["selection", "tree", "arch", "aiter", "switch"])["verdict"]
    for row, selection in enumerate(selections):
        for column, tree in enumerate(trees):
            ax = axes[row, column]
            for y, arch in enumerate(architectures):
                for x, (aiter_there, switch) in enumerate(columns):
                    _square(ax, x, y, lines.get((selection, tree, arch, aiter_there, switch), "no answer"))
            _panel(ax, architectures, columns, first=column == 0)
            if row == 0:
                ax.set_title(tree, fontsize=11, fontweight="bold", color=INK, pad=8)
        axes[row, 0].set_ylabel(SELECTIONS[selection], fontsize=10, color=INK, labelpad=8)
    fig.suptitle(title, fontsize=13, fontweight="bold", color=INK, x=0.01, ha="left")
    seen = [verdict for verdict in VERDICTS if verdict in set(cells["verdict"])]
    handles = [
        Patch(facecolor=colour, edgecolor="#888888", label=f"{sign}  {words}")
        for colour, sign, words in (VERDICTS[verdict] for verdict in seen)
    ]
    handles.append(Patch(facecolor="none", edgecolor="none", label="columns: the switch VLLM_ROCM_USE_AITER"))
    fig.legend(handles=handles, loc="outside lower left", ncols=min(3, len(handles)), frameon=False, fontsize=9.5)
    return fig


def _square(ax, x: int, y: int, verdict: str) -> None:
    colour, sign, _ = VERDICTS[verdict]
    ax.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, facecolor=colour, edgecolor="#999999", linewidth=0.6))
    dark = verdict in ("works", "builtin trap")
    ax.text(x, y, sign, ha="center", va="center", fontsize=11, color="white" if dark else "#444444")


def _panel(ax, architectures: list[str], columns: list[tuple[str, str]], first: bool) -> None:
    ax.set(xlim=(-0.55, len(columns) - 0.45), ylim=(len(architectures) - 0.45, -0.55), aspect="equal")
    ax.set_yticks(range(len(architectures)), architectures if first else [""] * len(architectures), fontsize=9)
    ax.set_xticks(range(len(columns)), [switch for _, switch in columns], fontsize=8.5, rotation=90)
    ax.tick_params(length=0, colors=INK)
    for side in ax.spines.values():
        side.set_visible(False)
    groups = pd.Series([there for there, _ in columns])
    for there in groups.unique():
        at = groups.index[groups == there]
        ax.annotate(
            f"AITER {there}",
            ((at[0] + at[-1]) / 2, 0),
            (0, -40),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=INK,
        )
        if at[0] > 0:
            ax.axvline(at[0] - 0.5, color=INK, linewidth=1.2)


def accuracy(steps: pd.DataFrame, title: str) -> Figure:
    """Error of each driven step against float64, as a share of its tolerance; a cross where there was no result.

    Args:
        steps: columns tree, switch, step, max_abs_error, tolerance and exception (see tables.accuracy).
    """
    lines = list(steps[["tree", "switch"]].drop_duplicates().itertuples(index=False, name=None))
    names = list(steps["step"].unique())
    fig, ax = plt.subplots(figsize=(8.2, 1.4 + 0.34 * len(lines)), layout="constrained")
    ax.axvspan(1, 10, color="#F6D5D5", zorder=0)
    ax.axvline(1, color="#D1121B", linewidth=1.4, zorder=1)
    for marker, colour, step, offset in zip(
        "os^", ("#0072B2", "#E69F00", "#009E73"), names, (-0.2, 0, 0.2), strict=False
    ):
        part = steps[steps["step"] == step]
        y = np.array([lines.index((t, s)) for t, s in zip(part["tree"], part["switch"], strict=True)]) + offset
        share = (part["max_abs_error"] / part["tolerance"]).astype(float)
        ax.scatter(share, y, marker=marker, s=34, color=colour, label=step, zorder=3)
        missing = y[share.isna().to_numpy()]
        ax.scatter(np.full(len(missing), 6.0), missing, marker="x", s=34, color=colour, zorder=3)
    ax.set(xscale="log", xlim=(0.01, 10), ylim=(len(lines) - 0.5, -0.5))
    ax.set_xlabel("largest error against float64 / tolerance\n(below 1: right;  × in the red: an exception, no result)")
    ax.set_yticks(range(len(lines)), [f"{tree}, switch {switch}" for tree, switch in lines])
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.7)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.set_title(title, fontsize=12, fontweight="bold", loc="left", color=INK)
    ax.legend(loc="lower left", fontsize=9, framealpha=1)
    return fig
