# SPDX-License-Identifier: Apache-2.0
"""Figures of the audit: which tree keeps which statement, and what each tree chooses on which machine."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from aiterlab.plots.style import INK, WRONG

# Colour-blind safe: light and dark differ too, and every square carries a sign of its own.
JUDGED = {
    "holds": ("#D5E8F3", "✓", "holds"),
    "broken": (WRONG, "", "broken, with the number of contradictions"),
    "not applicable": ("#F1F1F1", "–", "not applicable: no cell speaks to it"),
    "unknown": ("#FFFFFF", "?", "no answer"),
}
CHOICES = {
    "ROCM_AITER_FA": ("#0072B2", "F"),
    "ROCM_AITER_UNIFIED_ATTN": ("#E69F00", "U"),
    "ROCM_ATTN": ("#8FD3BD", "R"),
    "TRITON_ATTN": ("#DCE9F5", "T"),
    "refused": ("#E3E3E3", "–"),
    "an error": (WRONG, "!"),
    "no answer": ("#FFFFFF", "?"),
}
OTHER = ("#CC79A7", "ABCDEGHIJ")  # backends that nobody expected here, in the order in which they are met
_DARK = ("#0072B2", WRONG)
_EDGE = "#A5A5A5"


def verdicts(judged: pd.DataFrame, title: str) -> Figure:
    """One square per tree and statement; a broken one holds the number of its contradictions.

    Args:
        judged: columns tree, statement, verdict and violations; one line per square, in the order to be shown.
    """
    trees, statements = list(judged["tree"].unique()), list(judged["statement"].unique())
    fig, ax = plt.subplots(figsize=(2.2 + 0.62 * len(statements), 2.3 + 0.3 * len(trees)), layout="constrained")
    for row in judged.itertuples():
        colour, sign, _ = JUDGED[row.verdict]
        _square(ax, statements.index(row.statement), trees.index(row.tree), colour, sign or str(row.violations))
    _axes(ax, trees, len(statements))
    ax.set_xticks(range(len(statements)), statements, rotation=40, ha="left", rotation_mode="anchor", fontsize=9)
    ax.xaxis.tick_top()
    ax.tick_params(length=0, colors=INK)
    seen = [verdict for verdict in JUDGED if verdict in set(judged["verdict"])]
    handles = [
        Patch(facecolor=colour, edgecolor=_EDGE, label=f"{sign}  {words}".strip())
        for verdict, (colour, sign, words) in JUDGED.items()
        if verdict in seen
    ]
    _finish(fig, title, handles, ncols=2)
    return fig


def choices(chosen: pd.DataFrame, title: str) -> Figure:
    """What auto-selection takes: trees down, GPUs and positions of the switch across, a panel with AITER, one without.

    Args:
        chosen: columns tree, arch, aiter, switch and outcome (a backend, refused, an error, no answer).
    """
    trees, panels = list(chosen["tree"].unique()), list(chosen["aiter"].unique())
    gpus, switches = chosen["arch"].unique(), chosen["switch"].unique()
    columns = [(gpu, switch) for gpu in gpus for switch in switches]
    styles = _styles(chosen["outcome"])
    fig, axes = plt.subplots(
        1,
        len(panels),
        figsize=(1.9 + 0.25 * len(columns) * len(panels), 2.5 + 0.27 * len(trees)),
        squeeze=False,
        layout="constrained",
    )
    for ax, panel in zip(axes[0], panels, strict=True):
        part = chosen[chosen["aiter"] == panel]
        for row in part.itertuples():
            colour, sign = styles[row.outcome]
            _square(ax, columns.index((row.arch, row.switch)), trees.index(row.tree), colour, sign, size=8)
        _axes(ax, trees if ax is axes[0, 0] else [""] * len(trees), len(columns))
        _gpus(ax, columns)
        ax.set_title(f"AITER {panel}", fontsize=11, fontweight="bold", color=INK, pad=50)
    handles = [
        Patch(facecolor=colour, edgecolor=_EDGE, label=f"{sign}  {name}") for name, (colour, sign) in styles.items()
    ]
    handles.append(Patch(facecolor="none", edgecolor="none", label="columns: VLLM_ROCM_USE_AITER"))
    _finish(fig, title, handles, ncols=4)
    return fig


def _styles(outcomes: pd.Series) -> dict[str, tuple[str, str]]:
    """Colour and sign of every outcome that occurs, the known ones first."""
    met = list(outcomes.unique())
    colour, letters = OTHER
    unexpected = [name for name in met if name not in CHOICES]
    new = {name: (colour, letters[i % len(letters)]) for i, name in enumerate(unexpected)}
    return {name: style for name, style in (CHOICES | new).items() if name in met}


def _square(ax: Axes, x: int, y: int, colour: str, sign: str, size: float = 9) -> None:
    ax.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, facecolor=colour, edgecolor=_EDGE, linewidth=0.5))
    ax.text(x, y, sign, ha="center", va="center", fontsize=size, color="white" if colour in _DARK else "#333333")


def _axes(ax: Axes, trees: list[str], columns: int) -> None:
    ax.set(xlim=(-0.6, columns - 0.4), ylim=(len(trees) - 0.4, -0.6))
    ax.set_yticks(range(len(trees)), trees, fontsize=9)
    for side in ax.spines.values():
        side.set_visible(False)


def _gpus(ax: Axes, columns: list[tuple[str, str]]) -> None:
    """The switch above each column, the GPU above its group, and a line between two GPUs."""
    ax.set_xticks(range(len(columns)), [switch for _, switch in columns], fontsize=8, rotation=90)
    ax.xaxis.tick_top()
    ax.tick_params(length=0, colors=INK)
    gpus = pd.Series([arch for arch, _ in columns])
    for gpu in gpus.unique():
        at = gpus.index[gpus == gpu]
        place = ((at[0] + at[-1]) / 2, 1)
        ax.annotate(gpu, place, (0, 36), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center",
                    fontsize=8.5, color=INK)  # fmt: skip
        if at[0]:
            ax.axvline(at[0] - 0.5, color=INK, linewidth=1.1)


def _finish(fig: Figure, title: str, handles: list[Patch], ncols: int) -> None:
    fig.legend(handles=handles, loc="outside lower left", ncols=ncols, frameon=False, fontsize=9)
    fig.suptitle(title, fontsize=12.5, fontweight="bold", color=INK, x=0.01, ha="left", wrap=True)
