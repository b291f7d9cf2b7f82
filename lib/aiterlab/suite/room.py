# SPDX-License-Identifier: Apache-2.0
"""Keep room on the disk for the end of a run, so that one which fills the disk can still say so."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

RESERVE_BYTES = 8_000_000  # an executed copy, a report with its figures, a status


@contextlib.contextmanager
def reserved(folder: Path, size_bytes: int = RESERVE_BYTES) -> Iterator[IO[bytes]]:
    """Hold a file of the size that the end needs until the block is left or the file is closed.

    It has no name, so that a process that is killed leaves nothing.

    Raises:
        OSError: there is no room now, so nothing should be begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size_bytes)
        yield file
