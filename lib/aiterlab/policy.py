# SPDX-License-Identifier: Apache-2.0
"""The rule that vLLM's AITER regression broke, as pure functions over plain facts. This module is the fix.

Three questions that must not be answered by one another:

    availability   CAN it be used here?     ROCm platform, library installed, architecture supported
    preference     SHOULD it be the default? availability, and the user's switch is on
    selection      WHAT is used in the end?  an explicit choice that is available, else the first that is preferred

For AITER with its main switch `VLLM_ROCM_USE_AITER`, on a ROCm GPU of a supported architecture:

    library    switch   available   preferred   explicit choice of AITER   auto-selection
    absent     any      no          no          refused, with the reason   another backend
    installed  off      yes         no          AITER                      another backend
    installed  on       yes         yes         AITER                      AITER

The regression answered "available" with the column "preferred". Nothing here reads the environment, imports a library
or looks at a device: the caller states the facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MAIN_SWITCH = "VLLM_ROCM_USE_AITER"


@dataclass(frozen=True)
class Answer:
    """Yes or no with its reason; true or false in a condition."""

    holds: bool
    reason: str

    def __bool__(self) -> bool:
        return self.holds


@dataclass(frozen=True)
class Facts:
    """What is true of the machine, whatever the user prefers."""

    rocm: bool  # the platform is ROCm
    library: bool  # the library can be found by the import system
    architecture: str  # the GPU's name, such as gfx942; for the reason only
    architecture_supported: bool  # the library has kernels for it


@dataclass(frozen=True)
class Feature:
    """A part of AITER with a sub-switch of its own."""

    name: str  # as in vLLM's `is_<name>_enabled()`
    switch: str
    default: bool  # the position of the sub-switch when it is not set
    needs_main_switch: bool = True


# vLLM's sub-switches and their defaults (vllm/envs.py, releases 0.15 and 0.16). The layout of the KV cache is not an
# optimisation that the main switch turns on: it belongs to an explicitly chosen backend and follows its own switch.
FEATURES = {
    feature.name: feature
    for feature in (
        Feature("linear", "VLLM_ROCM_USE_AITER_LINEAR", True),
        Feature("rmsnorm", "VLLM_ROCM_USE_AITER_RMSNORM", True),
        Feature("fused_moe", "VLLM_ROCM_USE_AITER_MOE", True),
        Feature("mla", "VLLM_ROCM_USE_AITER_MLA", True),
        Feature("mha", "VLLM_ROCM_USE_AITER_MHA", True),
        Feature("triton_unified_attn", "VLLM_ROCM_USE_AITER_UNIFIED_ATTENTION", False),
        Feature("fp8bmm", "VLLM_ROCM_USE_AITER_FP8BMM", True),
        Feature("fp4bmm", "VLLM_ROCM_USE_AITER_FP4BMM", True),
        Feature("asm_fp4_gemm_dynamic_quant", "VLLM_ROCM_USE_AITER_FP4_ASM_GEMM", False),
        Feature("triton_rotary_embed", "VLLM_ROCM_USE_AITER_TRITON_ROPE", False),
        Feature("triton_gemm", "VLLM_ROCM_USE_AITER_TRITON_GEMM", True),
        Feature("shuffle_kv_cache", "VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT", False, needs_main_switch=False),
    )
}


def is_on(switches: Mapping[str, str], name: str, default: bool = False) -> bool:
    """Read one switch as vLLM does: unset is the default, "1" and "true" (any case) are on, all else is off.

    Args:
        switches: names and values of the environment variables that are set.
    """
    value = switches.get(name)
    return default if value is None else value.lower() in ("1", "true")


def availability(facts: Facts) -> Answer:
    """Can the library be used on this machine? Takes no switches, so it cannot depend on one."""
    if not facts.rocm:
        return Answer(False, "the platform is not ROCm")
    if not facts.library:
        return Answer(False, "the library is not installed")
    if not facts.architecture_supported:
        return Answer(False, f"the library has no kernels for {facts.architecture}")
    return Answer(True, f"installed and supported on {facts.architecture}")


def preference(facts: Facts, switches: Mapping[str, str], feature: str | None = None) -> Answer:
    """Should the library, or one feature of it, be used by default?

    Raises:
        KeyError: no such feature.
    """
    if not (available := availability(facts)):
        return available
    asked = FEATURES[feature] if feature else None
    if (asked is None or asked.needs_main_switch) and not is_on(switches, MAIN_SWITCH):
        return Answer(False, f"{MAIN_SWITCH} is off")
    if asked and not is_on(switches, asked.switch, asked.default):
        return Answer(False, f"{asked.switch} is off")
    return Answer(True, "available and switched on")


@dataclass(frozen=True)
class Candidate:
    """One thing that could be chosen, with both answers about it.

    Raises:
        ValueError: preferred without being available, which is a contradiction.
    """

    name: str
    available: Answer
    preferred: Answer

    def __post_init__(self) -> None:
        if self.preferred and not self.available:
            raise ValueError(f"{self.name} is preferred but not available: {self.available.reason}")


@dataclass(frozen=True)
class Selection:
    """What is used, how it came to be, and why each other candidate is not."""

    chosen: str | None
    how: str  # "explicit", "preferred" or "refused"
    reasons: Mapping[str, str]  # candidate -> why it was chosen or passed over


def selection(candidates: Sequence[Candidate], explicit: str | None = None) -> Selection:
    """Choose among candidates, the most preferred first.

    An explicit choice wins over every preference and needs availability alone; it is never replaced by another
    candidate. Without one, the first preferred candidate is taken.

    Raises:
        KeyError: the explicit choice is not among the candidates.
    """
    by_name = {candidate.name: candidate for candidate in candidates}
    if explicit is not None:
        available = by_name[explicit].available
        reasons = {name: f"{explicit} was asked for" for name in by_name if name != explicit}
        return Selection(
            explicit if available else None,
            "explicit" if available else "refused",
            reasons | {explicit: available.reason},
        )
    chosen = next((candidate.name for candidate in candidates if candidate.preferred), None)
    reasons = {
        candidate.name: f"{chosen} comes first"
        if candidate.preferred and candidate.name != chosen
        else candidate.preferred.reason
        for candidate in candidates
    }
    return Selection(chosen, "preferred" if chosen else "refused", reasons)
