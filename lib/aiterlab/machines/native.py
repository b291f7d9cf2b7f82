# SPDX-License-Identifier: Apache-2.0
"""The machine the process runs on: nothing is simulated, only what AITER really compiles is written down."""

from __future__ import annotations

import functools
from types import ModuleType

from aiterlab import importing
from aiterlab.machines import ledger


def watch_compilation() -> None:
    """Keep the ledger of JIT modules on a real ROCm machine: those that AITER builds because they are not prebuilt."""
    importing.after_import("aiter.jit.core", lambda core: _note(core, "build_module"))
    importing.after_import("csrc.cpp_itfs.utils", lambda utils: _note(utils, "compile_lib"))


def _note(module: ModuleType, function: str) -> None:
    build = getattr(module, function)

    @functools.wraps(build)
    def build_and_note(*args, **kwargs):
        # build_module(name, …) and compile_lib(source, name, …)
        ledger.would_compile(
            kwargs.get("md_name") or kwargs.get("folder") or args[0 if function == "build_module" else 1]
        )
        return build(*args, **kwargs)

    setattr(module, function, build_and_note)
