# SPDX-License-Identifier: Apache-2.0
"""The numbers of the page as tidy tables: one line per measurement, with the machine that it holds on.

A notebook's newest record of a machine counts, whole: this run's before a given run's before the reference. A record
that cannot be read is a line of `sources` with its reason, and an older one takes its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import pandas as pd

from aiterlab.answer.sources import EAGLE, FIX, KERNELS, REFERENCE, REPRODUCE, Machine, Source, machine_of
from aiterlab.attention import tables as attention
from aiterlab.measure.hardware import Ceiling
from aiterlab.spec_decode import tables as spec_decode

Frames = dict[str, pd.DataFrame]
MOST_MACHINES = 2  # that one page can hold, of each notebook; GPUs first
SOURCES = ["notebook", "from", "machine", "kind", "commit", "made", "reason"]
_OF = ["notebook", "machine", "kind"]  # the first columns of every other table
COLUMNS = {
    name: columns.split()
    for name, columns in {
        "cells": "tree arch aiter switch selection verdict",
        "checks": "provider implementation workload dtype outcome error_over_tolerance",
        "absent": "provider reason",
        "ceilings": "name unit rate",
        "kernels": "operation workload provider implementation k_and_v median_us p20_us p80_us rate unit "
        "share_of_ceiling suite_times",
        "greedy": "engine compared_tokens near_ties different",
        "scores": "backend method draft_tokens task shots filter value stderr samples",
        "times": "weights group backend method K batch context acceptance ms_per_token ms_per_token_median "
        "ms_per_token_p80 speed_up reason",
        "acceptance": "task method draft_tokens position rate drafts",
    }.items()
}


def read(sources: Iterable[Source]) -> Frames:
    """Make the tables of all records that count; `sources` holds a line per place, with a reason where none counts."""
    looked = [(source, *_tables(source)) for source in sources]
    counting = _counting([(source, machine) for source, machine, tables, _ in looked if tables is not None])
    parts, lines = {name: [] for name in COLUMNS}, []
    for source, machine, tables, reason in looked:
        if tables is not None and (reason := counting[id(source)]) is None:
            for name, table in tables.items():
                parts[name].append(table.assign(machine=machine.name, kind=machine.kind, notebook=source.stem))
        lines.append((source.stem, source.origin, machine.name, machine.kind, source.commit, source.made, reason))
    frames = {name: _joined(columns, parts[name]) for name, columns in COLUMNS.items()}
    frames["cells"] = _in_time(frames["cells"])
    return frames | {"sources": pd.DataFrame(lines, columns=SOURCES, dtype=object)}


def _counting(readable: list[tuple[Source, Machine]]) -> dict[int, str | None]:
    """Why each readable record does not count, by its id; None for those that do."""
    reasons: dict[int, str | None] = {}
    for stem in dict.fromkeys(source.stem for source, _ in readable):
        first: dict[Machine, Source] = {}
        for source, machine in readable:
            if source.stem == stem and source.origin == REFERENCE and machine.kind == "cpu":
                reasons[id(source)] = "another CPU says nothing about this one, nor about a GPU"
            elif source.stem == stem:
                kept = first.setdefault(machine, source)
                reasons[id(source)] = None if kept is source else f"the one of {kept.origin} counts"
        ranked = sorted(first, key=lambda machine: machine.kind != "gpu")
        for machine in ranked[MOST_MACHINES:]:
            reasons[id(first[machine])] = f"the page holds {MOST_MACHINES} machines of a notebook"
    return reasons


def _in_time(cells: pd.DataFrame) -> pd.DataFrame:
    """One line per cell, 02's where 01 asked it too; releases in their order, what was made of one right behind it."""
    place, last = {}, ((), True)
    for _, tree in cells.sort_values("notebook", kind="stable")[["notebook", "tree"]].drop_duplicates().values:
        numbers = re.fullmatch(r"release:(\d+(?:\.\d+)*)", tree)
        own = (tuple(map(int, numbers[1].split("."))), False) if numbers else (last[0], True)
        last = place.setdefault(tree, own)
    ranks = {tree: rank for rank, tree in enumerate(sorted(place, key=place.__getitem__))}
    cells = cells.sort_values("notebook", ascending=False, kind="stable")
    cells = cells.drop_duplicates(["machine", "tree", "arch", "aiter", "switch", "selection"])
    return cells.sort_values("tree", key=lambda tree: tree.map(ranks), kind="stable", ignore_index=True)


def missing(sources: pd.DataFrame) -> dict[str, str]:
    """Why a notebook is not on the page, for each without any record that counts."""
    why = {}
    for stem, lines in sources.groupby("notebook", sort=False):
        if lines["reason"].notna().all():
            told = lines.drop_duplicates(["from", "reason"])
            reasons = "; ".join(f"{line[1]}: {line.reason}" for line in told.itertuples(index=False))
            why[stem] = f"{stem} not run ({reasons})"
    return why


def _tables(source: Source) -> tuple[Machine, Frames | None, str | None]:
    """A record's machine and tables, or why there are none."""
    unknown = Machine(None, None)
    if source.record is None:
        return unknown, None, source.reason
    try:
        machine = machine_of(source.record)
        return machine, _READERS[source.stem](source.record), None
    except Exception as error:  # whatever a record of another version, or of an editor, may hold
        said = str(error).splitlines()[0] if str(error) else ""
        return unknown, None, f"not a record that can be read: {type(error).__name__} {said}".rstrip()


def _cells(record: dict) -> Frames:
    return {"cells": pd.DataFrame({name: record["cells"][name] for name in COLUMNS["cells"]})}


def _kernels(record: dict) -> Frames:
    checks, providers = pd.DataFrame(record["checks"]), pd.DataFrame(record["providers"])
    ceilings = {
        row["name"]: Ceiling(row["name"], row["unit"], row["work"], tuple(row["samples_us"]))
        for row in record["ceilings"]
    }
    rated = attention.rates(pd.DataFrame(record["timings"]), ceilings)
    return {
        "checks": checks[checks["outcome"] != "refused"][COLUMNS["checks"]],
        "absent": providers.loc[~providers["runs"].astype(bool), ["provider", "reason"]],
        "ceilings": pd.DataFrame(
            [(c.name, c.unit, c.rate) for c in ceilings.values()], columns=["name", "unit", "rate"]
        ),
        "kernels": _fastest(rated[rated["implementation"] != attention.TWO_STEP]),
    }


def _fastest(rated: pd.DataFrame) -> pd.DataFrame:
    """Each provider's fastest implementation of a workload, and how many times the suite is as fast from the same K, V.

    Gathering first is left out, as where 04 compares: it is a way of its own.
    """
    rated = rated.assign(
        k_and_v=rated["implementation"].isin(attention.CONTIGUOUS).map({True: "contiguous", False: "pages"})
    )
    where = ["workload", "k_and_v"]
    best = rated.sort_values("median_us").drop_duplicates([*where, "provider"]).sort_index()
    suite = best[best["provider"] == "suite"].set_index(where)["median_us"]
    times = best["median_us"] / best.set_index(where).index.map(suite.to_dict()).to_numpy(dtype=float)
    best = best.assign(suite_times=times.where(best["provider"] != "suite"))
    return best[COLUMNS["kernels"]]


def _eagle(record: dict) -> Frames:
    return {
        "greedy": pd.DataFrame(record["greedy"], columns=COLUMNS["greedy"]),
        "scores": _scores(record["scores"]),
        "times": _times(record["timed"]),
        "acceptance": _acceptance(spec_decode.own(record["accepted"])),
    }


def _scores(rows: list[dict]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["engine", *COLUMNS["scores"], "metric"])
    # The name of the engine: vLLM's CPU engine has one backend alone, and is not told by name to use it.
    asked = table["engine"].astype(str).str.replace(r"^\S+( K=\d+)?\s*", "", regex=True)
    table["backend"] = table["backend"].fillna(asked.where(asked != "", spec_decode.OWN_BACKEND))
    table = table[table["metric"] == "exact_match"]
    # A harness may read the same answers by several filters; the page has room for one.
    return table[table["filter"] == table.groupby("task")["filter"].transform("min")][COLUMNS["scores"]]


def _times(rows: list[dict]) -> pd.DataFrame:
    """Milliseconds per token of one sequence, from the rounds themselves, whatever an older record made of them."""
    table = pd.DataFrame(spec_decode.times(rows), columns=None if rows else COLUMNS["times"])
    if table.empty:
        return table
    for name, rate in (("", "steady"), ("_median", "steady_median"), ("_p80", "steady_p20")):
        table[f"ms_per_token{name}"] = table["batch"] * 1e3 / table[f"{rate}_tok_s"].astype(float)
    table["weights"] = (table["group"] == spec_decode.MODELS).map({True: "models", False: "shape"})
    table["backend"] = table["backend"].fillna(spec_decode.OWN_BACKEND)
    return table[COLUMNS["times"]]


def _acceptance(rows: list[dict]) -> pd.DataFrame:
    """Greedy acceptance by position, of each method's engine with the most draft tokens."""
    rows = [row for row in rows if not row["temperature"] and row["rates"]]
    most: dict[str, int] = {}
    for row in rows:
        most[row["method"]] = max(most.get(row["method"], 0), row["draft_tokens"])
    lines = [
        (row["task"], row["method"], row["draft_tokens"], position, rate, row["drafts"])
        for row in rows
        if row["draft_tokens"] == most[row["method"]]
        for position, rate in enumerate(row["rates"], 1)
    ]
    return pd.DataFrame(lines, columns=COLUMNS["acceptance"])


_READERS: dict[str, Callable[[dict], Frames]] = {REPRODUCE: _cells, FIX: _cells, KERNELS: _kernels, EAGLE: _eagle}


def _joined(columns: list[str], parts: list[pd.DataFrame]) -> pd.DataFrame:
    """The parts below one another; GPUs first, so that a figure's first machine is one where there is one."""
    names, parts = [*_OF, *columns], [part for part in parts if len(part)]
    if not parts:
        return pd.DataFrame(columns=names)
    table = pd.concat(parts, ignore_index=True)[names]
    return table.sort_values("kind", key=lambda kind: kind != "gpu", kind="stable", ignore_index=True)
