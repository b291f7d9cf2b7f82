# SPDX-License-Identifier: Apache-2.0
"""Which workloads does one study take? Those of the machine, or any that a name can say."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from aiterlab.attention import workloads
from aiterlab.attention.providers.place import Place
from aiterlab.attention.workloads import OPERATIONS, Workload

DTYPES = {True: ("float16", "bfloat16"), False: ("bfloat16", "float16")}  # by whether Triton interprets
SWEEPS = ("auto", "tiny", "small", "large", "none")
_NAME = re.compile(
    r"(?P<operation>[a-z]+)(?:_q(?P<new>\d+))?_(?P<count>\d+)x(?P<length>\d+)(?P<k>k?)(?:_(?P<variant>\w+))?"
)
_VARIANTS = {
    "": {},
    "fp8": {"kv_dtype": "float8_e4m3fn"},
    "int8": {"kv_dtype": "int8", "scales": "token_head"},
    "shuffle": {"layout": "SHUFFLE"},
    **{f"page{size}": {"page_size": size} for size in (32, 64, 128)},
}


def select(
    place: Place, operations: Sequence[str], names: Sequence[str], shape: Mapping[str, int]
) -> tuple[Workload, ...]:
    """The workloads of a study.

    Args:
        operations: all cases of these, of the size that the place can bear, where there are no names
        names: of cases, or such as verify_q4_16x4k_page64: 16 sequences of 4096 keys, of which 4 are new
        shape: heads, kv_heads, head_size or page_size other than the case's own

    Raises:
        ValueError: no such operation, case or field.
    """
    if wrong := set(operations) - set(OPERATIONS):
        raise ValueError(f"no operation {', '.join(sorted(wrong))}; there are {', '.join(OPERATIONS)}")
    if wrong := set(shape) - {"heads", "kv_heads", "head_size", "page_size"}:
        raise ValueError(f"a shape has heads, kv_heads, head_size and page_size, not {', '.join(sorted(wrong))}")
    known = workloads.CPU_CASES if place.interpreted else workloads.CASES
    chosen = [parse(name) for name in names] or [w for w in known.values() if w.operation in operations]
    if not chosen:
        raise ValueError("neither an operation nor a case is asked for")
    return tuple(dataclasses.replace(w, **shape) for w in chosen)


def parse(name: str) -> Workload:
    """The workload that a name says: one of the cases, else of their shape (32 / 8 heads of 128, pages of 16)."""
    if found := workloads.CASES.get(name) or workloads.CPU_CASES.get(name):
        return found
    said = _NAME.fullmatch(name)
    operation = said and said["operation"]
    if operation not in OPERATIONS or (said["variant"] or "") not in _VARIANTS:
        raise ValueError(
            f"no case {name!r}; write it as verify_q4_16x4k, variants: {', '.join(filter(None, _VARIANTS))}"
        )
    if (operation in ("verify", "extend")) != (said["new"] is not None):
        raise ValueError(f"case {name!r}: verify and extend say their new tokens as in {operation}_q4_…, others do not")
    length = int(said["length"]) * (1024 if said["k"] else 1)
    new = {"prefill": length, "decode": 1, "gather": 0}.get(operation) if said["new"] is None else int(said["new"])
    context = length if operation in ("extend", "gather") else length - new  # extend: on top of what is cached
    if context < 0:
        raise ValueError(f"case {name!r}: {new} new tokens do not fit into {length}")
    return Workload(name, operation, ((context, new),) * int(said["count"]), **_VARIANTS[said["variant"] or ""])


def sweep(place: Place, size: str) -> tuple[Workload, ...]:
    """The workloads among which every pair of settings occurs.

    Args:
        size: auto: what the place can bear, small in Triton's interpreter and large on a GPU; tiny: every sixth of
            the small ones; none: no workload

    Raises:
        ValueError: no such size.
    """
    if size not in SWEEPS:
        raise ValueError(f"no sweep {size!r}; there are {', '.join(SWEEPS)}")
    if size == "none":
        return ()
    if size == "tiny":
        return workloads.sweep("small")[::6]
    return workloads.sweep(("small" if place.interpreted else "large") if size == "auto" else size)


def dtypes(place: Place, asked: Sequence[str]) -> list[str]:
    """The dtypes of a study, the timed one first: bf16 on a GPU, and what Triton's interpreter gets right on a CPU."""
    return list(asked or DTYPES[place.interpreted])
