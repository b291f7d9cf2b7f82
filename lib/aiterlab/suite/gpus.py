# SPDX-License-Identifier: Apache-2.0
"""Which GPUs a run may use, found without touching one, and a lock for each: two runs on one GPU measure each other."""

import contextlib
import fcntl
import os
import re
from pathlib import Path
from typing import TextIO

from aiterlab import host, paths

_CHOSEN = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def visible() -> list[str]:
    """Return the ids of the GPUs that this process may use: those that its environment chooses, else all."""
    there = _nvidia() or _amd()
    for name in _CHOSEN:
        if (chosen := os.environ.get(name)) is not None:
            return [part.strip() for part in chosen.split(",") if part.strip() not in ("", "-1")] if there else []
    return there


def lock() -> contextlib.ExitStack | None:
    """Take the lock of every visible GPU; returns what holds them, or None while another run does."""
    with contextlib.ExitStack() as stack:
        for gpu in visible():
            file = stack.enter_context(_lock_file(gpu))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
        return stack.pop_all()


def _lock_file(gpu: str) -> TextIO:
    folder = paths.cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return open(folder / ("gpu-" + re.sub(r"[^\w-]", "_", gpu)), "a")  # closed by whoever holds the stack


def _nvidia() -> list[str]:
    numbers = [re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*")]
    return sorted((found.group(1) for found in numbers if found), key=int)


def _amd() -> list[str]:
    with contextlib.suppress(OSError, ValueError):  # a driver that does not answer must not keep a run from starting
        return [str(number) for number, _ in enumerate(host.amd_gpus())]
    return []
