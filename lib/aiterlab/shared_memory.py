# SPDX-License-Identifier: Apache-2.0
"""Delete what processes leave in shared memory when they are killed: it outlives them, as files in /dev/shm.

Only an orderly end deletes Python's segments (`psm_`) and semaphores (joblib renames those), the segments of vLLM's
ranks on a CPU (`vllm_dist_`), torch's and NCCL's. Their names are random: nothing that is started later wants one.
"""

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

_SEGMENT = re.compile(r"/dev/shm/(?:psm_|sem\.mp-|sem\.loky-|vllm_dist_|torch_|nccl-)\S+$", re.MULTILINE)


def mapped(pids: Iterable[int]) -> set[Path]:
    """Return the segments of these processes, as files that are still there."""
    found: set[Path] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            found.update(map(Path, _SEGMENT.findall(Path(f"/proc/{pid}/maps").read_text())))
    return found


def delete(segments: Iterable[Path]) -> None:
    """Delete segments; whoever has one mapped keeps it until it ends."""
    for segment in segments:
        with contextlib.suppress(OSError):
            segment.unlink()
