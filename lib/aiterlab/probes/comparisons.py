# SPDX-License-Identifier: Apache-2.0
"""Trees compared: with each other, with the rule of `policy.py`, and with the whole hotfix part by part."""

from __future__ import annotations

import pandas as pd

from aiterlab import policy
from aiterlab.probes.cells import EXPLICIT
from aiterlab.probes.tables import COORDINATES

# Architectures that vLLM 0.15 and 0.16 count as supported by AITER (vllm.platforms.rocm.on_gfx9).
AITER_ARCHITECTURES = ("gfx90a", "gfx942", "gfx950")


def differences(left: pd.DataFrame, right: pd.DataFrame, facts: list[str]) -> pd.DataFrame:
    """Cells in which two trees differ in one of `facts`; both sides are matched on everything but the tree.

    Raises:
        ValueError: the trees were not asked the same questions.
    """
    keys = [*COORDINATES[1:], "shuffle_switch"]
    joined = left.merge(right, on=keys, how="outer", suffixes=(" left", " right"), indicator=True)
    if (joined["_merge"] != "both").any():
        raise ValueError("the two trees were not asked the same questions")
    found = [
        {**{key: cell[key] for key in keys}, "fact": fact, "left": cell[f"{fact} left"], "right": cell[f"{fact} right"]}
        for _, cell in joined.iterrows()
        for fact in facts
        if not _same(cell[f"{fact} left"], cell[f"{fact} right"])
    ]
    return pd.DataFrame(found, columns=[*keys, "fact", "left", "right"])


def _same(one, other) -> bool:
    return (pd.isna(one) and pd.isna(other)) or one == other


def agreement_with_policy(cells: pd.DataFrame) -> pd.DataFrame:
    """Compare each tree's own answers with `policy.py` on the same facts: how many cells agree, per tree.

    Simulated machines only: there the facts are known without asking the tree.
    """
    known = cells[cells["simulated"]]
    agrees = pd.DataFrame([_agrees(cell) for _, cell in known.iterrows()], index=known.index)
    return agrees.groupby(known["tree"], sort=False).agg(lambda part: f"{int(part.sum())} of {part.count()}")


def against_policy(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of simulated machines in which a tree's selection differs from what `policy.py` selects."""
    known = cells[cells["simulated"]]
    differs = known[
        pd.Series([not _agrees(cell)["selection"] for _, cell in known.iterrows()], known.index, dtype=bool)
    ]
    shared = [*(name for name in COORDINATES if name != "arch"), "verdict", "available", "backend"]
    return differs.groupby(shared, sort=False, dropna=False)["arch"].agg(", ".join).rename("GPU").reset_index()


def _agrees(cell: pd.Series) -> dict[str, bool]:
    facts = policy.Facts(
        rocm=True,
        library=cell["aiter"] == "present",
        architecture=cell["arch"],
        architecture_supported=cell["arch"] in AITER_ARCHITECTURES,
    )
    switches = {} if cell["switch"] == "unset" else {policy.MAIN_SWITCH: cell["switch"]}
    available, preferred = policy.availability(facts), policy.preference(facts, switches)
    other = policy.Answer(True, "always there")
    candidates = [
        policy.Candidate(EXPLICIT, available, policy.preference(facts, switches, "mha")),
        policy.Candidate("another backend", other, other),
    ]
    chosen = policy.selection(candidates, None if cell["selection"] == "auto" else cell["selection"]).chosen
    return {
        "availability": cell["available"] == bool(available),
        "preference": cell["enabled"] == bool(preferred),
        "selection": _taken(cell) == chosen,
    }


def _taken(cell: pd.Series) -> str | None:
    """What the tree made of the choice, in the policy's words: a backend that cannot start was not refused in time."""
    if cell["backend"] == EXPLICIT:
        return EXPLICIT
    return "another backend" if cell["selection"] == "auto" else None


def parts(cells: pd.DataFrame, whole: str) -> pd.DataFrame:
    """What each tree says on one machine, one line per tree; what differs from the tree `whole` is marked with »«."""
    cells = cells.set_index("tree")
    plain_cache = cells[cells["shuffle_switch"] == "unset"]
    shuffled = cells[cells["shuffle_switch"] == "1"]
    lines = pd.DataFrame(
        {
            "available": plain_cache["available"],
            "prefill": plain_cache["prefill_error"].fillna(plain_cache["prefill"]),
            "decode": plain_cache["decode_error"].fillna(plain_cache["decode"]),
            "gather, then attend": plain_cache["gather_then_attend"],
            "shuffled KV cache follows its switch": shuffled["shuffle_kv_cache_enabled"],
            "shuffled decode": shuffled["decode_error"].fillna(shuffled["decode"]),
            "names of the FP8 dtype": plain_cache["fp8_names"],
            "fa_utils exports": plain_cache["fa_utils_exports"],
            "EAGLE allows AITER": plain_cache["eagle_allows_aiter"],
        }
    ).loc[plain_cache.index]
    words = lines.map(lambda value: {True: "yes", False: "no"}.get(value, str(value)))
    return words.apply(lambda line: line.where(line == words.loc[whole], "» " + line + " «"), axis=1)
