# SPDX-License-Identifier: Apache-2.0
"""The machine the process runs on: nothing is simulated, only what AITER really compiles is written down."""

from __future__ import annotations

import functools
from types import ModuleType

from aiterlab import importing
from aiterlab.machines import ledger


def watch_compilation() -> None:
    """Keep the ledger of JIT modules on a real ROCm machine: those that AITER builds because they are not prebuilt."""
    importing.after_import("aiter.jit.core", _note_builds)


def _note_builds(core: ModuleType) -> None:
    build = core.build_module

    @functools.wraps(build)
    def build_module(md_name, *args, **kwargs):
        ledger.would_compile(md_name)
        return build(md_name, *args, **kwargs)

    core.build_module = build_module
