# SPDX-License-Identifier: Apache-2.0
"""Keep hold of every process that a notebook starts, however it hides, and see what they need.

A process that detaches itself (a session of its own, a parent that ended) escapes a process group. On Linux it cannot
escape a subreaper: an orphan becomes the child of its nearest ancestor that has asked for orphans.
"""

import contextlib
import ctypes
import re
from pathlib import Path

import psutil

from aiterlab import shared_memory

_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)
_FAREWELL_S = 5.0
_ROUNDS = 20  # of killing what was found; a process may start another one meanwhile


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> set[psutil.Process]:
    """Return the living processes that this one and its descendants have started."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return found


def end(spared: set[psutil.Process]) -> list[str]:
    """Kill every descendant that is not `spared`, with its shared memory; returns their command lines.

    One that is still alive after several seconds (in an uninterruptible wait) is marked so.
    """
    met: dict[int, str] = {}
    for _ in range(_ROUNDS):
        left = descendants() - spared
        # First, because a second Ctrl-C may come in between: nobody knows what the dead had mapped.
        shared_memory.delete(shared_memory.mapped(process.pid for process in left))
        for process in left:
            with contextlib.suppress(psutil.Error):
                met.setdefault(process.pid, _described(process))
                process.kill()
        if not left:
            break
        psutil.wait_procs(left, timeout=_FAREWELL_S / _ROUNDS)
    alive = {process.pid for process in left}
    return [f"{line} (still alive)" if pid in alive else line for pid, line in met.items()]


def memory_bytes(processes: set[psutil.Process]) -> int:
    """Return the sum of the proportional set sizes: pages that forked processes share are counted once."""
    total = 0
    for process in processes:
        with contextlib.suppress(OSError, ValueError):
            found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{process.pid}/smaps_rollup").read_text(), re.MULTILINE)
            total += int(found.group(1)) * 1024 if found else 0
    return total


def oom_kills() -> int | None:
    """Return how many processes the system has killed for want of memory since it was started; None if it keeps none.

    /proc/vmstat counts those of every control group, so it needs no look into ours.
    """
    with contextlib.suppress(OSError):
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
        return int(found.group(1)) if found else None
    return None


def _described(process: psutil.Process) -> str:
    command = " ".join(process.cmdline()) or process.name()
    return f"{process.pid} {command[:120]}"
