# SPDX-License-Identifier: Apache-2.0
"""Tables and sentences made from cells; notebooks show them, records keep them."""

from __future__ import annotations

import json

import pandas as pd

from aiterlab.probes.cells import SHUFFLE_SWITCH, STEPS, TRAP

DRIVEN = (*STEPS, "gather_then_attend")
COORDINATES = ["tree", "arch", "aiter", "switch", "selection"]


def frame(rows: list[dict]) -> pd.DataFrame:
    """One line per cell: its coordinates, its verdict and the plain facts behind it; None where nothing was found."""
    return pd.DataFrame([_flat(row) for row in rows])


def _flat(row: dict) -> dict:
    facts = row["facts"]
    said, selection = facts.get("policy", {}), facts.get("selection", {})
    eagle, fa_utils, vit = facts.get("eagle", {}), facts.get("fa_utils", {}), facts.get("vit", {})
    imports = facts.get("aiter_imports", [])
    first = next((entry for entry in imports if entry["first"]), None)
    drive = selection.get("drive", {})
    return {
        **{name: row[name] for name in COORDINATES},
        "shuffle_switch": row["switches"].get(SHUFFLE_SWITCH, "unset"),
        "verdict": row["verdict"],
        "available": said.get("available"),
        "enabled": said.get("enabled"),
        "backend": selection.get("backend"),
        "selection_error": _error(selection),
        **{name: drive[name]["outcome"] if name in drive else None for name in STEPS},
        **{f"{name}_error": _error(drive.get(name, {})) for name in STEPS},
        **{f"{name}_max_abs_error": drive.get(name, {}).get("max_abs_error") for name in STEPS},
        **{f"{name}_tolerance": drive.get(name, {}).get("tolerance") for name in STEPS},
        "gather_then_attend": drive.get("gather_then_attend", {}).get("outcome"),
        "eagle_allows_aiter": eagle.get("allows_aiter"),
        "eagle_allowed_metadata": ", ".join(sorted(eagle.get("allowed_metadata") or [])) or None,
        "eagle_error": _error(eagle),
        "fa_utils_exports": _present(fa_utils.get("exports")),
        "flash_attn_has": _present(fa_utils.get("flash_attn_has")),
        "varlen_func_available": fa_utils.get("varlen_func_available"),
        **{f"{name}_error": _error(facts.get(name, {})) for name in ("platform", "policy", "vit", "fa_utils")},
        "vit_auto": vit.get("auto"),
        "vit_explicit": vit.get("explicit"),
        "shuffle_kv_cache_enabled": said.get("shuffle_kv_cache_enabled"),
        "fp8_names": ", ".join(said.get("fp8_dtypes", {})) or None,
        "fp8_dtype": ", ".join(sorted(set(said.get("fp8_dtypes", {}).values()))) or None,
        "ops_registered": said.get("ops_registered"),
        "aiter_imported_by": first["importer"] if first else None,
        "aiter_imported_at": f"{first['file']}:{first['line']}" if first else None,
        "aiter_imported_during": first["step"] if first else None,
        "jit_modules": len(facts.get("jit_modules", [])),
        "hotfix_parts": ", ".join(map(str, said.get("hotfix", {}).get("applied", []))) or None,
        "hotfix_refused": said.get("hotfix", {}).get("refused"),
        "stand_ins": len(facts.get("stand_ins", [])),
        "flash_attn": row["flash_attn"],
        "simulated": row["simulated"],
        "seconds": row["seconds"],
        "peak_memory_bytes": row["peak_memory_bytes"],
        "reused": row["reused"],
        "no_answer_reason": row["no_answer_reason"],
    }


def _present(names: dict[str, bool] | None) -> str | None:
    return None if names is None else ", ".join(name for name, there in names.items() if there) or "none"


def _error(fact: dict) -> str | None:
    return f"{fact['type']}: {fact['message']}" if fact.get("outcome") == "error" else None


def truth_table(cells: pd.DataFrame) -> pd.DataFrame:
    """The verdicts, one column per selection, AITER and switch; architectures with the same verdicts share a line."""
    columns = cells[["selection", "aiter", "switch"]].drop_duplicates()
    columns = columns.sort_values("selection", key=lambda names: names != "auto", kind="stable")
    verdicts = cells.pivot(index=["tree", "arch"], columns=list(columns), values="verdict")
    verdicts = verdicts[list(columns.itertuples(index=False, name=None))]
    lines = {}
    for tree, arch in cells[["tree", "arch"]].drop_duplicates().itertuples(index=False, name=None):
        lines.setdefault((tree, tuple(verdicts.loc[(tree, arch)])), []).append(arch)
    index = pd.MultiIndex.from_tuples(
        [(tree, ", ".join(archs)) for (tree, _), archs in lines.items()], names=["tree", "GPU"]
    )
    names = columns.assign(aiter="AITER " + columns["aiter"])
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
    first = cells["arch"].iloc[0]
    asked = cells[(cells["arch"] == first) & (cells["aiter"] != "absent") & (cells["selection"] != "auto")]
    allowed = asked["eagle_allows_aiter"].map({True: "yes", False: "no"})
    return pd.DataFrame(
        {
            "tree": asked["tree"],
            "switch": asked["switch"],
            "first decode step": asked["decode_error"].fillna(asked["decode"]).fillna("not driven"),
            "EAGLE allows AITER's metadata": allowed.fillna(asked["eagle_error"]),
            "fa_utils exports": asked["fa_utils_exports"],
            "so FlashAttention's module has": asked["flash_attn_has"],
        }
    ).reset_index(drop=True)


def auto_path(rows: list[dict]) -> pd.DataFrame:
    """Per tree and switch, with AITER installed and nobody asking for it: who imports it, and what that sets off."""
    alike: dict[tuple, list[str]] = {}
    for row in rows:
        if row["selection"] != "auto" or row["aiter"] == "absent":
            continue
        entries = [e for e in row["facts"].get("aiter_imports", []) if e["step"] not in DRIVEN]
        compiled = [e["module"] for e in row["facts"].get("jit_modules", []) if e["step"] not in DRIVEN]
        line = {
            "tree": row["tree"],
            "switch": row["switch"],
            "AITER imported by": ", ".join(dict.fromkeys(e["importer"] for e in entries)) or "nobody",
            "at": ", ".join(f"{e['file']}:{e['line']}" for e in entries) or "–",
            "while asking for": ", ".join(dict.fromkeys(e["step"] for e in entries)) or "–",
            "the import would compile": ", ".join(compiled) or "nothing",
        }
        alike.setdefault(tuple(line.items()), []).append(row["arch"])
    lines = [dict(line) | {"GPU": ", ".join(archs)} for line, archs in alike.items()]
    columns = ["tree", "GPU", "switch", "AITER imported by", "at", "while asking for", "the import would compile"]
    return pd.DataFrame(lines, columns=columns)


def failures(rows: list[dict]) -> list[dict]:
    """Every distinct exception that a question or a driven step ended in, with its frames and its number of cells."""
    found: dict[tuple, dict] = {}
    for row in rows:
        asked = {name: fact for name, fact in row["facts"].items() if isinstance(fact, dict) and "outcome" in fact}
        for step, fact in (asked | asked.get("selection", {}).get("drive", {})).items():
            if fact["outcome"] != "error":
                continue
            at = fact["raised_at"] or {}
            key = (row["tree"], step, fact["type"], fact["message"], at.get("file"), at.get("line"))
            entry = {"tree": row["tree"], "step": step, "cells": 0, "first_cell": {c: row[c] for c in COORDINATES}}
            kept = {name: fact[name] for name in ("type", "message", "raised_at", "raised_in", "frames")}
            found.setdefault(key, entry | kept)["cells"] += 1
    return list(found.values())


def plain(table: pd.DataFrame) -> dict[str, list]:
    """A table as JSON for a record: one list per column, None where a value is missing."""
    return {name: json.loads(table[name].to_json(orient="values")) for name in table.columns}


def stand_ins(rows: list[dict]) -> list[str]:
    """Every stand-in for compiled code that a cell really used."""
    return sorted({name for row in rows for name in row["facts"].get("stand_ins", [])})
