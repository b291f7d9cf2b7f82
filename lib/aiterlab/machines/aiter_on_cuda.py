# SPDX-License-Identifier: Apache-2.0
"""How do AITER's Triton kernels run on an NVIDIA GPU, for which AITER was not written?

Triton is portable, AITER's Python around it is not. Five things stand between them:

    1. at import AITER asks `rocminfo` and `hipconfig`          -> the simulated machine's command line tools answer
    2. it compiles or imports modules built for ROCm            -> stand-ins; their functions refuse to be called
    3. its kernels look up tuning tables by architecture        -> gfx942's tables, which AITER ships for MI300X
    4. launches carry options that only Triton's AMD side knows -> dropped, they tune and change no result
    5. its C++ templates (`aiter_meta/csrc`) are read at import -> an installed wheel has them; nothing to do here

The kernels are AITER's own and run natively on the GPU. Their tuning is for another one, and the ledger says all this
in every record. Nothing happens unless a process calls `install`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from types import ModuleType

from aiterlab import importing
from aiterlab.machines import aiter_jit, driver, ledger
from aiterlab.machines.description import ARCHITECTURES

TUNED_FOR = "gfx942"
_ARCHITECTURE_LOOKUPS = (  # modules with a `get_arch` that asks Triton's driver
    "aiter.ops.triton.utils._triton.arch_info",
    "aiter.ops.triton._triton_kernels.flash_attn_triton_amd.utils",
)
_installed = False


def installed() -> bool:
    """Did this process ask for it?"""
    return _installed


def install() -> None:
    """Make AITER importable in this process, which has an NVIDIA GPU, and its Triton kernels launchable.

    Raises:
        RuntimeError: AITER has been imported already, or the GPU is not NVIDIA's.
    """
    global _installed
    if _installed:
        return
    import torch

    if torch.version.hip is not None or not torch.cuda.is_available():
        raise RuntimeError("AITER's stand-ins for NVIDIA need an NVIDIA GPU; on ROCm the real AITER runs")
    if "aiter" in sys.modules:
        raise RuntimeError("AITER was imported before its stand-ins for NVIDIA were installed")
    driver.command_line_tools(ARCHITECTURES[TUNED_FOR])
    aiter_jit.install()
    for module in _ARCHITECTURE_LOOKUPS:
        importing.after_import(module, _answer_architecture)
    _drop_amd_options()
    ledger.stood_in(f"AITER on an NVIDIA GPU: ROCm's tools and compiled modules stand in, tuned for {TUNED_FOR}")
    _installed = True


def _answer_architecture(module: ModuleType) -> None:
    module.get_arch = lambda: TUNED_FOR


def _drop_amd_options() -> None:
    """Launch AITER's kernels without the options that Triton's NVIDIA side would refuse."""
    from triton.backends.amd.compiler import HIPOptions
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.runtime.jit import JITFunction

    amd, nvidia = ({field.name for field in dataclasses.fields(options)} for options in (HIPOptions, CUDAOptions))
    foreign, launch = amd - nvidia, JITFunction.run

    @functools.wraps(launch)
    def run(self, *args, **kwargs):
        if self.fn.__module__.startswith("aiter."):
            for option in foreign & kwargs.keys():
                if option not in self.arg_names:
                    ledger.stood_in(f"AITER launch option {option} dropped on NVIDIA")
                    del kwargs[option]
        return launch(self, *args, **kwargs)

    JITFunction.run = run
