# SPDX-License-Identifier: Apache-2.0
"""Lay the rule of `policy.py` over a regressed vLLM, in every process that vLLM starts, without editing its files.

vLLM calls `plugin` through the entry point group `vllm.general_plugins` in its front end, engine core and workers. It
does nothing unless asked: set `AITERLAB_HOTFIX=1`. On a vLLM without the regression it refuses, says so, and leaves
everything as it is. The parts are those of vllm-project/vllm#33749; part 8 of that pull request is its kernel test,
which lives in `aiterlab.probes.drive`.

Python decides imports once per process, so the patches are laid on at the moment a module is imported, or at once
where that has happened. One thing cannot be undone from here: with the switch on, a regressed operator module has
imported AITER by itself before this plugin runs.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

from aiterlab import policy
from aiterlab.importing import after_import

VARIABLE = "AITERLAB_HOTFIX"
WITHOUT_VARIABLE = "AITERLAB_HOTFIX_WITHOUT"
OPERATORS = "vllm._aiter_ops"
BACKEND = "vllm.v1.attention.backends.rocm_aiter_fa"
FA_UTILS = "vllm.v1.attention.backends.fa_utils"
FLASH_ATTN = "vllm.v1.attention.backends.flash_attn"
EAGLE = "vllm.v1.spec_decode.eagle"

logger = logging.getLogger("vllm.plugins.aiterlab_hotfix")  # below vLLM's own logger, so its handler and level apply
# What happened in this process, for the record.
status: dict = {"wanted": [], "applied": [], "failed": [], "refused": None}


class HotfixRefused(RuntimeError):
    """This vLLM does not need the hotfix, or is not one it fits; the message says which."""


@dataclass(frozen=True)
class Part:
    """One change of the pull request, as a patch on one imported module."""

    number: int
    title: str
    module: str
    patch: Callable[[ModuleType], None]


def plugin() -> None:
    """Apply the hotfix if the user asked for it; the entry point of `vllm.general_plugins`.

    A refusal is logged and not raised: a user who upgrades vLLM and forgets the variable keeps a working server.
    """
    if os.environ.get(VARIABLE, "0").lower() not in ("1", "true"):
        return
    left_out = os.environ.get(WITHOUT_VARIABLE, "")
    try:
        apply(without=[int(number) for number in left_out.split(",") if number])
    except (HotfixRefused, ValueError) as refusal:
        status["refused"] = str(refusal)
        logger.error("aiterlab hotfix not applied: %s", refusal)


def apply(without: Iterable[int] = ()) -> list[int]:
    """Apply the hotfix to the vLLM in this process; return the numbers of the parts, those `without` left out.

    A part whose module has not been imported yet is laid on when it is. A part that does not fit is logged and left
    out, and the process goes on; `status` says which.

    Raises:
        HotfixRefused: the platform is not ROCm, or this vLLM does not have the regression.
        ValueError: there is no such part.
    """
    known = {part.number for part in PARTS}
    if unknown := set(without) - known:
        raise ValueError(f"no such part of the hotfix: {sorted(unknown)}; parts are {sorted(known)}")
    wanted = sorted(known - set(without))
    if status["wanted"]:
        return status["wanted"]
    if reason := why_not_needed():
        raise HotfixRefused(reason)
    for part in PARTS:
        if part.number in wanted:
            after_import(part.module, functools.partial(_lay_on, part))
    status["wanted"] = wanted
    logger.warning("aiterlab hotfix: availability of AITER no longer depends on %s", policy.MAIN_SWITCH)
    return wanted


def _lay_on(part: Part, module: ModuleType) -> None:
    try:
        part.patch(module)
    except Exception as error:
        status["failed"].append(
            {"part": part.number, "module": part.module, "error": f"{type(error).__name__}: {error}"}
        )
        logger.exception("aiterlab hotfix: part %d (%s) does not fit this vLLM", part.number, part.title)
    else:
        status["applied"] = sorted({*status["applied"], part.number})


def why_not_needed() -> str | None:
    """Why the hotfix has no business here, or None if the regression is present; reads source, imports no operator."""
    from vllm.platforms import current_platform

    if not current_platform.is_rocm():
        return f"the platform is {type(current_platform).__name__}, and the regression is ROCm's"
    spec = importlib.util.find_spec(OPERATORS)
    if spec is None or spec.origin is None:
        return f"this vLLM has no {OPERATORS}; it is older than the regression"
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "is_aiter_found_and_supported":
            if any(isinstance(n, ast.Attribute) and n.attr == policy.MAIN_SWITCH for n in ast.walk(node)):
                return None
            return (
                f"is_aiter_found_and_supported() of this vLLM does not read {policy.MAIN_SWITCH}: it does not have the"
                f" regression of vllm-project/vllm#32902; unset {VARIABLE}"
            )
    return f"{OPERATORS} of this vLLM has no is_aiter_found_and_supported(); the hotfix does not fit it"


@functools.cache
def _facts() -> policy.Facts:
    """The facts of this machine, in vLLM's own words; fixed for the life of a process."""
    from vllm.platforms import current_platform
    from vllm.platforms.rocm import on_gfx9

    return policy.Facts(
        rocm=current_platform.is_rocm(),
        library=importlib.util.find_spec("aiter") is not None,
        architecture="this GPU",  # its name would cost an initialised device in vLLM's parent process
        architecture_supported=on_gfx9(),
    )


def _availability(operators: ModuleType) -> None:
    """Part 1: availability no longer reads the switch; what its old answer kept from happening is caught up."""
    available = bool(policy.availability(_facts()))  # a constant, so that torch.compile sees no call

    def is_aiter_found_and_supported() -> bool:
        return available

    _rebind(operators, "is_aiter_found_and_supported", is_aiter_found_and_supported)
    operators.rocm_aiter_ops.register_ops_once()


def _lazy_functions(operators: ModuleType) -> None:
    """Part 2, the operators: two functions that import AITER when they are called, whatever the switch."""

    def flash_attn_varlen_func(*args, **kwargs):
        from aiter import flash_attn_varlen_func

        return flash_attn_varlen_func(*args, **kwargs)

    def pa_fwd_asm(*args, **kwargs):
        from aiter import pa_fwd_asm

        return pa_fwd_asm(*args, **kwargs)

    operators.rocm_aiter_ops.flash_attn_varlen_func = staticmethod(flash_attn_varlen_func)
    operators.rocm_aiter_ops.pa_fwd_asm = staticmethod(pa_fwd_asm)


def _backend_calls_lazy_functions(backend: ModuleType) -> None:
    """Part 2, the backend: its global name `aiter`, bound or not, becomes the lazy functions; no builtin answers."""
    operators = backend.rocm_aiter_ops
    backend.aiter = SimpleNamespace(
        flash_attn_varlen_func=operators.flash_attn_varlen_func, pa_fwd_asm=operators.pa_fwd_asm
    )


def _register_op_before_decode(backend: ModuleType) -> None:
    """Part 3: AITER is imported before a decode step, because importing it is what registers the step's operator."""
    forward = backend.AiterFlashAttentionImpl.forward

    @functools.wraps(forward)
    def forward_with_operator(self, layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs):
        if attn_metadata is not None and attn_metadata.num_decodes > 0:
            import aiter as rocm_aiter  # noqa: F401
        return forward(self, layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)

    backend.AiterFlashAttentionImpl.forward = forward_with_operator


def _shuffled_cache_has_its_own_switch(operators: ModuleType) -> None:
    """Part 4: the layout of the KV cache follows its own switch alone."""
    feature = policy.FEATURES["shuffle_kv_cache"]

    @classmethod
    def is_shuffle_kv_cache_enabled(cls) -> bool:
        switches = {feature.switch: "1" if cls._SHUFFLE_KV_CACHE_ENABLED else "0"}
        return bool(policy.preference(_facts(), switches, feature.name))

    operators.rocm_aiter_ops.is_shuffle_kv_cache_enabled = is_shuffle_kv_cache_enabled


def _one_fp8_dtype(operators: ModuleType) -> None:
    """Part 5: one FP8 dtype, the platform's, under the new name and both old ones."""
    from vllm.platforms import current_platform

    operators.FP8_DTYPE = operators._FP8_DTYPE = operators.AITER_FP8_DTYPE = current_platform.fp8_dtype()


def _names_of_fa_utils(fa_utils: ModuleType) -> None:
    """Part 6: the names that other modules import from fa_utils exist on ROCm, and the check says what was imported."""
    from vllm import _custom_ops

    def get_scheduler_metadata(*args, **kwargs) -> None:
        return None  # a feature of FlashAttention 3, which ROCm does not have

    imported = fa_utils.flash_attn_varlen_func.__module__ != fa_utils.__name__  # else it is the stub that raises

    def is_flash_attn_varlen_func_available() -> bool:
        return imported

    fa_utils.get_scheduler_metadata = get_scheduler_metadata
    fa_utils.reshape_and_cache_flash = _custom_ops.reshape_and_cache_flash
    _rebind(fa_utils, "is_flash_attn_varlen_func_available", is_flash_attn_varlen_func_available)
    if imported and (consumer := sys.modules.get(FLASH_ATTN)) is not None:  # it asked the check when it was imported
        for name in ("flash_attn_varlen_func", "get_scheduler_metadata", "reshape_and_cache_flash"):
            setattr(consumer, name, getattr(fa_utils, name))


def _eagle_allows_metadata(eagle: ModuleType) -> None:
    """Part 7: EAGLE allows AITER's attention metadata whenever the backend module exists."""
    proposer = eagle.SpecDecodeBaseProposer
    construct = proposer.__init__

    @functools.wraps(construct)
    def construct_and_allow(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        if self.allowed_attn_types is not None and importlib.util.find_spec(BACKEND) is not None:
            metadata = importlib.import_module(BACKEND).AiterFlashAttentionMetadata
            if metadata not in self.allowed_attn_types:
                self.allowed_attn_types = (*self.allowed_attn_types, metadata)

    proposer.__init__ = construct_and_allow


def _rebind(module: ModuleType, name: str, new) -> None:
    """Replace a module's function, also where another module of vLLM has imported it by name already."""
    old = getattr(module, name)
    for other in [module, *(m for n, m in list(sys.modules.items()) if n.startswith("vllm."))]:
        if getattr(other, "__dict__", {}).get(name) is old:
            setattr(other, name, new)


PARTS = (
    Part(1, "availability no longer reads the switch", OPERATORS, _availability),
    Part(2, "AITER's functions are imported when called", OPERATORS, _lazy_functions),
    Part(2, "the backend calls these functions", BACKEND, _backend_calls_lazy_functions),
    Part(3, "AITER is imported before the operator it registers", BACKEND, _register_op_before_decode),
    Part(4, "the shuffled KV cache follows its own switch", OPERATORS, _shuffled_cache_has_its_own_switch),
    Part(5, "one FP8 dtype, the platform's", OPERATORS, _one_fp8_dtype),
    Part(6, "fa_utils has its names on ROCm", FA_UTILS, _names_of_fa_utils),
    Part(7, "EAGLE allows AITER's metadata", EAGLE, _eagle_allows_metadata),
)
