# SPDX-License-Identifier: Apache-2.0
"""Turn this process into one that runs on the described machine, before vLLM or AITER is imported."""

from __future__ import annotations

import os
from dataclasses import replace

from aiterlab import importing
from aiterlab.machines import aiter_jit, driver, extensions
from aiterlab.machines.description import ARCHITECTURES, ENVIRONMENT_VARIABLE, Machine

_installed: Machine | None = None


def install(machine: Machine, interpret: bool = True) -> None:
    """Simulate `machine` in this process.

    Args:
        interpret: run Triton kernels in Triton's interpreter; False: they can be compiled for the machine, not run.

    Raises:
        RuntimeError: other hardware has been installed in this process already. A process has one, because imports
            decide things once; the switches are the environment's, which may change.
    """
    global _installed
    machine = replace(machine, switches={})
    if _installed is not None:
        if _installed != machine:
            raise RuntimeError(f"this process already runs on {_installed.to_json()}")
        return
    _installed = machine
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # there is no GPU that could run a compiled kernel
    driver.install(ARCHITECTURES[machine.arch])
    extensions.install(flash_attn=machine.flash_attn)
    if machine.aiter:
        aiter_jit.install()
    importing.hide(
        *(name for name, present in (("aiter", machine.aiter), ("flash_attn", machine.flash_attn)) if not present)
    )


def install_from_environment() -> None:
    """Simulate the machine that the environment variable AITERLAB_MACHINE describes."""
    install(Machine.from_json(os.environ[ENVIRONMENT_VARIABLE]))
