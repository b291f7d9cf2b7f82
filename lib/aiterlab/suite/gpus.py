# SPDX-License-Identifier: Apache-2.0
"""Which GPUs a run may use, found without touching one, and a lock for each: two runs on one GPU measure each other."""

import contextlib
import fcntl
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from aiterlab import host

_CUDA, _HIP, _ROCR = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"
_SMI_TIMEOUT_S = 10
_LOCKS = Path("/tmp")  # of every user alike, which neither a cache nor TMPDIR is


def visible() -> list[str]:
    """Return the numbers of the GPUs that this process may use: those that its environment chooses, else all.

    However a GPU is chosen, it has the same number in every process of the machine. One that is chosen by an id which
    the driver does not explain goes by that id.
    """
    if there := _nvidia():
        return _chosen(there, _CUDA, _nvidia_ids)
    # HIP counts within what ROCR leaves, and takes CUDA's variable where its own is not there.
    left = _chosen(_amd(), _ROCR, _amd_ids)
    return _chosen(left, _HIP if _HIP in os.environ else _CUDA, _amd_ids)


def lock() -> contextlib.ExitStack | None:
    """Take the lock of every visible GPU; returns what holds them, or None while another run does."""
    with contextlib.ExitStack() as stack:
        for gpu in visible():
            file = _lock_file(gpu)
            stack.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
        return stack.pop_all()


def _lock_file(gpu: str) -> int:
    """Open a GPU's lock, which every user shares and nobody reads; a link that somebody has laid there is an error."""
    path = _LOCKS / ("aiterlab-gpu-" + re.sub(r"[^\w-]", "_", gpu))
    with contextlib.suppress(FileExistsError):
        made = os.open(path, os.O_CREAT | os.O_EXCL, 0o666)
        os.fchmod(made, 0o666)  # whatever the umask
        os.close(made)
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with contextlib.suppress(PermissionError):
        os.utime(file)  # or who tidies up /tmp would take an old one from under a run
    return file


def _chosen(there: list[str], variable: str, ids: Callable[[], Mapping[str, str]]) -> list[str]:
    """Return those of `there` that a variable lists, by place among them or by id; the first wrong place ends it."""
    listed = os.environ.get(variable)
    if listed is None or not there:
        return there
    found = []
    for part in listed.split(","):
        part = part.strip()
        if part.startswith(("GPU-", "MIG-")):
            # CUDA takes the beginning of an id as well.
            found.append(next((gpu for one, gpu in ids().items() if one.startswith(part)), part))
        elif part.isdecimal() and int(part) < len(there):
            found.append(there[int(part)])
        else:
            break
    return list(dict.fromkeys(found))  # two parts of one GPU have one lock


def _nvidia() -> list[str]:
    numbers = [re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*")]
    return sorted((found.group(1) for found in numbers if found), key=int)


@cache
def _nvidia_ids() -> dict[str, str]:
    """Return the GPU of each id, and of each id of a part of one; only nvidia-smi knows them."""
    found, gpu, numbers = {}, "", iter(_nvidia())
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(["nvidia-smi", "-L"], check=True, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S)
        for line in asked.stdout.splitlines():
            gpu = next(numbers, gpu) if line.startswith("GPU ") else gpu
            if told := re.search(r"UUID: ([^)]+)", line):
                found[told.group(1)] = gpu
    return found


def _amd() -> list[str]:
    with contextlib.suppress(OSError, ValueError):  # a driver that does not answer must not keep a run from starting
        return [str(number) for number, _ in enumerate(host.amd_gpus())]
    return []


def _amd_ids() -> dict[str, str]:
    return {gpu["uuid"]: str(number) for number, gpu in enumerate(host.amd_gpus())}
