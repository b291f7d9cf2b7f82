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
        "frames": frames[-6:],
    }
