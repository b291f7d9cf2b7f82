# SPDX-License-Identifier: Apache-2.0
"""Figures of attention kernels: how far from float64, how long, how close to the ceiling, in two steps or in one.

One line per workload (or implementation), one colour per provider, one marker per implementation of a provider.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from aiterlab.plots.style import FAINT, INK, PROVIDERS, WRONG, plain

MARKERS = "oDs^"
DTYPES = {"bfloat16": "#0072B2", "float16": "#E69F00", "float32": "#009E73"}
LEAST = 1e-2  # share of the tolerance at which errors of nothing are drawn
MOST = 30.0
OPERATIONS = ("decode", "verify", "extend", "prefill", "gather")
_LINE = 0.27  # inches for a workload


def error(checked: pd.DataFrame, title: str) -> Figure:
    """Error of every check as a share of its tolerance; one line per implementation, one colour per dtype.

    Args:
        checked: columns provider, implementation, dtype, outcome, error_over_tolerance. What was refused is counted at
            the edge; what failed, or wrote no number, is a cross beyond the limit.
    """
    lines = list(checked[["provider", "implementation"]].drop_duplicates().itertuples(index=False, name=None))
    lines.sort(key=lambda line: list(PROVIDERS).index(line[0]))
    dtypes = [dtype for dtype in DTYPES if dtype in set(checked["dtype"])]
    fig, ax = plt.subplots(figsize=(9.6, 1.7 + 0.36 * len(lines)), layout="constrained")
    ax.axvspan(1, MOST, color="#F9E3E3", zorder=0)
    ax.axvline(1, color=WRONG, linewidth=1.4, zorder=1)
    for y, line in enumerate(lines):
        rows = checked[(checked["provider"] == line[0]) & (checked["implementation"] == line[1])]
        for dtype, offset in zip(
            dtypes, np.linspace(-0.22, 0.22, len(dtypes)) if len(dtypes) > 1 else [0], strict=True
        ):
            _errors(ax, y + offset, rows[rows["dtype"] == dtype], DTYPES[dtype])
        refused = (rows["outcome"] == "refused").sum()
        ax.annotate(
            f"{(rows['outcome'] == 'ok').sum()} right" + (f", {refused} refused" if refused else ""),
            (1.01, y),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
            color=FAINT,
        )
    ax.set(xscale="log", xlim=(LEAST * 0.7, MOST), ylim=(len(lines) - 0.5, -0.5))
    _plain_numbers(ax)
    ax.set_xlabel("largest error against float64 / tolerance of its row   (left edge: exact; × : no number)")
    ax.set_yticks(range(len(lines)), [f"{provider}  {name}" for provider, name in lines])
    plain(ax)
    ax.text(1.06, -0.42, "limit", color=WRONG, fontsize=8.5, va="top")
    handles = [Line2D([], [], marker="o", linestyle="", color=DTYPES[dtype], label=dtype) for dtype in dtypes]
    fig.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=9)
    _title(fig, title)
    return fig


def _errors(ax: Axes, y: float, rows: pd.DataFrame, colour: str) -> None:
    asked = rows[rows["outcome"] != "refused"]
    shares = asked["error_over_tolerance"].astype(float)
    there = shares.dropna().clip(LEAST, 0.6 * MOST)
    ax.scatter(there, np.full(len(there), y), s=20, color=colour, alpha=0.45, linewidth=0, zorder=3)
    missing = int(shares.isna().sum())
    ax.scatter([0.6 * MOST] * bool(missing), [y] * bool(missing), marker="x", s=36, color=colour, zorder=3)


def latency(rated: pd.DataFrame, title: str) -> Figure:
    """Median microseconds of every implementation on every workload, with p20 and p80; logarithmic.

    Args:
        rated: columns workload, operation, provider, implementation, median_us, p20_us, p80_us.
    """
    if rated.empty:
        return _nothing(title)
    fig, axes = _panels(["all"], [rated])
    ax = axes[0]
    places = _places(ax, rated)
    for row, y in _points(rated, places):
        colour = PROVIDERS[row.provider]
        ax.plot([row.p20_us, row.p80_us], [y, y], color=colour, linewidth=2.4, alpha=0.5, solid_capstyle="butt")
        _mark(ax, row.median_us, y, row, _markers(rated))
    ax.set(xscale="log")
    _plain_numbers(ax)
    ax.set_xlabel("microseconds: median, bar from p20 to p80")
    _legend(fig, rated)
    _title(fig, title)
    return fig


def throughput(rated: pd.DataFrame, ceilings: Mapping[str, tuple[float, str]], title: str) -> Figure:
    """Rate of every implementation under the measured ceilings: TB/s where memory limits, TFLOP/s where products do.

    Args:
        rated: columns workload, operation, provider, implementation, rate and unit.
        ceilings: name -> (rate, unit), drawn in the panel of its unit.
    """
    if rated.empty:
        return _nothing(title)
    units = [unit for unit in ("TB/s", "TFLOP/s") if unit in set(rated["unit"])]
    parts = [rated[rated["unit"] == unit] for unit in units]
    fig, axes = _panels(units, parts)
    for ax, unit, part in zip(axes, units, parts, strict=True):
        places = _places(ax, part)
        tops = {name: rate for name, (rate, of) in ceilings.items() if of == unit}
        for row, y in _points(part, places):
            _mark(ax, row.rate, y, row, _markers(rated))
        for index, (name, rate) in enumerate(sorted(tops.items(), key=lambda top: top[1])):
            _ceiling(ax, name, rate, outer=index + 1 == len(tops) > 1)
        highest = max([*tops.values(), part["rate"].max()])
        if part["rate"].min() < highest / 300:
            ax.set_xscale("log")
            _plain_numbers(ax)
        else:
            ax.set_xlim(0, 1.06 * highest)
        kind = "fewest bytes" if unit == "TB/s" else "fewest operations"
        ax.set_xlabel(f"{unit}   ({kind} that the workload needs / median time; line: measured in this run)")
    _legend(fig, rated)
    _title(fig, title)
    return fig


def _ceiling(ax: Axes, name: str, rate: float, outer: bool) -> None:
    """A line with its name and rate; two names stand on either side of their lines."""
    ax.axvline(rate, color=INK, linewidth=1.2, linestyle=(0, (4, 3)) if outer else "-", zorder=1)
    ax.annotate(
        f"{name}\n{_number(rate)}",
        (rate, 1),
        (3 if outer else -3, 2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        fontsize=8,
        color=INK,
        va="bottom",
        ha="left" if outer else "right",
    )


def two_step(table: pd.DataFrame, title: str) -> Figure:
    """Gathering and then attending beside attending from the pages, with the factor between the two.

    Args:
        table: columns workload, provider, fused_us, two_step_us, ratio, ratio_low, ratio_high.
    """
    if table.empty:
        return _nothing(title)
    fig, ax = plt.subplots(figsize=(9.6, 1.5 + _LINE * len(table)), layout="constrained")
    several = table["provider"].nunique() > 1
    for y, row in enumerate(table.itertuples()):
        colour = PROVIDERS[row.provider]
        ax.plot([row.fused_us, row.two_step_us], [y, y], color=colour, linewidth=1.6, alpha=0.5, zorder=2)
        ax.scatter(row.fused_us, y, s=36, color=colour, zorder=3)
        ax.scatter(row.two_step_us, y, s=36, marker="s", facecolor="white", edgecolor=colour, linewidth=1.5, zorder=3)
        spread = f"{row.ratio:.2f} ×  ({row.ratio_low:.2f}–{row.ratio_high:.2f})"
        ax.annotate(spread, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=INK)
    names = [f"{row.workload}  {row.provider}" if several else row.workload for row in table.itertuples()]
    ax.set_yticks(range(len(table)), names, fontsize=8.5)
    ax.set(xscale="log", ylim=(len(table) - 0.4, -0.6))
    _plain_numbers(ax)
    ax.set_xlabel("microseconds, median   (right: how many times as long in two steps, with the spread)")
    plain(ax)
    handles = [
        Line2D([], [], marker="o", linestyle="", color=INK, label="attends from the pages"),
        Line2D([], [], marker="s", linestyle="", markerfacecolor="white", markeredgecolor=INK, label="gathers first"),
    ]
    fig.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    _title(fig, title)
    return fig


def _nothing(title: str) -> Figure:
    """A title alone: the figure says that it has nothing to show."""
    fig = plt.figure(figsize=(9.6, 0.7), layout="constrained")
    _title(fig, title)
    return fig


def _panels(names: list[str], parts: list[pd.DataFrame]) -> tuple[Figure, list[Axes]]:
    """One panel above the other, each as high as it has workloads."""
    heights = [part["workload"].nunique() + 0.7 * part["operation"].nunique() for part in parts]
    height = 1.9 + _LINE * sum(heights) + 0.75 * len(names)
    fig, axes = plt.subplots(
        len(names), 1, figsize=(9.6, height), height_ratios=heights, squeeze=False, layout="constrained"
    )
    return fig, list(axes[:, 0])


def _places(ax: Axes, part: pd.DataFrame) -> dict[str, float]:
    """Height of each workload's line, operations apart from one another; draws the names."""
    order = part[["workload", "operation"]].drop_duplicates()
    order = order.sort_values("operation", key=lambda names: names.map(OPERATIONS.index), kind="stable")
    places, y, before = {}, 0.0, None
    for row in order.itertuples():
        y += 1 if row.operation == before or before is None else 1.7
        places[row.workload] = y
        before = row.operation
    for index, y in enumerate(places.values()):
        if index % 2 == 0:
            ax.axhspan(y - 0.5, y + 0.5, color="#F6F6F6", zorder=0, linewidth=0)
    ax.set_yticks(list(places.values()), list(places), fontsize=8.5)
    ax.set_ylim(max(places.values()) + 0.7, min(places.values()) - 0.7)
    plain(ax)
    return places


def _points(rated: pd.DataFrame, places: dict[str, float]):
    """The rows, the suite's last and so on top, each with its height: a little apart by provider."""
    providers = [name for name in PROVIDERS if name in set(rated["provider"])]
    offsets = dict(zip(providers, np.linspace(-0.3, 0.3, len(providers)) if len(providers) > 1 else [0.0], strict=True))
    for row in sorted(rated.itertuples(), key=lambda row: row.provider == "suite"):
        yield row, places[row.workload] + offsets[row.provider]


def _markers(rated: pd.DataFrame) -> dict[tuple[str, str], str]:
    """A marker for each implementation, by its order within its provider."""
    markers = {}
    for provider, rows in rated.groupby("provider", sort=False):
        for index, name in enumerate(rows["implementation"].unique()):
            markers[provider, name] = MARKERS[index % len(MARKERS)]
    return markers


def _mark(ax: Axes, x: float, y: float, row, markers: dict) -> None:
    ax.scatter(
        x,
        y,
        s=30 if row.provider == "suite" else 22,
        marker=markers[row.provider, row.implementation],
        color=PROVIDERS[row.provider],
        edgecolor="white",
        linewidth=0.5,
        zorder=3,
    )


def _legend(fig: Figure, rated: pd.DataFrame) -> None:
    markers = _markers(rated)
    order = sorted(markers, key=lambda key: list(PROVIDERS).index(key[0]))
    handles = [
        Line2D([], [], marker=markers[key], linestyle="", color=PROVIDERS[key[0]], label=" ".join(key)) for key in order
    ]
    fig.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False, fontsize=8.5)


def _title(fig: Figure, title: str) -> None:
    fig.suptitle(title, fontsize=12, fontweight="bold", color=INK, x=0.01, ha="left", wrap=True)


def _plain_numbers(ax: Axes) -> None:
    """A logarithmic axis with numbers as people write them."""
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if _decades(ax) < 3.5 else (1.0,)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda number, _: _number(number)))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _decades(ax: Axes) -> float:
    low, high = ax.get_xlim()
    return np.log10(high / low) if low > 0 else 9


def _number(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}" if number >= 1e-3 else f"{number:.0e}"
