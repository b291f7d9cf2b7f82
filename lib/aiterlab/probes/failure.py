# SPDX-License-Identifier: Apache-2.0
"""An exception as a fact: its type, its full message and the line of vLLM that raised it."""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path


def describe(error: BaseException, package: Path) -> dict:
    """Turn `error` into JSON; `raised_at` is the deepest frame that lies in the tree's own package."""
    frames = [
        {
            "file": f"vllm{frame.f_code.co_filename.removeprefix(str(package))}",
            "line": line,
            "function": frame.f_code.co_name,
            "source": linecache.getline(frame.f_code.co_filename, line).strip(),
        }
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename.startswith(str(package))
    ]
    return {
        "outcome": "error",
        "type": type(error).__name__,
        "message": str(error),
        "raised_at": frames[-1] if frames else None,
        "raised_in": _owner(error, package),
        "frames": frames[-6:],
    }


# These only pass an import on, or guard one; they raise nothing of their own.
_IN_BETWEEN = ("importlib", "aiterlab.importing", *(f"aiterlab.probes.{name}" for name in ("ahead", "imports", "nest")))


def _owner(error: BaseException, package: Path) -> str:
    """Whose code raised it: `vllm` for the tree, else the top-level package of the deepest frame."""
    owner = "vllm"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = frame.f_globals.get("__name__", "importlib")
        if frame.f_code.co_filename.startswith(str(package)):
            owner = "vllm"
        elif "/aiter/" in frame.f_code.co_filename:
            owner = "aiter"  # it imports some of its files as top-level modules
        elif not name.startswith((*_IN_BETWEEN, "_frozen_importlib")):
            owner = name.partition(".")[0]
    return owner
