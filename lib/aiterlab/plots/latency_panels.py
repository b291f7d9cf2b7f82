# SPDX-License-Identifier: Apache-2.0
"""The latency panels of the answer's page: kernels under their ceiling, time per token, what it comes from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from aiterlab.plots.accuracy_panels import machine_key, short
from aiterlab.plots.kernels import OPERATIONS
from aiterlab.plots.page import SMALL, TEXT, blank, note
from aiterlab.plots.spec_decode import BACKENDS, MARKERS
from aiterlab.plots.style import FAINT, INK, PROVIDERS

METHODS = {"eagle3": INK, "eagle": "#8A8A8A", "ngram": "#5E5E5E"}
LINES = {"eagle3": "-", "eagle": "-", "ngram": (0, (1, 1))}


def kernels(ax: Axes, table: pd.DataFrame, ceilings: pd.DataFrame) -> None:
    """Share of the measured ceiling of every workload: a line per operation and provider."""
    native = table[table["kind"] == "gpu"]
    if native.empty:
        blank(ax)
        return
    machines = list(native["machine"].unique())
    lines = [
        (operation, provider)
        for operation in OPERATIONS
        for provider in PROVIDERS
        if len(native[(native["operation"] == operation) & (native["provider"] == provider)])
    ]
    places, y = {}, 0.0
    for before, line in zip([None, *lines], lines, strict=False):
        y += 0 if before is None else 1 if before[0] == line[0] else 1.9
        places[line] = y
    for (operation, provider), y in places.items():
        rows = native[(native["operation"] == operation) & (native["provider"] == provider)]
        colour = PROVIDERS[provider]
        for place, machine in enumerate(machines):
            shares = rows[rows["machine"] == machine]["share_of_ceiling"].dropna().astype(float)
            if shares.empty:
                continue
            ax.plot([shares.min(), shares.max()], [y, y], color=colour, linewidth=1, alpha=0.6, zorder=2)
            fill = "white" if place else colour
            ax.scatter(
                shares,
                np.full(len(shares), y),
                s=12,
                facecolor=fill,
                edgecolor=colour,
                linewidth=0.7,
                alpha=0.8,
                zorder=3,
            )
        times = rows["suite_times"].dropna().astype(float)
        told = "" if provider == "suite" else _span(times) if len(times) else "—"
        _beside(ax, told, (1.03, y), "axes fraction", 0, INK)
    for operation in dict.fromkeys(operation for operation, _ in lines):
        top = min(y for line, y in places.items() if line[0] == operation)
        ax.annotate(operation, (0, top - 0.85), (-70, 0), xycoords=("axes fraction", "data"),
                    textcoords="offset points", fontsize=TEXT, fontweight="bold", color=INK, va="center")  # fmt: skip
        ax.annotate(_ceiling(native, ceilings, operation), (1, top - 0.85), (-3, 0), xycoords=("data", "data"),
                    textcoords="offset points", fontsize=SMALL, color=FAINT, va="center", ha="right")  # fmt: skip
    ax.set_yticks(list(places.values()), [provider for _, provider in places], fontsize=SMALL)
    for label, (_, provider) in zip(ax.get_yticklabels(), places, strict=True):
        label.set_color(PROVIDERS[provider])
        label.set_fontweight("bold")
    ax.axvline(1, color=INK, linewidth=1.1, zorder=1)
    ax.set(
        xlim=(0, max(1.08, 1.02 * native["share_of_ceiling"].astype(float).max())),
        ylim=(max(places.values()) + 0.6, -1.4),
    )
    ax.set_xlabel("share of the ceiling that plain torch reached", fontsize=TEXT, labelpad=1)
    ax.annotate("suite is × as\nfast (range)", (1.03, 1), (0, 1), xycoords="axes fraction", textcoords="offset points",
                fontsize=SMALL, color=FAINT, linespacing=1.0)  # fmt: skip
    machine_key(ax, machines)
    if len(others := table[table["kind"] != "gpu"]["machine"].unique()):
        told = f"— {', '.join(others)}: Triton's interpreter,\nits times say nothing about a GPU"
        ax.annotate(told, (0, 1), (-70, 2), xycoords="axes fraction", textcoords="offset points", fontsize=SMALL,
                    color=FAINT, va="bottom")  # fmt: skip


def _ceiling(native: pd.DataFrame, ceilings: pd.DataFrame, operation: str) -> str:
    """The ceiling of an operation's unit on the first machine."""
    rows = native[native["operation"] == operation]
    machine, unit = rows["machine"].iloc[0], rows["unit"].iloc[0]
    shares = rows[(rows["machine"] == machine)].dropna(subset="share_of_ceiling")
    rate = (shares["rate"] / shares["share_of_ceiling"]).median()
    names = ceilings[(ceilings["machine"] == machine) & (ceilings["unit"] == unit)]
    name = names.loc[(names["rate"].astype(float) - rate).abs().idxmin(), "name"] if len(names) else "ceiling"
    return f"{name.replace('_', ' ')} {rate:,.3g} {unit}"


def tokens(axes: Sequence[Axes], times: pd.DataFrame) -> None:
    """Milliseconds per token of one sequence by K: on the models that ship, and on the shape."""
    if times["ms_per_token"].dropna().empty:
        for ax in axes:
            blank(ax)
        return
    names = {"models": "models that ship\nacceptance measured", "shape": "shape of Llama-3.1-8B\nacceptance assumed"}
    for ax, (weights, name) in zip(axes, names.items(), strict=True):
        rows = times[(times["weights"] == weights) & (times["group"] != "backends")]
        rows = rows[rows["batch"] == rows["batch"].min()]
        if rows["ms_per_token"].dropna().empty:
            note(ax, "not run: profile full on a GPU has it" if weights == "shape" else "not run")
        else:
            _by_k(ax, rows)
        ax.set_title(name, fontsize=SMALL, color=INK, loc="left", pad=2)
    axes[0].set_ylabel("ms per token", fontsize=TEXT, labelpad=1)


def _by_k(ax: Axes, rows: pd.DataFrame) -> None:
    contexts = sorted(rows["context"].unique())
    contexts = contexts[:1] if rows["weights"].iloc[0] == "models" else list(dict.fromkeys([contexts[0], contexts[-1]]))
    machines = list(rows["machine"].unique())
    labels, several = [], len(contexts) > 1
    for machine in machines:
        for context in contexts:
            here = rows[(rows["machine"] == machine) & (rows["context"] == context)]
            here = here.dropna(subset="ms_per_token").drop_duplicates(["method", "K"])
            hollow = machine != machines[0] or (several and context != contexts[0])
            where = f" {_tokens(context)}" if several else ""
            where += f" {short(machine)}" if machine != machines[0] else ""
            for method, mine in here.groupby("method", sort=False):
                level = mine["ms_per_token"].iloc[-1]
                if method == "vanilla":
                    ax.axhline(level, color=FAINT, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
                    labels.append((level, method + where, FAINT))
                else:
                    labels.append((level, method + where, _line(ax, mine.sort_values("K"), method, hollow)))
    ks = sorted(rows.loc[rows["K"] > 0, "K"].unique())
    ax.set(yscale="log", xlim=(min(ks) - 0.5, max(ks) + 0.5), xticks=ks)
    ax.grid(visible=False, axis="x")
    _plain_log(ax)
    ax.set_xlabel("K, draft tokens", fontsize=TEXT, labelpad=1)
    _ends(ax, labels)


def _line(ax: Axes, mine: pd.DataFrame, method: str, hollow: bool) -> str:
    """Draw a method's times by K with their spread; returns its colour."""
    colour = PROVIDERS.get(BACKENDS.get(mine["backend"].iloc[0]), METHODS.get(method, FAINT))
    ax.plot(mine["K"], mine["ms_per_token"], color=colour, linewidth=1, zorder=2)
    ax.vlines(mine["K"], mine["ms_per_token"], mine["ms_per_token_p80"], color=colour, linewidth=1.8, alpha=0.3)
    ax.scatter(mine["K"], mine["ms_per_token"], s=11, marker=MARKERS.get(method, "o"), zorder=3, edgecolor=colour,
               linewidth=0.8, facecolor="white" if hollow else colour)  # fmt: skip
    return colour


def _ends(ax: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Name lines at their right end, apart from one another and within the panel's height."""
    height = ax.get_position().height * ax.figure.get_size_inches()[1]
    low, high = np.log10(ax.get_ylim())
    apart, labels = 0.105, sorted(labels)
    places = [(np.log10(level) - low) / (high - low) * height for level, _, _ in labels]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + apart)
    top = height - apart / 2
    for index in reversed(range(len(places))):
        places[index] = min(places[index], top)
        top = places[index] - apart
    for place, (_, name, colour) in zip(places, labels, strict=True):
        ax.annotate(name, (1.02, place / height), xycoords="axes fraction", fontsize=SMALL, color=colour, va="center")


def _tokens(context: int) -> str:
    return f"{context // 1024}k" if context >= 1024 and context % 1024 == 0 else str(context)


def backends(ax: Axes, times: pd.DataFrame) -> None:
    """Milliseconds per token by backend at the longest context, vanilla and with a draft."""
    rows = times[times["group"] == "backends"]
    rows = rows[rows["machine"] == rows["machine"].iloc[0]] if len(rows) else rows
    rows = rows[rows["context"] == rows["context"].max()]
    there = rows.dropna(subset="ms_per_token")
    if there.empty:
        blank(ax)
        return
    names, methods = list(rows["backend"].unique()), list(there["method"].unique())
    for y, name in enumerate(names):
        colour, mine = PROVIDERS.get(BACKENDS.get(name), INK), there[there["backend"] == name]
        for row in mine.itertuples():
            ax.plot([row.ms_per_token, row.ms_per_token_p80], [y, y], color=colour, linewidth=1.8, alpha=0.4)
            fill = "white" if row.method == "vanilla" else colour
            ax.scatter(
                row.ms_per_token,
                y,
                s=16,
                marker=MARKERS.get(row.method, "o"),
                facecolor=fill,
                edgecolor=colour,
                zorder=3,
            )
            end = np.nanmax([row.ms_per_token, row.ms_per_token_p80])
            _beside(ax, f"{row.ms_per_token:.1f}", (end, y), "data", 5, INK)
        if unseen := [method for method in methods if method not in set(mine["method"])]:
            _beside(ax, f"— {', '.join(unseen)} not run", (0.01, y), "axes fraction", 0, FAINT)
    ax.set_yticks(range(len(names)), names, fontsize=SMALL)
    low, high = there["ms_per_token"].min(), there["ms_per_token"].max()
    ax.set(xscale="log", ylim=(len(names) - 0.5, -0.6), xlim=(low / 1.3, high * 1.6))
    _plain_log(ax, "x")
    ax.set_xlabel("ms per token", fontsize=TEXT, labelpad=1)


def _beside(ax: Axes, text: str, place: tuple[float, float], across: str, points: float, colour: str) -> None:
    """Set small text to the right of a place."""
    ax.annotate(text, place, (points, 0), xycoords=(across, "data"), textcoords="offset points", va="center",
                fontsize=SMALL, color=colour)  # fmt: skip


def acceptance(axes: Sequence[Axes], table: pd.DataFrame) -> None:
    """Share of drafts accepted up to each position, greedy: a panel per task, a line per method."""
    if table.empty:
        blank(axes[0])
        return
    table = table[table["machine"] == table["machine"].iloc[0]]
    for ax, task in zip(axes, table["task"].unique(), strict=False):
        part = table[table["task"] == task]
        for method in part["method"].unique():
            mine = part[part["method"] == method]
            ax.plot(mine["position"], 100 * mine["rate"], color=METHODS.get(method, FAINT), linewidth=1, markersize=3,
                    marker=MARKERS.get(method, "o"), linestyle=LINES.get(method, "-"))  # fmt: skip
        most = int(table["position"].max())
        ax.set(xlim=(0.5, most + 0.5), ylim=(0, 104), xticks=range(1, most + 1), yticks=range(0, 101, 25))
        ax.grid(axis="y", color="#E2E2E2", linewidth=0.7)
        ax.grid(visible=False, axis="x")
        ax.set_title(task, fontsize=SMALL, color=INK, loc="left", pad=2)
        ax.set_xlabel("position", fontsize=TEXT, labelpad=1)
        if ax is not axes[0]:
            ax.tick_params(axis="y", labelleft=False)
    axes[0].set_ylabel("accepted, %", fontsize=TEXT, labelpad=1)


def _plain_log(ax: Axes, which: str = "y") -> None:
    axis = ax.yaxis if which == "y" else ax.xaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low > 12 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def _span(times: pd.Series) -> str:
    low, high = times.min(), times.max()
    return f"{low:.2g} ×" if np.isclose(low, high) else f"{low:.2g}–{high:.2g} ×"
