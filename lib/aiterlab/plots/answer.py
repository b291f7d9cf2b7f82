# SPDX-License-Identifier: Apache-2.0
"""The investigation's answer on one page: before and after the fix, accuracy beside latency.

One grammar for the whole page. Colour is who computes the attention, ink where vLLM chose; the marker is the method;
filled or solid is the first machine, hollow or dashed the second. What is missing stands there with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from aiterlab.plots import accuracy_panels, latency_panels
from aiterlab.plots.backends import SELECTIONS, VERDICTS
from aiterlab.plots.latency_panels import METHODS
from aiterlab.plots.page import SMALL, TEXT, Page, breadth
from aiterlab.plots.spec_decode import MARKERS
from aiterlab.plots.style import FAINT, INK, WRONG

LEFT, MIDDLE, RIGHT = 0.32, 4.12, 7.98  # inches: where the columns begin
WIDE, COLUMN, LAST = 11.05, 3.55, 3.39  # inches: how wide the page's text is, a column, the last column
_TOLD = 1.25  # inches for the count behind a line of cells
UPPER, BOTTOM = 2.62, 7.42  # inches: where the columns begin and where their axes end


def answer_page(frames: Mapping[str, pd.DataFrame], titles: Mapping[str, str], headline: str) -> Figure:
    """Draw the page, A4 landscape.

    Args:
        frames: cells (machine, tree, arch, aiter, switch, selection, verdict), checks (machine, provider, dtype,
            outcome, error_over_tolerance), absent (provider, reason), scores (machine, backend, method, shots, value,
            stderr, samples), kernels (machine, kind, operation,
            workload, provider, share_of_ceiling, suite_times), ceilings (machine, name, unit, rate), times (machine,
            weights, group, backend, method, K, batch, context, ms_per_token and _p80), acceptance (machine,
            task, method, position, rate) and sources (notebook, machine, commit, made, reason). Each may be empty.
        titles: a panel's finding, or why there is none: fix, error, match, kernels, tokens, backends, acceptance.
        headline: the title of the page.
    """
    page = Page()
    page.paragraph(LEFT, 0.2, WIDE, headline, 12.5, 2, fontweight="bold")
    _cells(page, 0.72, frames["cells"], titles["fix"])
    page.rule(LEFT, UPPER - 0.12, COLUMN, "ACCURACY")
    page.rule(MIDDLE, UPPER - 0.12, WIDE + LEFT - MIDDLE, "LATENCY")
    page.signs(LEFT + WIDE, UPPER - 0.12, _methods(frames))

    page.panel("b", LEFT, UPPER, COLUMN, titles["error"])
    ax = page.axes(LEFT + 1.02, UPPER + 0.6, COLUMN - 1.57, 2.1)
    accuracy_panels.error(ax, frames["checks"], frames["absent"])
    page.panel("c", LEFT, 5.78, COLUMN, titles["match"])
    ax = page.axes(LEFT + 1.25, 6.22, COLUMN - 1.8, BOTTOM - 6.22)
    accuracy_panels.match(ax, frames["scores"])

    page.panel("d", MIDDLE, UPPER, COLUMN, titles["kernels"], lines=4)
    ax = page.axes(MIDDLE + 1.0, UPPER + 0.86, COLUMN - 1.62, BOTTOM - UPPER - 0.86)
    latency_panels.kernels(ax, frames["kernels"], frames["ceilings"])

    page.panel("e", RIGHT, UPPER, LAST, titles["tokens"], lines=5)
    half = (LAST - 1.84) / 2
    two = [page.axes(RIGHT + 0.36 + i * (half + 0.82), UPPER + 0.97, half, 1.04) for i in range(2)]
    latency_panels.tokens(two, frames["times"])
    page.panel("f", RIGHT, 4.97, LAST, titles["backends"])
    ax = page.axes(RIGHT + 0.95, 5.4, LAST - 0.97, 0.46)
    latency_panels.backends(ax, frames["times"])
    page.panel("g", RIGHT, 6.2, LAST, titles["acceptance"], lines=2)
    tasks = list(frames["acceptance"]["task"].unique())[:3] or [""]
    third = (LAST - 0.36 - 0.08 * (len(tasks) - 1)) / len(tasks)
    row = [page.axes(RIGHT + 0.36 + i * (third + 0.08), 6.66, third, BOTTOM - 6.66) for i in range(len(tasks))]
    latency_panels.acceptance(row, frames["acceptance"])
    _footer(page, frames["sources"])
    return page.figure


def _cells(page: Page, top: float, cells: pd.DataFrame, title: str) -> None:
    """One square per cell, a line per state of vLLM."""
    page.panel("a", LEFT, top, WIDE, title, lines=1)
    if cells.empty:
        return
    trees = list(cells["tree"].unique())
    named = [name for name in reversed(SELECTIONS) if name in set(cells["selection"])]
    named += [name for name in cells["selection"].unique() if name not in named]
    columns = [
        (selection, aiter, switch, arch)
        for selection in named
        for aiter in cells["aiter"].unique()
        for switch in cells["switch"].unique()
        for arch in cells["arch"].unique()
    ]
    places, x = {}, 0.0
    for before, column in zip([None, *columns], columns, strict=False):
        if before is not None:
            x += 1 + 0.35 * (before[2] != column[2]) + 0.5 * (before[1] != column[1]) + 0.8 * (before[0] != column[0])
        places[column] = x
    width = WIDE - 1.0 - _TOLD
    side = min(width / (x + 1), 0.85 / len(trees), 0.2)
    ax = page.axes(LEFT + 1.0, top + 0.62, width, side * len(trees))
    ax.set(xlim=(-0.5, width / side - 0.5), ylim=(len(trees) - 0.5, -0.5))
    ax.grid(False)
    ax.set(xticks=[])
    ax.spines["bottom"].set_visible(False)
    verdicts = cells.set_index(["tree", "selection", "aiter", "switch", "arch"])["verdict"].to_dict()
    for y, tree in enumerate(trees):
        for column, at in places.items():
            if (verdict := verdicts.get((tree, *column))) is not None:
                _square(ax, at, y, side, verdict)
        mine = cells[cells["tree"] == tree]
        met, others = (int((mine["verdict"] == verdict).sum()) for verdict in ("builtin trap", "broken"))
        told = (f"{met} of {len(mine)} trapped" if met else "none trapped") + (f", {others} other" if others else "")
        style = {"color": WRONG, "fontweight": "bold"} if met else {"color": INK}
        ax.text(x + 0.8, y, told, fontsize=TEXT, va="center", **style)
    ax.set_yticks(range(len(trees)), trees, fontsize=TEXT)
    heads = [
        lambda c: SELECTIONS.get(c[0], c[0]).replace("\n", " "),
        lambda c: f"AITER {c[1]}",
        lambda c: f"switch {c[2]}",
    ]
    for depth, head in enumerate(heads):
        _heads(ax, places, depth, head, side)
    _legend(page, top + 0.7 + side * len(trees), cells)


def _heads(ax, places: Mapping[tuple, float], depth: int, head, side: float) -> None:
    """Name the groups of columns of one depth; shorter where a name does not fit."""
    groups: dict[tuple, list[float]] = {}
    for column, at in places.items():
        groups.setdefault(column[: depth + 1], []).append(at)
    for column, at in groups.items():
        name = head(column)
        if breadth(name, SMALL) > (at[-1] - at[0] + 1) * side:
            name = name.split()[-1]
        place = ((at[0] + at[-1]) / 2, 1)
        style = {"fontweight": "bold"} if depth == 0 else {}
        ax.annotate(
            name,
            place,
            (0, 3 + 9 * (2 - depth)),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=TEXT if depth == 0 else SMALL,
            color=INK,
            **style,
        )


def _square(ax, x: float, y: float, side: float, verdict: str) -> None:
    colour, sign, _ = VERDICTS[verdict]
    ax.add_patch(Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, facecolor=colour, edgecolor="#999999", linewidth=0.4))
    dark = verdict in ("works", "builtin trap")
    size = min(9, 55 * side)
    ax.text(x, y, sign, ha="center", va="center_baseline", fontsize=size, color="white" if dark else "#444444")


def _legend(page: Page, top: float, cells: pd.DataFrame) -> None:
    """Verdicts with their signs, and the order of the GPUs within a group, on one line."""
    ax = page.axes(LEFT + 0.17, top, WIDE - 0.17, 0.14)
    ax.set(xlim=(0, WIDE - 0.17), ylim=(0.07, -0.07), xticks=[], yticks=[])
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)
    at = 0.0
    for verdict in (name for name in VERDICTS if name in set(cells["verdict"])):
        colour, sign, words = VERDICTS[verdict]
        words = words.partition(":")[0].partition(",")[0]
        ax.add_patch(Rectangle((at, -0.05), 0.1, 0.1, facecolor=colour, edgecolor="#999999", linewidth=0.4))
        ax.text(at + 0.05, 0, sign, ha="center", va="center_baseline", fontsize=SMALL, color=INK)
        ax.text(at + 0.15, 0, words, va="center_baseline", fontsize=SMALL, color=INK)
        at += 0.15 + breadth(words, SMALL) + 0.16
    order = f"squares: {' '.join(cells['arch'].unique())}"
    ax.text(WIDE - 0.17, 0, order, va="center_baseline", ha="right", fontsize=SMALL, color=FAINT)


def _methods(frames: Mapping[str, pd.DataFrame]) -> list[tuple[str, dict]]:
    """Each method's sign, for those that the page has."""
    there = {method for name in ("scores", "times", "acceptance") for method in frames[name]["method"]}
    return [
        (name, {"marker": sign} | ({"markerfacecolor": "white"} if name == "vanilla" else {"color": METHODS[name]}))
        for name, sign in MARKERS.items()
        if name in there
    ]


def _footer(page: Page, sources: pd.DataFrame) -> None:
    """How to read spreads, where the numbers come from, and what was not there."""
    page.text(LEFT, 7.8, _READING + (_CPU if (sources["kind"] == "cpu").any() else ""), SMALL, color=FAINT)
    drawn = sources[sources["reason"].isna()]
    same: dict[str, list[str]] = {}
    for row in drawn.itertuples(index=False):
        about = f"{row.machine}, {row[1]}, commit {row.commit or '—'}, {(row.made or '—')[:10]}"
        same.setdefault(about, []).append(row.notebook[:2])
    told = [f"{', '.join(stems)}: {about}" for about, stems in same.items()]
    absent = [stem for stem in sources["notebook"].unique() if stem not in set(drawn["notebook"])]
    told += [f"{stem[:2]}: not run" for stem in absent]
    page.paragraph(LEFT, 7.93, WIDE, "Records: " + " · ".join(told) + ".", SMALL, 2, color=FAINT)


_READING = (
    "b: a point is a check. c: ± standard error. d: a point is a workload; × is from the same K and V. "
    "e, f: the sign is p20 of rounds, the bar goes to p80."
)
_CPU = " * Times on a CPU say nothing about a GPU."
