# SPDX-License-Identifier: Apache-2.0
"""Let one runner at a time work in a run's folder, and none while the notebooks of a killed one are still ending."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

LOCK_NAME = ".lock"


@contextlib.contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Keep other runners out; raises BlockingIOError where one, or a notebook of one, is at work."""
    path = run_dir / LOCK_NAME
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(path)):  # else its holder has deleted it meanwhile
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    break
        except OSError:
            os.close(lock)
            raise
        os.close(lock)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def share(run_dir: Path) -> None:
    """Hold the folder as long as this process lives, together with the runner that started it; a fork does anyway."""
    with contextlib.suppress(OSError):  # on another machine than the runner's there is nothing to hold
        fcntl.flock(os.open(run_dir / LOCK_NAME, os.O_RDWR), fcntl.LOCK_SH | fcntl.LOCK_NB)
