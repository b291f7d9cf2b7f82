# SPDX-License-Identifier: Apache-2.0
"""Turn this process into one that runs on the described machine, before vLLM or AITER is imported."""

from __future__ import annotations

import os
from dataclasses import replace

from aiterlab import importing
from aiterlab.machines import aiter_jit, driver, extensions, interpreter
from aiterlab.machines.description import ARCHITECTURES, ENVIRONMENT_VARIABLE, Machine

_installed: Machine | None = None  # but for the switches, which may change, and AITER
_aiter: bool | None = None  # None: it is open whether AITER is installed; what is imported meanwhile must not ask


def install(machine: Machine, interpret: bool = True) -> None:
    """Simulate `machine` in this process.

    Args:
        interpret: run Triton kernels in Triton's interpreter; False: they can be compiled for the machine, not run.

    Raises:
        RuntimeError: other hardware has been installed in this process already. A process has one, because imports
            decide things once; the switches are the environment's, which may change.
    """
    install_gpu(machine, interpret)
    install_aiter(machine.aiter)


def install_gpu(machine: Machine, interpret: bool = True) -> None:
    """Simulate all of `machine` but AITER, which is to follow."""
    global _installed
    machine = replace(machine, switches={}, aiter=None)
    if _installed is not None:
        if _installed != machine:
            raise RuntimeError(f"this process already runs on {_installed.to_json()}")
        return
    _installed = machine
    if interpret:
        interpreter.choose()  # there is no GPU that could run a compiled kernel
    driver.install(ARCHITECTURES[machine.arch])
    extensions.install(flash_attn=machine.flash_attn)
    if not machine.flash_attn:
        importing.hide("flash_attn")


def install_aiter(present: bool) -> None:
    """Let this process find AITER, with a stand-in for its compiled half, or not find it."""
    global _aiter
    if _aiter is not None:
        if _aiter != present:
            raise RuntimeError(f"AITER is {'present' if _aiter else 'absent'} in this process already")
        return
    _aiter = present
    if present:
        aiter_jit.install()
    else:
        importing.hide("aiter")


def install_from_environment() -> None:
    """Simulate the machine that the environment variable AITERLAB_MACHINE describes."""
    machine = Machine.from_json(os.environ[ENVIRONMENT_VARIABLE])
    (install if _installed is None else install_gpu)(machine)
