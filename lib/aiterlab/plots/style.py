# SPDX-License-Identifier: Apache-2.0
"""What all figures share: the ink, who has which colour, and where a figure is saved."""

from __future__ import annotations

import io

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aiterlab import paths, records

INK = "#222222"
FAINT = "#777777"
WRONG = "#D1121B"  # red is kept for what is wrong, and for limits
# Colour-blind safe (after Okabe and Ito).
PROVIDERS = {
    "suite": "#0072B2",
    "flash_attn": "#CC79A7",
    "vllm_triton": "#009E73",
    "aiter_triton": "#E69F00",
    "aiter": "#8C510A",
    "torch_sdpa": "#56B4E9",
    "reference": "#777777",
}


def save(fig: Figure, stem: str, name: str) -> Figure:
    """Write `fig` as a PNG beside the record of notebook `stem` and hand it back to be shown."""
    data = io.BytesIO()
    fig.savefig(data, format="png", dpi=150, bbox_inches="tight", facecolor="white")
    records.atomic_write_bytes(paths.output_dir(stem) / f"{name}.png", data.getvalue())
    plt.close(fig)  # the notebook shows it once, where it says so
    return fig


def plain(ax: Axes, *, grid: str = "x") -> None:
    """Take away frames and ticks that say nothing."""
    ax.grid(axis=grid, color="#E2E2E2", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0, colors=INK)
    ax.tick_params(axis="x", colors=INK)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
