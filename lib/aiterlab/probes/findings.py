# SPDX-License-Identifier: Apache-2.0
"""Sentences computed from cells: what a notebook concludes is derived from its table, whatever trees it was given."""

from __future__ import annotations

import pandas as pd

from aiterlab.probes import comparisons, tables
from aiterlab.probes.cells import Verdict, verdict


def regression(cells: pd.DataFrame) -> str:
    """Who falls into the builtin trap, under which conditions, and who does not."""
    met = tables.trapped(cells)
    clean = _names([tree for tree in cells["tree"].unique() if tree not in set(met["tree"])])
    if met.empty:
        return f"None of {len(cells)} cells meets Python's builtin aiter in place of the module ({clean})."
    where = _names(met["tree"].unique())
    parts = [f"{len(met)} of {len(cells)} cells end in Python's builtin aiter, all of them in {where}"]
    asked = met[(met["aiter"] != "absent") & (met["selection"] != "auto")]
    if not asked.empty:
        positions = _names(asked["switch"].unique(), last="or")
        parts.append(f"with AITER installed it takes an explicit choice of the backend and the switch at {positions}")
    if clean:
        parts.append(f"never in {clean}")
    return "; ".join(parts) + "."


def other_failures(failures: list[dict]) -> str:
    """What else ended in an exception, beside the driven steps: no failed question goes unsaid."""
    told = [
        f"{one['tree']}, {one['step']}: {one['type']}: {one['message']}"
        f" ({one['cells']} cells, raised in {one['raised_in']})"
        for one in failures
        if one["step"] not in tables.DRIVEN and not _refusal(one)
    ]
    return f"Other questions that ended in an exception: {'; '.join(told)}." if told else "No other question failed."


def _refusal(failure: dict) -> bool:
    return failure["step"] == "selection" and verdict({"selection": failure | {"outcome": "error"}}) == Verdict.REFUSED


def noise(path: pd.DataFrame) -> str:
    """In which trees AITER is imported although its switch is off and nobody asked for it."""
    noisy = path[(path["switch"] != "1") & (path["AITER imported by"] != "nobody")]
    if noisy.empty:
        return "With the switch off, no tree imports AITER unasked."
    lines = noisy.drop_duplicates(["tree", "at", "GPU"])
    told = "; ".join(
        f"{line['tree']} on {line['GPU']} (by {line['AITER imported by']}, at {line['at']})"
        for _, line in lines.iterrows()
    )
    return f"With the switch off, AITER is imported unasked in {told}."


def fix(before: pd.DataFrame, after: pd.DataFrame, differing: pd.DataFrame) -> str:
    """What the fix changed, and whether it equals upstream's."""
    changed = comparisons.differences(before, after, ["verdict"])
    noisy = after[(after["selection"] == "auto") & (after["switch"] != "1") & after["aiter_imported_by"].notna()]
    return (
        f"The hotfix takes the builtin trap from {len(tables.trapped(before))} to {len(tables.trapped(after))}"
        f" of {len(after)} cells, changes {len(changed)} verdicts and {agreement(differing)};"
        f" with the switch off, auto-selection imports AITER in {len(noisy)} cells."
    )


def agreement(differing: pd.DataFrame) -> str:
    """Whether two trees agree, in words."""
    return "agrees with upstream's fix in every cell" if differing.empty else f"differs in {len(differing)} facts"


def _names(names, last: str = "and") -> str:
    names = list(names)
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""
