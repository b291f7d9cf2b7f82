# SPDX-License-Identifier: Apache-2.0
"""Sentences computed from cells: what a notebook concludes is derived from its table, whatever trees it was given."""

from __future__ import annotations

import pandas as pd

from aiterlab.probes import tables
from aiterlab.probes.cells import STEPS, Verdict


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


def broken_promises(cells: pd.DataFrame) -> str:
    """Which other cells fail where vLLM neither works, nor chooses something else, nor refuses with a reason."""
    odd = cells[cells["verdict"].isin([Verdict.BROKEN, Verdict.UNANSWERED])]
    if odd.empty:
        return "No other cell failed."
    reasons = odd[["tree", "arch", "aiter", "switch", "selection"]].agg(" / ".join, axis=1)
    errors = odd[["selection_error", *[f"{s}_error" for s in STEPS], "no_answer_reason"]].bfill(axis=1).iloc[:, 0]
    return "Other failures: " + "; ".join(f"{where}: {error}" for where, error in zip(reasons, errors, strict=True))


def fix(before: pd.DataFrame, after: pd.DataFrame, upstream: pd.DataFrame, differing: pd.DataFrame) -> str:
    """What the fix changed, and whether it equals upstream's."""
    changed = tables.differences(before, after, ["verdict"])
    noisy = after[(after["selection"] == "auto") & (after["switch"] != "1") & after["aiter_imported_by"].notna()]
    equal = "in every cell" if differing.empty else f"but for {len(differing)} facts"
    return (
        f"The hotfix takes the builtin trap from {len(tables.trapped(before))} to {len(tables.trapped(after))}"
        f" of {len(after)} cells, changes {len(changed)} verdicts and agrees with upstream's fix {equal};"
        f" with the switch off, auto-selection imports AITER in {len(noisy)} cells."
    )


def _names(names, last: str = "and") -> str:
    names = list(names)
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""
