# SPDX-License-Identifier: Apache-2.0
"""What the simulation was asked for in this process: the record's evidence of where real code ended."""

from __future__ import annotations

import sys

jit_modules: list[dict] = []  # AITER modules that a machine without prebuilt ones would have compiled, in order
stand_ins: list[str] = []  # compiled-only functions that were replaced and really called or registered

_current_step = "start"


def enter(step: str) -> None:
    """Name what the probe is doing now, so that events can be told apart by when they happened."""
    global _current_step
    _current_step = step


def step() -> str:
    return _current_step


def would_compile(module: str) -> None:
    """Note that AITER asked for a JIT module which this machine does not have prebuilt."""
    if all(entry["module"] != module for entry in jit_modules):
        jit_modules.append({"module": module, "step": _current_step, "requested_by": _requester()})


def stood_in(what: str) -> None:
    """Note that a stand-in for compiled code was used."""
    if what not in stand_ins:
        stand_ins.append(what)


def _requester() -> str | None:
    """The function of AITER's operator layer that needed the module."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("aiter.ops") or name == "aiter.mla":
            return f"{name}.{frame.f_code.co_name}"
        frame = frame.f_back
    return None
