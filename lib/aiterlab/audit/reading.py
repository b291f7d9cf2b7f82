# SPDX-License-Identifier: Apache-2.0
"""What one row of answers says, in the words of the policy: which backend, refused with a reason, or fallen over."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum

from aiterlab.policy import MAIN_SWITCH
from aiterlab.probes.layer import Layer

BACKEND_VARIABLE = "VLLM_ATTENTION_BACKEND"  # older releases take the explicit choice from it, newer ones ignore it
LAYER = ("kind", "role", "head_size", "dtype", "kv_cache_dtype", "block_size")
MACHINE = ("arch", "aiter", "flash_attn", "switch", "others")
FACTORS = (*MACHINE, "selection", *LAYER)


class Ending(StrEnum):
    """How the selection of one cell ended."""

    CHOSEN = "chosen"
    REFUSED = "refused"  # vLLM raised it on purpose, with a reason
    FELL = "fell"  # any other exception: nobody had thought of this case


def ending(row: dict) -> Ending:
    """How the selection ended; the row must be answered.

    A choice after which a library failed, such as AITER on a GPU that it does not know, counts as made: that vLLM took
    this backend is what the policy is about.
    """
    selection = row["facts"]["selection"]
    if selection["outcome"] != "error" or (selection["raised_in"] != "vllm" and selection.get("chose")):
        return Ending.CHOSEN
    return Ending.REFUSED if _on_purpose(selection) else Ending.FELL


def _on_purpose(error: dict) -> bool:
    """A `raise` or an `assert` with a text that stands in vLLM, or a field that its configuration does not accept."""
    if error["type"] == "ValidationError":
        return True
    if error["raised_in"] != "vllm" or not error["message"] or is_import_error(error):
        return False
    return (error["raised_at"] or {}).get("source", "").startswith(("raise ", "assert "))


def is_import_error(error: dict) -> bool:
    return error["type"] in ("ImportError", "ModuleNotFoundError")


def answered(row: dict) -> bool:
    """Whether the row says anything about its tree."""
    return why_unanswered(row) is None


def why_unanswered(row: dict) -> str | None:
    """Why the row says nothing.

    An accident before the platform was asked tells nothing about its selection; nor does one in a library that wants a
    real GPU, or that does not know the described one.
    """
    if row["no_answer_reason"] is not None:
        return row["no_answer_reason"]
    selection = row["facts"].get("selection")
    if selection is None:
        return "the probe ended without an answer"
    if ending(row) is Ending.FELL and selection.get("asked_with", ...) is None:
        return f"no backend was chosen yet: {reason(row)}"
    if ending(row) is Ending.FELL and selection["raised_in"] != "vllm":
        return f"{selection['raised_in']} cannot answer on this machine: {reason(row)}"
    return None


def chosen(row: dict) -> str | None:
    """The backend that was chosen for the layer; None if none was."""
    if ending(row) is not Ending.CHOSEN:
        return None
    selection = row["facts"]["selection"]
    return selection.get("backend") or selection["chose"]


def names_of_chosen(row: dict) -> set[str]:
    """Every name under which vLLM's registry has the chosen class: an alias is no replacement."""
    return {chosen(row), *(row["facts"]["selection"].get("backend_names") or ())}


def reason(row: dict) -> str:
    """The exception that ended the selection, in one line."""
    error = row["facts"]["selection"]
    message = textwrap.shorten(error["message"], 160, placeholder=" …")
    return f"{error['type']}: {message}" if message else error["type"]


def others(row: dict) -> tuple[tuple[str, str], ...]:
    """The environment variables beside the main switch."""
    return tuple(sorted((name, value) for name, value in row["switches"].items() if name != MAIN_SWITCH))


def is_explicit(row: dict) -> bool:
    return row["selection"] != "auto"


def is_auto(row: dict) -> bool:
    """Nobody asked for a backend, in the configuration or by the variable of older releases."""
    return not is_explicit(row) and BACKEND_VARIABLE not in row["switches"]


def needs_aiter(backend: str | None) -> bool:
    """vLLM names every backend that computes with AITER after it."""
    return "AITER" in (backend or "")


def place(row: dict) -> dict:
    """The row's coordinates, except its tree."""
    return {name: others(row) if name == "others" else row[name] for name in FACTORS}


def plain_layer(row: dict) -> bool:
    """Whether a layer of this kind has the usual sizes and types."""
    return not unusual(row)


def unusual(row: dict) -> list[str]:
    """What distinguishes the row's layer from the usual one of its kind."""
    usual = Layer(kind=row["kind"])
    return [name for name in LAYER if row[name] != getattr(usual, name)]


def weight(row: dict) -> tuple:
    """How much a cell differs from the plainest one; the smallest example of a violation has the least."""
    strange = len(unusual(row)) + (row["kind"] != Layer().kind)
    return (len(others(row)), strange, row["arch"] != "gfx942", row["aiter"] == "absent", row["switch"] != "unset")


def contrasts(rows: Iterable[dict], factor: str) -> Iterator[list[dict]]:
    """Groups of answered rows that differ in one factor and in nothing else."""
    for group in _grouped(rows, lambda row: {**place(row), factor: None}):
        if len({place(row)[factor] for row in group}) > 1:
            yield group


def _grouped(rows: Iterable[dict], key: Callable[[dict], dict]) -> Iterator[list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(key(row).items()), []).append(row)
    return iter(groups.values())


def available(row: dict) -> bool | None:
    """Whether the tree says that AITER can be used; None where it has no such function."""
    policy = row["facts"].get("policy", {})
    said = [policy.get("available"), *(policy.get("available_by") or {}).values()]
    said = [answer for answer in said if answer is not None]
    return any(said) if said else None


def supported(rows: Sequence[dict]) -> dict[str, bool]:
    """Per architecture whether the tree counts it as supported, asked where AITER is installed.

    The answer with the main switch on counts: where availability is bound to the switch by mistake, that is another
    violation. A tree without a function for availability says it by what the switch turns on; an architecture on which
    the tree says neither is left out.
    """
    found: dict[str, bool] = {}
    for row in rows:
        said = available(row)
        if said is None and row["switch"] == "1":
            said = row["facts"].get("policy", {}).get("enabled")
        if row["aiter"] != "absent" and said is not None and (said or row["switch"] == "1"):
            found[row["arch"]] = found.get(row["arch"], False) or said
    return found
