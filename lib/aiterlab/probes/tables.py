# SPDX-License-Identifier: Apache-2.0
"""Tables and sentences made from cells; notebooks show them, records keep them."""

from __future__ import annotations

import json

import pandas as pd

from aiterlab import policy
from aiterlab.probes.cells import SHUFFLE_SWITCH, STEPS, TRAP

# Architectures that vLLM 0.15 and 0.16 count as supported by AITER (vllm.platforms.rocm.on_gfx9).
AITER_ARCHITECTURES = ("gfx90a", "gfx942", "gfx950")
COORDINATES = ["tree", "arch", "aiter", "switch", "selection"]


def frame(rows: list[dict]) -> pd.DataFrame:
    """One line per cell: its coordinates, its verdict and the plain facts behind it; None where nothing was found."""
    return pd.DataFrame([_flat(row) for row in rows])


def _flat(row: dict) -> dict:
    facts = row["facts"]
    policy, selection = facts.get("policy", {}), facts.get("selection", {})
    eagle, fa_utils, vit = facts.get("eagle", {}), facts.get("fa_utils", {}), facts.get("vit", {})
    imports = facts.get("aiter_imports", [])
    first = next((entry for entry in imports if entry["first"]), None)
    drive = selection.get("drive", {})
    return {
        **{name: row[name] for name in COORDINATES},
        "shuffle_switch": row["switches"].get(SHUFFLE_SWITCH, "unset"),
        "verdict": row["verdict"],
        "available": policy.get("available"),
        "enabled": policy.get("enabled"),
        "backend": selection.get("backend"),
        "selection_error": _error(selection),
        **{name: drive[name]["outcome"] if name in drive else None for name in STEPS},
        **{f"{name}_error": _error(drive.get(name, {})) for name in STEPS},
        **{f"{name}_max_abs_error": drive.get(name, {}).get("max_abs_error") for name in STEPS},
        **{f"{name}_tolerance": drive.get(name, {}).get("tolerance") for name in STEPS},
        "gather_then_attend": drive.get("gather_then_attend", {}).get("outcome"),
        "eagle_allows_aiter": eagle.get("allows_aiter"),
        "eagle_error": _error(eagle),
        "fa_utils_exports": ", ".join(name for name, there in fa_utils.get("exports", {}).items() if there) or None,
        "varlen_func_available": fa_utils.get("varlen_func_available"),
        "vit_auto": vit.get("auto"),
        "vit_explicit": vit.get("explicit"),
        "shuffle_kv_cache_enabled": policy.get("shuffle_kv_cache_enabled"),
        "fp8_names": ", ".join(policy.get("fp8_dtypes", {})) or None,
        "fp8_dtype": ", ".join(sorted(set(policy.get("fp8_dtypes", {}).values()))) or None,
        "ops_registered": policy.get("ops_registered"),
        "aiter_imported_by": first["importer"] if first else None,
        "aiter_imported_at": f"{first['file']}:{first['line']}" if first else None,
        "aiter_imported_during": first["step"] if first else None,
        "jit_modules": len(facts.get("jit_modules", [])),
        "hotfix_parts": ", ".join(map(str, policy.get("hotfix", {}).get("applied", []))) or None,
        "hotfix_refused": policy.get("hotfix", {}).get("refused"),
        "stand_ins": len(facts.get("stand_ins", [])),
        "simulated": row["simulated"],
        "seconds": row["seconds"],
        "reused": row["reused"],
        "no_answer_reason": row["no_answer_reason"],
    }


def _error(fact: dict) -> str | None:
    return f"{fact['type']}: {fact['message']}" if fact.get("outcome") == "error" else None


def truth_table(cells: pd.DataFrame) -> pd.DataFrame:
    """The verdicts, one column per selection, AITER and switch; architectures with the same verdicts share a line."""
    columns = cells[["selection", "aiter", "switch"]].drop_duplicates().sort_values("selection", kind="stable")
    verdicts = cells.pivot(index=["tree", "arch"], columns=list(columns), values="verdict")
    verdicts = verdicts[list(columns.itertuples(index=False, name=None))]
    lines = {}
    for tree, arch in cells[["tree", "arch"]].drop_duplicates().itertuples(index=False, name=None):
        lines.setdefault((tree, tuple(verdicts.loc[(tree, arch)])), []).append(arch)
    index = pd.MultiIndex.from_tuples(
        [(tree, ", ".join(archs)) for (tree, _), archs in lines.items()], names=["tree", "GPU"]
    )
    names = columns.assign(aiter="AITER " + columns["aiter"], switch="switch " + columns["switch"])
    return pd.DataFrame([line for _, line in lines], index=index, columns=pd.MultiIndex.from_frame(names))


def counts(cells: pd.DataFrame) -> pd.DataFrame:
    """How often each verdict was given, per tree and kind of selection."""
    table = cells.groupby(["tree", "selection", "verdict"], sort=False).size().unstack(fill_value=0)
    return table.astype(int)


def traceback_text(step: dict) -> str:
    """An exception of a step as Python would print it, with the tree's own frames only."""
    lines = ["Traceback (vLLM's own frames):"]
    for at in step["frames"]:
        lines += [f'  File "{at["file"]}", line {at["line"]}, in {at["function"]}', f"    {at['source']}"]
    return "\n".join([*lines, f"{step['type']}: {step['message']}"])


def imports(rows: list[dict]) -> pd.DataFrame:
    """Every import statement of AITER that ran, with the moment, and what each cell would have compiled."""
    return pd.DataFrame(
        [
            {
                **{name: row[name] for name in COORDINATES},
                "imported by": entry["importer"],
                "at": f"{entry['file']}:{entry['line']}",
                "during": entry["step"],
                "first": entry["first"],
            }
            for row in rows
            for entry in row["facts"].get("aiter_imports", [])
        ]
    )


def jit_modules(rows: list[dict]) -> pd.DataFrame:
    """Every JIT module that AITER asked for, in order, with the step that made it ask."""
    return pd.DataFrame(
        [
            {**{name: row[name] for name in COORDINATES}, "JIT module": entry["module"], "during": entry["step"]}
            for row in rows
            for entry in row["facts"].get("jit_modules", [])
        ]
    )


def accuracy(cells: pd.DataFrame) -> pd.DataFrame:
    """Error and tolerance of each step that was driven, one line per cell and step."""
    driven = cells[cells["decode"].notna()]
    parts = [
        driven[[*COORDINATES, step, f"{step}_max_abs_error", f"{step}_tolerance", f"{step}_error"]]
        .rename(columns={step: "outcome", f"{step}_max_abs_error": "max_abs_error", f"{step}_tolerance": "tolerance"})
        .rename(columns={f"{step}_error": "exception"})
        .assign(step=step)
        for step in STEPS
    ]
    return pd.concat(parts, ignore_index=True)


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


def trapped(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells in which a step met Python's builtin `aiter`."""
    met = (
        cells[[f"{step}_error" for step in STEPS]]
        .apply(lambda column: column.str.contains(TRAP, regex=False))
        .any(axis=1)
    )
    return cells[met.fillna(False).astype(bool)]


def other_faults(cells: pd.DataFrame) -> pd.DataFrame:
    """The faults beside the builtin, on the first architecture with AITER installed and its backend asked for."""
    asked = cells[
        (cells["arch"] == cells["arch"].iloc[0]) & (cells["aiter"] != "absent") & (cells["selection"] != "auto")
    ]
    return pd.DataFrame(
        {
            "tree": asked["tree"],
            "switch": asked["switch"],
            "EAGLE allows AITER's metadata": asked["eagle_allows_aiter"]
            .map({True: "yes", False: "no"})
            .fillna(asked["eagle_error"]),
            "fa_utils exports": asked["fa_utils_exports"],
            "first decode step": asked["decode_error"].fillna(asked["decode"]).fillna("not driven"),
        }
    ).reset_index(drop=True)


def agreement_with_policy(cells: pd.DataFrame) -> pd.DataFrame:
    """Compare each tree's own answers with `policy.py` on the same facts: how many cells agree, per tree."""
    return (
        pd.DataFrame(
            {
                "tree": cells["tree"],
                "availability agrees": cells["available"] == cells.apply(_policy_available, axis=1),
                "preference agrees": cells["enabled"] == cells.apply(_policy_preferred, axis=1),
            }
        )
        .groupby("tree", sort=False)
        .agg(["sum", "count"])
        .astype(int)
        .pipe(
            lambda t: pd.DataFrame(
                {name: t[name].apply(lambda n: f"{n['sum']} of {n['count']}", axis=1) for name in t.columns.levels[0]}
            )
        )
    )


def _facts(cell: pd.Series) -> policy.Facts:
    return policy.Facts(
        rocm=True,
        library=cell["aiter"] == "present",
        architecture=cell["arch"],
        architecture_supported=cell["arch"] in AITER_ARCHITECTURES,
    )


def _policy_available(cell: pd.Series) -> bool:
    return bool(policy.availability(_facts(cell)))


def _policy_preferred(cell: pd.Series) -> bool:
    switches = {} if cell["switch"] == "unset" else {policy.MAIN_SWITCH: cell["switch"]}
    return bool(policy.preference(_facts(cell), switches))


def compiled_at_import(rows: list[dict]) -> pd.DataFrame:
    """Per tree and switch, on the auto path with AITER installed: who imports it, and what that sets off."""
    quiet = [
        row
        for row in rows
        if row["selection"] == "auto" and row["aiter"] != "absent" and row["arch"] == rows[0]["arch"]
    ]
    lines = []
    for row in quiet:
        entries = row["facts"].get("aiter_imports", [])
        lines.append(
            {
                "tree": row["tree"],
                "switch": row["switch"],
                "AITER imported by": ", ".join(dict.fromkeys(e["importer"] for e in entries)) or "nobody",
                "at": ", ".join(f"{e['file']}:{e['line']}" for e in entries) or "–",
                "would compile": ", ".join(e["module"] for e in row["facts"].get("jit_modules", [])) or "nothing",
                "lines AITER prints": len(row["aiter_log"]),
            }
        )
    return pd.DataFrame(lines)


def failures(rows: list[dict]) -> list[dict]:
    """Every distinct exception of a driven step or a selection, with its frames and the number of cells it ended."""
    found: dict[tuple, dict] = {}
    for row in rows:
        selection = row["facts"].get("selection", {})
        for step, fact in {"selection": selection, **selection.get("drive", {})}.items():
            if fact.get("outcome") != "error":
                continue
            at = fact["raised_at"] or {}
            key = (row["tree"], step, fact["type"], fact["message"], at.get("file"), at.get("line"))
            entry = {"tree": row["tree"], "step": step, "type": fact["type"], "message": fact["message"]}
            found.setdefault(key, entry | {"raised_at": fact["raised_at"], "frames": fact["frames"], "cells": 0})[
                "cells"
            ] += 1
    return list(found.values())


def plain(table: pd.DataFrame) -> dict[str, list]:
    """A table as JSON for a record: one list per column, None where a value is missing; `pd.DataFrame` reads it back."""
    return {name: json.loads(table[name].to_json(orient="values")) for name in table.columns}


def stand_ins(rows: list[dict]) -> list[str]:
    """Every stand-in for compiled code that a cell really used."""
    return sorted({name for row in rows for name in row["facts"].get("stand_ins", [])})


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
