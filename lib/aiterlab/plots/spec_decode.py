# SPDX-License-Identifier: Apache-2.0
"""Figures of speculative decoding: how much is accepted, how much faster that is, for which K, and where the time goes.

All take rows of a record (a list of flat dictionaries). What was not measured is a gap that carries its `reason`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from aiterlab.plots.style import FAINT, INK, PROVIDERS, plain

METHODS = {"vanilla": "#777777", "ngram": "#009E73", "eagle": "#E69F00", "eagle3": "#0072B2"}
MARKERS = {"vanilla": "o", "ngram": "^", "eagle": "s", "eagle3": "D"}
COMPONENTS = {
    "draft_ms": ("draft", "#E69F00"),
    "verify_ms": ("verify", "#0072B2"),
    "sample_ms": ("sampling", "#009E73"),
    "host_ms": ("host", "#C4C4C4"),
}
# vLLM's names of attention backends -> who computes the attention
BACKENDS = {
    "SUITE_PAGED": "suite",
    "FLASH_ATTN": "flash_attn",
    "TRITON_ATTN": "vllm_triton",
    "ROCM_ATTN": "aiter_triton",
    "ROCM_AITER_FA": "aiter",
    "ROCM_AITER_UNIFIED_ATTN": "aiter_triton",
}
_OTHERS = ("#CC79A7", "#56B4E9", "#8C510A", "#444444")
ASSUMED = "Acceptance is assumed, not measured"
_WIDTH = 9.6  # inches, as wide as a report's text


def acceptance_by_position(rows: Sequence[Mapping], title: str) -> Figure:
    """Share of drafts accepted up to each position: one panel per task, one line per method, the ceiling above.

    Args:
        rows: method, draft_tokens, task, temperature, rates (None with a reason), acceptance_length with its
            `_low` and `_high`. Of each method the row with the most draft tokens is drawn; a second temperature is
            dashed.
    """
    table = _longest(rows)
    fig, axes = _panels(table["task"].unique(), 3.4 + 0.17 * len(table) / table["task"].nunique())
    temperatures = sorted(table["temperature"].unique())
    for ax, task in zip(axes, table["task"].unique(), strict=True):
        part = table[table["task"] == task]
        most = int(part["draft_tokens"].max())
        ax.axhline(100, color=INK, linewidth=1.2)
        ax.annotate("best possible", (1, 100), (0, 3), textcoords="offset points", fontsize=8, color=INK)
        told = []
        for row in part.itertuples():
            name = _method(row.method, row.temperature, temperatures)
            if row.rates is None:
                told.append((f"{name}: {row.reason or 'not measured'}", row.method))
                continue
            ax.plot(
                range(1, len(row.rates) + 1),
                [100 * rate for rate in row.rates],
                color=_colour(row.method),
                marker=MARKERS.get(row.method, "o"),
                markersize=5,
                linestyle="-" if row.temperature == temperatures[0] else (0, (4, 2)),
                linewidth=1.6,
            )
            told.append((f"{name}: {_length(row)}", row.method))
        _notes(ax, told)
        ax.set(xlim=(0.6, most + 0.4), ylim=(0, 112), xticks=range(1, most + 1), yticks=range(0, 101, 25))
        ax.set_xlabel("position in the draft")
        ax.set_title(task, fontsize=10.5, color=INK, loc="left")
        plain(ax, grid="y")
    axes[0].set_ylabel("drafts accepted up to here, %")
    _legend(fig, table["method"], temperatures)
    _title(fig, title)
    return fig


def tokens_per_step(rows: Sequence[Mapping], title: str) -> Figure:
    """Histogram of the tokens that one step gives: one panel per task, bars by method, means as triangles.

    Args:
        rows: method, draft_tokens, task, temperature, steps_by_tokens, tokens_per_step. Of each method the row with
            the most draft tokens and the lowest temperature is drawn.
    """
    table = _longest(rows)
    table = table[table["temperature"] == table["temperature"].min()]
    fig, axes = _panels(table["task"].unique(), 3.3)
    methods = [name for name in _order(table["method"]) if name in set(table["method"])]
    width = 0.8 / len(methods)
    highest = max((100 * max(one) / sum(one) for one in table["steps_by_tokens"] if sum(one)), default=1.0)
    for ax, task in zip(axes, table["task"].unique(), strict=True):
        part = table[table["task"] == task].set_index("method")
        most = int(part["draft_tokens"].max()) + 1
        for index, method in enumerate(methods):
            if method not in part.index or not sum(part.loc[method, "steps_by_tokens"]):
                continue
            shares = 100 * np.array(part.loc[method, "steps_by_tokens"]) / sum(part.loc[method, "steps_by_tokens"])
            x = np.arange(1, len(shares) + 1) + (index - (len(methods) - 1) / 2) * width
            ax.bar(x, shares, width=0.92 * width, color=_colour(method), zorder=2)
        for index, method in enumerate(name for name in methods if name in part.index):
            mean = part.loc[method, "tokens_per_step"]
            if not pd.isna(mean):
                y = highest * (1.10 + 0.10 * index)
                ax.scatter(mean, y, marker="v", s=34, color=_colour(method), zorder=3)
                ax.annotate(f"{mean:.2f}", (mean, y), (6, -3), textcoords="offset points", fontsize=8, color=INK)
        ax.set(xlim=(0.4, most + 0.6), xticks=range(1, most + 1), ylim=(0, highest * (1.12 + 0.10 * len(methods))))
        ax.set_xlabel("tokens in one step   (▾ mean)")
        ax.set_title(task, fontsize=10.5, color=INK, loc="left")
        plain(ax, grid="y")
    axes[0].set_ylabel("steps, %")
    handles = [Patch(facecolor=_colour(name), label=name) for name in methods]
    fig.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=9)
    _title(fig, title)
    return fig


def speedup_by_draft_tokens(rows: Sequence[Mapping], title: str, *, assumed: str | None = None) -> Figure:
    """Speed-up over vanilla decoding by K: measured with its spread, predicted as a line, the best K ringed.

    Args:
        rows: series (what one line is), draft_tokens, speedup, speedup_low, predicted; a `method` gives a line its
            colour. A measurement of None is a gap, named below the axis with its `reason`.
        assumed: what the acceptance was set to and from where, where it was not measured. Stands on the figure.
    """
    table = _frame(rows, ("speedup", "speedup_low", "predicted"), ("method", "reason"))
    fig, ax = plt.subplots(figsize=(_WIDTH, 4.4), layout="constrained")
    ax.axhline(1, color=INK, linewidth=1.2)
    ks = sorted(table["draft_tokens"].unique())
    ax.annotate(
        "vanilla decoding",
        (max(ks) + 0.42, 1),
        (0, 3),
        textcoords="offset points",
        fontsize=8,
        color=INK,
        ha="right",
        va="bottom",
    )
    names = list(table["series"].unique())
    missing: list[str] = []
    named: list[tuple] = []  # the best of each series
    for index, (series, colour) in enumerate(zip(names, _series_colours(table), strict=True)):
        part = table[table["series"] == series].sort_values("draft_tokens")
        there = part.dropna(subset="speedup")
        predicted = part.dropna(subset="predicted")
        x = there["draft_tokens"] + 0.12 * (index - (len(names) - 1) / 2)
        ax.plot(predicted["draft_tokens"], predicted["predicted"], color=colour, linestyle=(0, (4, 2)), linewidth=1.3)
        ax.vlines(x, there["speedup_low"], there["speedup"], color=colour, linewidth=3, alpha=0.4)
        ax.scatter(x, there["speedup"], color=colour, marker="osD^v"[index % 5], s=34, zorder=3, edgecolor="white")
        if not there.empty:
            best = there["speedup"].idxmax()
            ax.scatter(
                x[best], there.loc[best, "speedup"], s=170, facecolor="none", edgecolor=colour, linewidth=1.8, zorder=4
            )
            label = f"K = {there.loc[best, 'draft_tokens']}: {there.loc[best, 'speedup']:.2f} ×"
            named.append((x[best], there.loc[best, "speedup"], label, colour))
        gaps = part[part["speedup"].isna()]
        missing += [f"{series}, K = {row.draft_tokens}: {row.reason or 'not measured'}" for row in gaps.itertuples()]
    ax.set(xlim=(min(ks) - 0.5, max(ks) + 0.5), xticks=ks)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.9), high + 0.1 * (high - low))
    for x, y, label, colour in named:
        below = any(abs(other - x) < 1 and 0 < above - y < 0.12 * (high - low) for other, above, *_ in named)
        ax.annotate(label, (x, y), (0, -10 if below else 9), textcoords="offset points", ha="center",
                    va="top" if below else "bottom", fontsize=9, fontweight="bold", color=colour)  # fmt: skip
    ax.set_xlabel("K, draft tokens per step" + "".join(f"\nno point: {one}" for one in missing))
    ax.set_ylabel("tokens per second, × vanilla")
    plain(ax, grid="y")
    handles = [
        Line2D([], [], color=colour, marker="osD^v"[index % 5], linestyle="", label=name)
        for index, (name, colour) in enumerate(zip(names, _series_colours(table), strict=True))
    ]
    handles += [
        Line2D([], [], color=FAINT, linewidth=3, alpha=0.5, label="measured, line down to the slow rounds (p80)"),
        Line2D([], [], color=FAINT, linestyle=(0, (4, 2)), label="predicted by the cost model"),
        Line2D([], [], color=FAINT, marker="o", markersize=11, markerfacecolor="none", linestyle="", label="best K"),
    ]
    fig.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=8.5)
    if assumed:
        box = {"facecolor": "#FFF6D6", "edgecolor": "none", "pad": 3}
        ax.text(
            0.01,
            0.98,
            f"{ASSUMED}: {assumed}",
            transform=ax.transAxes,
            fontsize=8.5,
            va="top",
            color=INK,
            bbox=box,
            wrap=True,
        )
        ax.set_ylim(top=ax.get_ylim()[1] + 0.12 * np.ptp(ax.get_ylim()))
    _title(fig, title)
    return fig


def step_components(rows: Sequence[Mapping], title: str) -> Figure:
    """Where the milliseconds of one step go, by K: draft, verify, sampling, host, stacked; one panel per series.

    Args:
        rows: series, draft_tokens (0: vanilla decoding), draft_ms, verify_ms, sample_ms, host_ms, and step_ms, the
            whole step as measured: where the parts do not add up to it, the rest is left white.
    """
    table = _frame(rows, (*COMPONENTS, "step_ms"), ("reason",))
    names = list(table["series"].unique())
    counts = [len(table[table["series"] == name]) for name in names]
    fig, axes = plt.subplots(
        len(names),
        1,
        figsize=(_WIDTH, 1.5 + 0.36 * sum(counts) + 0.6 * len(names)),
        height_ratios=counts,
        squeeze=False,
        layout="constrained",
    )
    for ax, name in zip(axes[:, 0], names, strict=True):
        part = table[table["series"] == name].sort_values("draft_tokens").reset_index(drop=True)
        widest = float(np.nanmax([*part["step_ms"], *part[list(COMPONENTS)].sum(axis=1)]))
        for y, row in part.iterrows():
            _stack(ax, y, row, widest)
        labels = [f"K = {k}" if k else "vanilla" for k in part["draft_tokens"]]
        ax.set_yticks(range(len(part)), labels)
        ax.set(ylim=(len(part) - 0.4, -0.6), xlim=(0, 1.12 * widest))
        ax.set_title(name, fontsize=10.5, color=INK, loc="left")
        plain(ax)
    axes[-1, 0].set_xlabel("milliseconds per step (20th percentile of rounds)")
    handles = [Patch(facecolor=colour, label=name) for name, colour in COMPONENTS.values()]
    handles.append(Patch(facecolor="white", edgecolor=FAINT, label="not accounted for"))
    fig.legend(handles=handles, loc="outside lower left", ncols=5, frameon=False, fontsize=9)
    _title(fig, title)
    return fig


def _stack(ax: Axes, y: int, row: pd.Series, widest: float) -> None:
    if row[list(COMPONENTS)].isna().all() and pd.isna(row["step_ms"]):
        ax.text(0.01 * widest, y, f"– {row['reason'] or 'not measured'}", va="center", fontsize=8.5, color=FAINT)
        return
    left = 0.0
    for name, (_, colour) in COMPONENTS.items():
        width = row[name]
        if pd.isna(width):
            continue
        ax.barh(y, width, left=left, height=0.66, color=colour, zorder=2)
        if width > 0.055 * widest:
            light = name in ("verify_ms", "sample_ms")
            ax.text(
                left + width / 2,
                y,
                f"{width:.3g}",
                va="center",
                ha="center",
                fontsize=8,
                color="white" if light else INK,
                zorder=3,
            )
        left += width
    whole = row["step_ms"]
    if not pd.isna(whole) and whole > left:
        ax.barh(y, whole - left, left=left, height=0.66, facecolor="white", edgecolor=FAINT, linewidth=0.8, zorder=2)
    end = left if pd.isna(whole) else max(whole, left)
    ax.text(end + 0.01 * widest, y, f"{end:.3g}", va="center", fontsize=8.5, color=INK, fontweight="bold")


def backend_throughput(rows: Sequence[Mapping], kernels: Sequence[Mapping], title: str) -> Figure:
    """Tokens per second by attention backend, and beside it the cause: microseconds of attention per layer and step.

    Args:
        rows: backend (vLLM's name), context (tokens), tokens_per_s, tokens_per_s_low; None with a `reason` is a
            gap.
        kernels: of the kernels' record, timings of one workload or several: workload, provider, implementation,
            median_us, p20_us, p80_us.
    """
    table = _frame(rows, ("tokens_per_s", "tokens_per_s_low"), ("reason",))
    causes = _frame(kernels, ("median_us", "p20_us", "p80_us"))
    causes = causes.dropna(subset="median_us")
    height = 1.9 + 0.42 * max(len(table) + table["context"].nunique(), len(causes) + causes["workload"].nunique())
    fig, (left, right) = plt.subplots(1, 2, figsize=(_WIDTH, height), width_ratios=[1.15, 1], layout="constrained")
    groups = [
        (f"{context // 1024}k tokens of context", [_backend_bar(row) for row in part.itertuples()])
        for context, part in table.groupby("context")
    ]
    ends = [_bars(left, groups)]
    left.set_xlabel("tokens per second   (line: down to the slow rounds, p80)")
    left.set_title("in the engine", fontsize=10.5, color=INK, loc="left")
    groups = [
        (name, [_kernel_bar(row) for row in part.sort_values("median_us").itertuples()])
        for name, part in causes.groupby("workload", sort=False)
    ]
    ends.append(_bars(right, groups))
    for ax in (left, right):
        ax.set_ylim(max(ends), 0)  # bars as thick on either side
    right.set_xlabel("µs per layer and step   (line: p20 to p80)")
    right.set_title("the cause: the attention kernel alone", fontsize=10.5, color=INK, loc="left")
    _title(fig, title)
    return fig


def _backend_bar(row) -> tuple:
    colour, spread = PROVIDERS.get(BACKENDS.get(row.backend), FAINT), (row.tokens_per_s_low, row.tokens_per_s)
    return row.backend, colour, row.tokens_per_s, *spread, row.reason


def _kernel_bar(row) -> tuple:
    name = f"{row.provider}\n{row.implementation}"
    return name, PROVIDERS.get(row.provider, FAINT), row.median_us, row.p20_us, row.p80_us, ""


def _bars(ax: Axes, groups: Iterable[tuple[str, list[tuple]]]) -> float:
    """Horizontal bars in named groups; each with its number and how often the smallest of its group goes into it.

    Returns where the last one ends.
    """
    y, places, names, highest = 0.0, [], [], 0.0
    for title, bars in groups:
        y += 0.55
        ax.text(0, y, f" {title}", fontsize=8.5, color=INK, fontweight="bold", va="center")
        least = np.nanmin([number for _, _, number, *_ in bars] + [np.inf])
        for name, colour, number, low, high, reason in bars:
            y += 1
            places.append(y)
            names.append(name)
            if pd.isna(number):
                ax.text(0, y, f" – {reason or 'not measured'}", va="center", fontsize=8.5, color=FAINT)
                continue
            highest = max(highest, number, high if not pd.isna(high) else 0)
            ax.barh(y, number, height=0.7, color=colour, zorder=2)
            if not pd.isna(low) and not pd.isna(high):
                ax.plot([low, high], [y, y], color=INK, linewidth=1.6, zorder=3)
            label = f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
            factor = "" if number == least else f"  ({number / least:.1f} ×)"
            ax.annotate(
                label + factor,
                (max(number, high if not pd.isna(high) else 0), y),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=INK,
            )
        y += 0.85
    ax.set_yticks(places, names, fontsize=8.5)
    ax.set_xlim(0, 1.34 * highest or 1)
    plain(ax)
    return y


def speedup_map(rows: Sequence[Mapping], title: str, *, assumed: str | None = None) -> Figure:
    """Speed-up by batch and context; a cell without a number is hatched, and the reasons stand below.

    Args:
        rows: batch, context, speedup, and `draft_tokens` where the best K of the cell is to be named; None with a
            `reason` is a gap.
        assumed: as in `speedup_by_draft_tokens`.
    """
    table = _frame(rows, ("speedup", "draft_tokens"), ("reason",))
    batches, contexts = sorted(table["batch"].unique()), sorted(table["context"].unique())
    cells = table.set_index(["context", "batch"])
    numbers = cells["speedup"].unstack().reindex(index=contexts, columns=batches)
    fig, ax = plt.subplots(
        figsize=(min(_WIDTH, 2.6 + 0.95 * len(batches)), 2.2 + 0.5 * len(contexts)), layout="constrained"
    )
    top = max(1.05, np.nanmax(numbers.to_numpy(), initial=1.05))
    bottom = min(0.95, np.nanmin(numbers.to_numpy(), initial=0.95))
    ax.set_facecolor("#F2F2F2")
    # Orange and blue differ for everybody; white is where speculation neither gains nor costs.
    mesh = ax.pcolormesh(
        np.ma.masked_invalid(numbers.to_numpy()),
        cmap="PuOr",
        edgecolor="white",
        linewidth=1.5,
        norm=TwoSlopeNorm(1, vmin=2 - max(top, 2 - bottom), vmax=max(top, 2 - bottom)),
    )
    reasons = []
    for y, context in enumerate(contexts):
        for x, batch in enumerate(batches):
            if pd.isna(numbers.loc[context, batch]):
                reason = cells["reason"].get((context, batch)) or "not measured"
                reasons += [reason] if reason not in reasons else []
                ax.fill_between([x, x + 1], y, y + 1, facecolor="none", edgecolor="#B5B5B5", hatch="////", linewidth=0)
                sign = "abcdefgh"[reasons.index(reason) % 8]
                ax.text(
                    x + 0.5,
                    y + 0.5,
                    sign,
                    ha="center",
                    va="center",
                    fontsize=9,
                    color=INK,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
                )
                continue
            _cell(ax, x, y, cells.loc[(context, batch)], mesh)
    ax.set_xticks(np.arange(len(batches)) + 0.5, batches)
    ax.set_yticks(np.arange(len(contexts)) + 0.5, [_tokens(context) for context in contexts])
    below = [f"{'abcdefgh'[index % 8]}: {reason}" for index, reason in enumerate(reasons)]
    below += [f"{ASSUMED}: {assumed}"] if assumed else []
    ax.set_xlabel("\n".join(["sequences in the batch", *below]))
    ax.set_ylabel("tokens of context")
    plain(ax, grid="x")
    ax.grid(False)
    fig.colorbar(mesh, ax=ax, label="tokens per second, × vanilla", pad=0.02).outline.set_visible(False)
    _title(fig, title)
    return fig


def _cell(ax: Axes, x: int, y: int, row: pd.Series, mesh) -> None:
    red, green, blue, _ = mesh.cmap(mesh.norm(row["speedup"]))
    colour = INK if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
    best = "" if pd.isna(row["draft_tokens"]) else f"\nK = {row['draft_tokens']:.0f}"
    ax.text(x + 0.5, y + 0.5, f"{row['speedup']:.2f}{best}", ha="center", va="center", fontsize=8.5, color=colour)


def _tokens(number: int) -> str:
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else str(number)


def _frame(rows: Sequence[Mapping], numbers: Iterable[str], words: Iterable[str] = ()) -> pd.DataFrame:
    """The rows as a table in which every named column is there: numbers with NaN where missing, words with None."""
    if not len(rows):
        raise ValueError("no rows: a figure needs at least one, if only with the reason why nothing was measured")
    table = pd.DataFrame(rows)
    for name in numbers:
        table[name] = table[name].astype(float) if name in table else np.nan
    for name in words:
        table[name] = table[name].astype(object).where(table[name].notna(), None) if name in table else None
    return table


def _longest(rows: Sequence[Mapping]) -> pd.DataFrame:
    """Of each method, task and temperature the row with the most draft tokens; methods in the order of METHODS."""
    table = _frame(
        rows,
        ("acceptance_length", "acceptance_length_low", "acceptance_length_high", "tokens_per_step"),
        ("reason", "rates", "steps_by_tokens"),
    )
    table = table.sort_values("draft_tokens").drop_duplicates(["method", "task", "temperature"], keep="last")
    order = _order(table["method"])
    ranks = table["method"].map({name: rank for rank, name in enumerate(order)})
    tasks = {name: rank for rank, name in enumerate(dict.fromkeys(row["task"] for row in rows))}
    return table.assign(rank=ranks, place=table["task"].map(tasks)).sort_values(["place", "rank", "temperature"])


def _order(methods: Iterable[str]) -> list[str]:
    methods = list(dict.fromkeys(methods))
    return [name for name in METHODS if name in methods] + [name for name in methods if name not in METHODS]


def _colour(method: str) -> str:
    return METHODS.get(method, _OTHERS[sum(map(ord, method)) % len(_OTHERS)])


def _series_colours(table: pd.DataFrame) -> list[str]:
    """A colour per series: its method's where no other series has it, else one after another."""
    firsts = table.drop_duplicates("series")
    known = [METHODS.get(method) for method in firsts["method"]]
    if None not in known and len(set(known)) == len(known):
        return known
    palette = [*list(METHODS.values())[:0:-1], *_OTHERS]
    return [palette[index % len(palette)] for index in range(len(firsts))]


def _method(method: str, temperature: float, temperatures: Sequence[float]) -> str:
    return method if len(temperatures) == 1 else f"{method}, T = {temperature:g}"


def _length(row) -> str:
    spread = f" ({row.acceptance_length_low:.2f}–{row.acceptance_length_high:.2f})"
    return f"{row.acceptance_length:.2f}" + ("" if pd.isna(row.acceptance_length_low) else spread)


def _notes(ax: Axes, told: Sequence[tuple[str, str]]) -> None:
    """Lines of text below the axis, where no data can lie under them."""
    lines = [("acceptance length (95 % interval)", INK, "normal")]
    lines += [(text, _colour(method), "bold") for text, method in told]
    for index, (text, colour, weight) in enumerate(lines):
        ax.annotate(
            text,
            (0, 0),
            (0, -44 - 12 * index),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=8.5,
            color=colour,
            fontweight=weight,
        )


def _panels(names: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    fig, axes = plt.subplots(
        1,
        len(names),
        figsize=(max(4.6, min(_WIDTH, 3.4 * len(names))), height),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    return fig, list(axes[0])


def _legend(fig: Figure, methods: Iterable[str], temperatures: Sequence[float] = ()) -> None:
    handles = [
        Line2D([], [], marker=MARKERS.get(name, "o"), color=_colour(name), label=name) for name in _order(methods)
    ]
    if len(temperatures) > 1:
        for index, temperature in enumerate(temperatures):
            style = (0, (4, 2)) if index else "-"
            handles.append(Line2D([], [], color=FAINT, linestyle=style, label=f"temperature {temperature:g}"))
    fig.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=9)


def _title(fig: Figure, title: str) -> None:
    fig.suptitle(title, fontsize=12, fontweight="bold", color=INK, x=0.01, ha="left", wrap=True)
