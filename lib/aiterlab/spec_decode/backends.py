# SPDX-License-Identifier: Apache-2.0
"""Which attention backends can an engine be told to use on this machine, and which one did it really use?

Every row names its backend; none is left to vLLM's own choice, which on ROCm follows switches that this project shows
to be confused. Whether AITER's backends are available is `policy`'s answer, which reads no switch: the main switch is
therefore varied as a row of its own, and must not change what an explicit choice gives.

Draft and target are told apart: vLLM 0.20 hands the target's backend to the draft, later versions let the draft choose
by itself unless it is told.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from aiterlab import policy
from aiterlab.attention.providers import place
from aiterlab.policy import MAIN_SWITCH, Answer
from aiterlab.spec_decode.engine import SUITE_PAGED

_AITER_FA = "ROCM_AITER_FA"
_SHUFFLE = policy.FEATURES["shuffle_kv_cache"].switch
# Names of the classes behind vLLM's names.
CLASSES = {
    "FLASH_ATTN": "FlashAttentionBackend",
    "TRITON_ATTN": "TritonAttentionBackend",
    SUITE_PAGED: "SuitePagedBackend",
    _AITER_FA: "AiterFlashAttentionBackend",
    "ROCM_AITER_UNIFIED_ATTN": "RocmAiterUnifiedAttentionBackend",
    "ROCM_ATTN": "RocmAttentionBackend",
    None: "CPUAttentionBackend",
}


@dataclass(frozen=True)
class Choice:
    """One row of the comparison: a backend asked for by name, and the variables it is asked for with."""

    label: str
    backend: str | None  # EngineSpec.backend; None: the engine's own, on a CPU
    available: Answer
    environment: tuple[tuple[str, str], ...] = ()  # variables that are set; the others of `varied` are taken away

    @property
    def expected_class(self) -> str:
        """Name of the class that must then compute."""
        return CLASSES[self.backend]


@dataclass(frozen=True)
class Used:
    """What an engine said of itself once it was up, or why it is not."""

    target: tuple[str, ...] = ()
    draft: tuple[str, ...] = ()
    agrees: bool | None = None  # outputs are those of the first row
    failure: str | None = field(default=None, kw_only=True)


# Variables that tell rows apart. An engine must not inherit them.
VARIED = (MAIN_SWITCH, _SHUFFLE)


def candidates(
    platform: str, *, aiter: Answer | None = None, flash_attention: Answer | None = None
) -> tuple[Choice, ...]:
    """Backends to compare on a platform ("cpu", "cuda" or "rocm"), the available and the others.

    Args:
        aiter, flash_attention: whether these libraries can be used here; asked of the machine where not given

    Raises:
        ValueError: no such platform.
    """
    if platform == "cpu":
        own = Answer(True, "the only backend of vLLM's CPU engine")
        return (Choice("CPU_ATTN", None, own),)
    triton = Answer(True, "Triton kernels, on every GPU")
    suite = Choice(SUITE_PAGED, SUITE_PAGED, Answer(True, "this suite's Triton kernel, on every GPU"))
    if platform == "cuda":
        flash_attention = _flash_attention() if flash_attention is None else flash_attention  # an Answer may be false
        return (
            Choice("FLASH_ATTN", "FLASH_ATTN", flash_attention),
            Choice("TRITON_ATTN", "TRITON_ATTN", triton),
            suite,
        )
    if platform != "rocm":
        raise ValueError(f"platform {platform!r} is not one of cpu, cuda, rocm")
    aiter = _aiter() if aiter is None else aiter
    return (
        Choice("TRITON_ATTN", "TRITON_ATTN", triton),
        Choice("ROCM_ATTN", "ROCM_ATTN", Answer(True, "part of vLLM for ROCm")),
        Choice(f"{_AITER_FA}, switch unset", _AITER_FA, aiter),
        Choice(f"{_AITER_FA}, switch 0", _AITER_FA, aiter, ((MAIN_SWITCH, "0"),)),
        Choice(f"{_AITER_FA}, switch 1", _AITER_FA, aiter, ((MAIN_SWITCH, "1"),)),
        Choice(f"{_AITER_FA}, shuffled cache", _AITER_FA, aiter, ((MAIN_SWITCH, "1"), (_SHUFFLE, "1"))),
        Choice("ROCM_AITER_UNIFIED_ATTN", "ROCM_AITER_UNIFIED_ATTN", aiter),
        suite,
    )


def here() -> tuple[Choice, ...]:
    """Backends to compare on this machine."""
    return candidates(place.native().platform)


def inherited(environment: Mapping[str, str] | None = None) -> list[str]:
    """Name the varied variables that this process would hand to its engines: they would blur the rows."""
    return [name for name in VARIED if name in (os.environ if environment is None else environment)]


def table(choices: Sequence[Choice], used: Mapping[str, Used]) -> pd.DataFrame:
    """One row per choice: requested, available (with the reason), really used by target and draft, outputs agree.

    Args:
        used: by label; choices that were not run are not in it
    """
    return pd.DataFrame([_row(choice, used.get(choice.label)) for choice in choices])


def _row(choice: Choice, used: Used | None) -> dict:
    target, draft = (used.target, used.draft) if used else ((), ())
    as_requested = None
    if target:
        as_requested = set(target) | set(draft) == {choice.expected_class}
    return {
        "requested": choice.label,
        "environment": " ".join(f"{name}={value}" for name, value in choice.environment),
        "available": choice.available.holds,
        "reason": (used.failure if used else None) or choice.available.reason,
        "target": ", ".join(target) or None,
        "draft": ", ".join(draft) or None,
        "as_requested": as_requested,
        "outputs_agree": used.agrees if used else None,
    }


def _aiter() -> Answer:
    from aiterlab.attention.providers import aiter_compiled

    return policy.availability(aiter_compiled.facts())


def _flash_attention() -> Answer:
    from aiterlab.attention.providers.selection import PROVIDERS

    return PROVIDERS["flash_attn"].candidate(os.environ).available
