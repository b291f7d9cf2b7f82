# SPDX-License-Identifier: Apache-2.0
"""Delete what processes leave in shared memory when they are killed: it outlives them, as files in /dev/shm.

Only an orderly end deletes Python's segments (`psm_`) and semaphores (joblib renames those), the segments of vLLM's
ranks on a CPU (`vllm_dist_`), torch's and NCCL's. Their names are random: nothing that is started later wants one.
"""

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

# Whole names: people keep other files there too, and environments, which many processes map.
_SEGMENT = re.compile(
    r"/dev/shm/(?:psm_\w+|sem\.(?:mp|loky)-[\w-]+|vllm_dist_[^\s/]+|torch_\d+_\d+_\d+|nccl-\w{6})$", re.MULTILINE
)


def mapped(pids: Iterable[int]) -> set[Path]:
    """Return the segments of these processes, as files that are still there."""
    found: set[Path] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            found.update(map(Path, _SEGMENT.findall(os.fsdecode(Path(f"/proc/{pid}/maps").read_bytes()))))
    return found


def delete(segments: Iterable[Path]) -> None:
    """Delete segments; whoever has one mapped keeps it until it ends."""
    for segment in segments:
        with contextlib.suppress(OSError):
            segment.unlink()
