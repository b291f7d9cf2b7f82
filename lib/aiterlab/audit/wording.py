# SPDX-License-Identifier: Apache-2.0
"""Where something was seen, in words, and the command that shows it again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from aiterlab.audit import reading
from aiterlab.policy import MAIN_SWITCH
from aiterlab.probes.layer import Layer

PROGRAM = "python -m aiterlab audit"
_OPTIONS = {
    "arch": "--arch", "aiter": "--aiter", "switch": "--switch", "selection": "--explicit", "kind": "--kind",
    "role": "--role", "head_size": "--head-size", "dtype": "--dtype", "kv_cache_dtype": "--kv-cache-dtype",
    "block_size": "--block-size",
}  # fmt: skip
_WORDS = {
    "arch": "on {}",
    "aiter": "AITER {}",
    "switch": f"{MAIN_SWITCH} {{}}",
    "selection": "asked for {}",
    "kind": "{} layer",
    "role": "{}",
    "head_size": "head size {}",
    "dtype": "{}",
    "kv_cache_dtype": "KV cache {}",
    "block_size": "block size {}",
}


def command(rows: Sequence[dict]) -> str:
    """One command line that asks exactly these cells again and judges them.

    Args:
        rows: one row, or several of one tree that differ in a single factor.
    """
    first = rows[0]
    words = ["--tree", first["tree"]]
    for factor, option in _OPTIONS.items():
        values = _values(rows, factor)
        if not values:
            continue
        words += [option, ",".join("vllm" if value is None else str(value) for value in values)]
    for name, value in reading.others(first):
        words += ["--set", f"{name}={value}"]
    return f"{PROGRAM} {shlex.join(words)}"


def where(rows: Sequence[dict]) -> str:
    """The cells in which something was seen, as one phrase: what they have in common, and between what they vary."""
    parts = []
    for factor, phrase in _WORDS.items():
        values = _values(rows, factor)
        if not values or (factor == "selection" and values == ["auto"]):
            continue
        if len(values) > 4:
            parts.append(phrase.format(f"{len(values)} values"))
        else:
            parts.append(phrase.format(listed(["left to vLLM" if value is None else value for value in values])))
    settings = list(dict.fromkeys(f"{name}={value}" for row in rows for name, value in reading.others(row)))
    if all(reading.others(row) for row in rows) and len(settings) <= 4:
        parts.append(f"with {listed(settings)}")
    return f"{'; '.join(parts)}; {counted(len(rows), 'cell')}"


def _values(rows: Sequence[dict], factor: str) -> list:
    """What the factor is in these rows; nothing if it is what a layer of that kind has anyway."""
    told = factor not in reading.LAYER or any(row[factor] != getattr(_usual(row, factor), factor) for row in rows)
    return list(dict.fromkeys(row[factor] for row in rows)) if told else []


def _usual(row: dict, factor: str) -> Layer:
    return Layer() if factor == "kind" else Layer(kind=row["kind"])


def listed(values: Sequence, last: str = "and") -> str:
    """Words joined as in a sentence."""
    words = [str(value) for value in values]
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the singular for one."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
