# SPDX-License-Identifier: Apache-2.0
"""Small records of the other notebooks, as those leave them, for the tests of the answer's page."""

import json
from itertools import product
from pathlib import Path

from aiterlab.answer.sources import EAGLE, FIX, KERNELS, REPRODUCE

PROVENANCE = {"utc": "2026-01-02T03:04:05+00:00", "git_commit": "c0ffee0123456789", "git_dirty": False}
GPU = {"device_name": "NVIDIA H200", "device_kind": "gpu"}
CPU = {"device_name": "AMD EPYC", "device_kind": "cpu"}
TREES = {REPRODUCE: ("release:0.15.1", "regressed", "release:0.16.0"), FIX: ("regressed", "hotfixed", "release:0.16.0")}


def columns(rows: list[dict]) -> dict[str, list]:
    """Rows as a record holds a table: one list per column."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def cells(stem: str) -> dict:
    """01's or 02's: in `regressed`, who asks for AITER by name with the switch off is trapped."""
    rows = [
        {"tree": tree, "arch": arch, "aiter": "present", "switch": switch, "selection": selection}
        | {"verdict": "builtin trap" if (tree, switch, selection) == ("regressed", "0", "ROCM_AITER_FA") else "works"}
        for tree, arch, switch, selection in product(
            TREES[stem], ("gfx942", "gfx950"), ("0", "1"), ("auto", "ROCM_AITER_FA")
        )
    ]
    return {"stem": stem, "machine_simulated": True, "cells": columns(rows), "provenance": PROVENANCE}


def kernels(card: dict = GPU) -> dict:
    """04's: two workloads; the suite reads them in 10 µs, FA3 in 12, vLLM's Triton kernel in 40."""
    checks, timings = [], []
    for (workload, operation), (provider, name, share, median_us) in product(
        [("decode_1x8k", "decode"), ("prefill_2x8k", "prefill")],
        [
            ("suite", "paged", 0.4, 10.0),
            ("suite", "gather+varlen", 0.3, 5.0),
            ("flash_attn", "fa3", 0.3, 12.0),
            ("vllm_triton", "unified", 0.2, 40.0),
        ],
    ):
        row = {"workload": workload, "operation": operation, "dtype": "bfloat16", "provider": provider}
        row |= {"implementation": name}
        checks.append(row | {"outcome": "ok", "error_over_tolerance": share})
        spread = {"median_us": median_us, "p20_us": 0.9 * median_us, "p80_us": 1.1 * median_us}
        timings.append(row | spread | {"bytes_moved": 30_000_000, "flops": 5_000_000_000})
    providers = [{"provider": "suite", "runs": True, "reason": ""}]
    providers.append({"provider": "aiter", "runs": False, "reason": "the platform is not ROCm"})
    ceilings = [{"name": "copy", "unit": "TB/s", "rate": 4.0, "work": 4e9, "samples_us": [1000.0]}]
    ceilings.append({"name": "matmul_bfloat16", "unit": "TFLOP/s", "rate": 800.0, "work": 8e11, "samples_us": [1000.0]})
    record = {"checks": columns(checks), "timings": columns(timings), "providers": columns(providers)}
    return {"stem": KERNELS, "card": card, **record, "ceilings": ceilings, "provenance": PROVENANCE}


def timed(group: str, method: str, k: int, backend: str | None, step_ms: float, context: int = 128) -> list[dict]:
    """Two rounds of one engine, as `latency.measure` writes them."""
    rates = [0.8, 0.6, 0.4, 0.2][:k] or None
    per_step = 1 + sum(rates or ())
    row = {"group": group, "engine": f"{method} K={k} {backend}", "method": method, "K": k, "backend": backend}
    row |= {"batch": 1, "context": context, "acceptance": "measured" if k else None, "assumed_rates": None}
    row |= {"reason": None, "marked": False, "tokens": 64, "step_ms": step_ms, "step_p20_ms": step_ms}
    row |= {"step_p80_ms": step_ms, "tokens_per_step": per_step, "rates": rates}
    row |= dict.fromkeys(("decode_tok_s", "steady_tok_s"), per_step / step_ms * 1e3)
    row |= dict.fromkeys(("draft_ms", "verify_ms", "sample_ms", "host_ms"))
    return [row | {"round": turn} for turn in range(2)]


def eagle(card: dict = GPU) -> dict:
    """05's: with K = 2 a step gives 2.4 tokens in the time of 1.2 steps, 2 times vanilla's speed."""
    score = {"task": "aiterlab_arithmetic", "metric": "exact_match", "stderr": 0.02, "samples": 50}
    scores = [
        score
        | {"engine": " ".join(filter(None, (name, backend))), "method": name.split()[0], "draft_tokens": k}
        | {"backend": backend, "value": value, "filter": filtered, "shots": shots}
        for backend in (None, "SUITE_PAGED")
        for shots in (0, 5)
        for name, k, value in (("vanilla", 0, 0.95), ("eagle3 K=2", 2, 0.94))
        for filtered in ("flexible-extract", "strict-match")
    ]
    rounds = timed("models", "vanilla", 0, None, 1.0) + timed("models", "eagle3", 1, None, 1.1)
    rounds += timed("models", "eagle3", 2, None, 1.2)
    rounds += timed("K = 2", "vanilla", 0, "FLASH_ATTN", 5.0) + timed("K = 2", "eagle3", 2, "FLASH_ATTN", 6.0)
    for backend, step_ms in (("TRITON_ATTN", 48.0), ("SUITE_PAGED", 6.0)):
        rounds += timed("backends", "eagle3", 2, backend, step_ms, context=32768)
    drafted = {"group": "models", "method": "eagle3", "draft_tokens": 2, "temperature": 0.0, "drafts": 100}
    accepted = [drafted | {"task": task, "rates": [0.8, 0.6]} for task in ("code", "prose")]
    greedy = [{"engine": "eagle3 K=2", "compared_tokens": 1000, "near_ties": 1, "different": 0}]
    record = {"scores": scores, "timed": rounds, "accepted": accepted, "greedy": greedy, "provenance": PROVENANCE}
    return {"stem": EAGLE, "card": card, **record}


def write(folder: Path, record: dict) -> Path:
    """Put a record where a run of its notebook would."""
    path = folder / record["stem"] / "record.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def write_all(folder: Path, card: dict = GPU) -> Path:
    """Put all four records into a folder."""
    for record in (cells(REPRODUCE), cells(FIX), kernels(card), eagle(card)):
        write(folder, record)
    return folder
