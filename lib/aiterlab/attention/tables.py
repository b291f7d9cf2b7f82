# SPDX-License-Identifier: Apache-2.0
"""Tables made from checks and timings: rates under a measured ceiling, ratios between providers, goals."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pandas as pd

from aiterlab.measure.hardware import Ceiling

MEMORY_BOUND = ("decode", "verify", "gather")  # the others are bound by matrix products
# Two starting points, which must not be compared with one another: a paged cache, or K and V as the layer made them.
CONTIGUOUS = ("varlen", "fa3_varlen", "sdpa")
TWO_STEP = "gather+varlen"
JOINED = "\u2060"  # keeps a browser from breaking a line within a range


def rates(timings: pd.DataFrame, ceilings: Mapping[str, Ceiling]) -> pd.DataFrame:
    """The timings that have samples, each with its rate and the share of what plain torch reached in the same run.

    Bytes and operations are the fewest that the workload needs, whatever an implementation really moves.
    """
    rows = timings.dropna(subset="median_us").reset_index(drop=True).astype({"median_us": float})
    memory = rows["operation"].isin(MEMORY_BOUND)
    rows["unit"] = ["TB/s" if one else "TFLOP/s" for one in memory]
    rows["rate"] = rows["bytes_moved"].where(memory, rows["flops"]).astype(float) / rows["median_us"] / 1e6
    rows["ceiling"] = [_ceiling(ceilings, one, dtype) for one, dtype in zip(memory, rows["dtype"], strict=True)]
    rows["share_of_ceiling"] = rows["rate"] / rows["ceiling"].astype(float)
    return rows


def _ceiling(ceilings: Mapping[str, Ceiling], memory: bool, dtype: str) -> float | None:
    """Copy bandwidth, or the rate of matrix products; a CPU has measured those of float32 alone."""
    found = ceilings.get("copy") if memory else ceilings.get(f"matmul_{dtype}") or ceilings.get("matmul_float32")
    return found.rate if found else None


def ceilings_of(ceilings: Mapping[str, Ceiling], dtype: str) -> dict[str, tuple[float, str]]:
    """The ceilings that bear on attention in `dtype`: name -> (rate, unit)."""
    products = f"matmul_{dtype}" if f"matmul_{dtype}" in ceilings else "matmul_float32"
    return {name: (ceilings[name].rate, ceilings[name].unit) for name in ("copy", "read", products) if name in ceilings}


def outcomes(checked: pd.DataFrame) -> pd.DataFrame:
    """How many checks of each implementation ended how, and its largest error as a share of the limit.

    Where all were refused, `refusals` says why, and there is no row.
    """
    keys = ["provider", "implementation", "dtype"]
    asked = checked[checked["outcome"] != "refused"].groupby(keys)["outcome"].count()
    checked = checked[checked.set_index(keys).index.isin(asked.index)]
    counts = checked.pivot_table(index=keys, columns="outcome", values="workload", aggfunc="count", sort=False)
    counts = counts.reindex(columns=["ok", "wrong", "failed", "refused"]).fillna(0).astype(int)
    largest = checked.groupby(keys, sort=False)["error_over_tolerance"].max().rename("largest error / tolerance")
    return counts.join(largest.astype(float)).reset_index()


def faults(checked: pd.DataFrame) -> pd.DataFrame:
    """The checks that were neither right nor refused, by reason: who, and on which workloads."""
    return _reasons(checked[checked["outcome"].isin(["wrong", "failed"])])


def refusals(checked: pd.DataFrame) -> pd.DataFrame:
    """What was not asked of whom, by reason."""
    return _reasons(checked[checked["outcome"] == "refused"])


def untimed(timings: pd.DataFrame) -> pd.DataFrame:
    """What has no time, by reason."""
    return _reasons(timings[timings["reason"] != ""])


def _reasons(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows.assign(label=rows["provider"] + " " + rows["implementation"])
    groups = rows.groupby("reason", sort=False)
    return pd.DataFrame(
        {
            "reason": list(groups.groups),
            "implementations": [_joined(part["label"], 8) for _, part in groups],
            "workloads": [_joined(part["workload"], 3) for _, part in groups],
        }
    )


def _joined(names: pd.Series, most: int) -> str:
    names = list(names.unique())
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass(frozen=True)
class _Times:
    """One implementation's median and spread on one workload, in microseconds."""

    implementation: str
    median: float
    low: float
    high: float


def _fastest(timings: pd.DataFrame, provider: str, names: Iterable[str]) -> _Times | None:
    rows = timings[(timings["provider"] == provider) & timings["implementation"].isin(list(names))]
    if rows.empty:
        return None
    row = rows.loc[rows["median_us"].astype(float).idxmin()]
    return _Times(row["implementation"], float(row["median_us"]), float(row["p20_us"]), float(row["p80_us"]))


# (where K and V are, the suite's route, FA3's, vLLM Triton's)
_COMPARED = (
    ("pages", ("paged", "gather"), ("fa3", "fa3_auto"), ("unified", "gather")),
    ("contiguous", ("varlen",), ("fa3_varlen",), ()),
)


_RATIOS = ["workload", "operation", "k_and_v", "suite", "suite_us", "rate", "unit", "share_of_ceiling"]


def ratios(rated: pd.DataFrame) -> pd.DataFrame:
    """How many times the suite is as fast as FA3 and as vLLM's Triton kernels, from the same K and V.

    Each side is its fastest implementation; `_low` and `_high` are what the spread of both (p20, p80) allows. What did
    not run is missing.
    """
    rows = []
    for name, timings in rated.groupby("workload", sort=False):
        for where, ours, fa3, vllm in _COMPARED:
            if (suite := _fastest(timings, "suite", ours)) is None:
                continue
            routes = timings[timings["provider"] == "suite"].set_index("implementation")
            mine = routes.loc[suite.implementation]
            row = {"workload": name, "operation": mine["operation"], "k_and_v": where, "suite": suite.implementation}
            row |= {"suite_us": suite.median, "rate": mine["rate"], "unit": mine["unit"]}
            row |= {"share_of_ceiling": mine["share_of_ceiling"]}
            row |= _against("fa3", _fastest(timings, "flash_attn", fa3), suite)
            rows.append(row | _against("vllm_triton", _fastest(timings, "vllm_triton", vllm), suite))
    return pd.DataFrame(rows, columns=[*_RATIOS, *_against("fa3", None, None), *_against("vllm_triton", None, None)])


def _against(name: str, other: _Times | None, suite: _Times | None) -> dict:
    keys = (f"{name}_us", f"over_{name}", f"over_{name}_low", f"over_{name}_high")
    if other is None:
        return dict.fromkeys(keys)
    numbers = other.median, other.median / suite.median, other.low / suite.high, other.high / suite.low
    return dict(zip(keys, numbers, strict=True))


def comparison(ratios: pd.DataFrame) -> pd.DataFrame:
    """`ratios` as people read it: one line per case and route, spreads behind ratios, a dash where one did not run."""
    shown = readable(ratios)
    return pd.DataFrame(
        {
            "case": shown["workload"],
            "suite": shown["suite"],
            "µs": shown["suite_us"],
            "rate": shown["rate"] + "\u00a0" + shown["unit"],
            "of ceiling": shown["share_of_ceiling"],
            "FA3, µs": shown["fa3_us"],
            "× FA3": shown["over_fa3"],
            "vLLM Triton, µs": shown["vllm_triton_us"],
            "× vLLM Triton": shown["over_vllm_triton"],
        }
    )


def two_step(rated: pd.DataFrame) -> pd.DataFrame:
    """Of each provider that has both: microseconds of gathering first, of attending from the pages, and their ratio."""
    rows = []
    for (name, provider), timings in rated.groupby(["workload", "provider"], sort=False):
        paged = set(timings["implementation"]) - {TWO_STEP, "gather", *CONTIGUOUS}
        steps, fused = _fastest(timings, provider, [TWO_STEP]), _fastest(timings, provider, paged)
        if steps and fused:
            row = {"workload": name, "provider": provider, "fused": fused.implementation, "fused_us": fused.median}
            spread = {"ratio_low": steps.low / fused.high, "ratio_high": steps.high / fused.low}
            rows.append(row | {"two_step_us": steps.median, "ratio": steps.median / fused.median} | spread)
    names = ["workload", "provider", "fused", "fused_us", "two_step_us", "ratio", "ratio_low", "ratio_high"]
    return pd.DataFrame(rows, columns=names)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table for people: three digits, a dash where nothing is, and a number's `_low` and `_high` behind it."""
    shown = {}
    for name in table.columns:
        if name.endswith(("_low", "_high")):
            continue
        shown[name] = [_text(value) for value in table[name]]
        if f"{name}_low" in table:
            spread = zip(table[name], table[f"{name}_low"], table[f"{name}_high"], strict=True)
            shown[name] = [
                "–" if pd.isna(low) else f"{own:.2f} ({low:.2f}{JOINED}–{JOINED}{high:.2f})"
                for own, low, high in spread
            ]
    return pd.DataFrame(shown, dtype=object)


def _text(value) -> str:
    if pd.isna(value):
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def kernels(isa: pd.DataFrame) -> pd.DataFrame:
    """What compiled kernels need, the part that decides; where one could not be compiled, why. The record has all."""
    text = readable(isa)
    instructions = text["matrix_instructions"].str.replace(r"v_(?:mfma|wmma)_f32_", "", regex=True)
    return pd.DataFrame(
        {
            "GPU": text["arch"],
            "case": text["workload"],
            "provider": text["provider"],
            "kernel": text["kernel"].where(isa["reason"].isna(), text["reason"]),
            "VGPRs": text["vgprs"],
            "SGPRs": text["sgprs"],
            "spills": _dashed(isa["vgpr_spills"] + isa["sgpr_spills"]),
            "scratch, B": text["scratch_bytes"],
            "LDS, B": text["lds_bytes"],
            "waves per SIMD": text["waves_per_simd"] + ", " + text["limited_by"],
            "matrix instructions": instructions,
            "128 bit loads": text["load_128bit_share"],
        }
    )


def _dashed(numbers: pd.Series) -> list[str]:
    return [_text(number) for number in numbers]


def bounds(isa: pd.DataFrame) -> pd.DataFrame:
    """The shortest time of each case on each GPU, in microseconds."""
    named = {name: name.split("_")[1].upper() + ", µs" for name in isa.columns if name.startswith("bound_")}
    rows = isa.dropna(subset=list(named)).drop_duplicates("workload")
    return readable(rows[["workload", *named]].rename(columns={"workload": "case"} | named))


def plain(table: pd.DataFrame) -> dict[str, list]:
    """A table as JSON for a record: one list per column, None where a value is missing."""
    return {str(name): json.loads(table[name].to_json(orient="values", double_precision=6)) for name in table.columns}
