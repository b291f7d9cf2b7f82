# SPDX-License-Identifier: Apache-2.0
"""Keep room on the disk for the end of a run, so that one which fills the disk can still say so."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

RESERVE_NAME = ".reserve"
RESERVE_BYTES = 8_000_000  # an executed copy, a report with its figures, a status


@contextlib.contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Hold a file of the size that the end needs, and give it up when the block is left.

    Raises:
        OSError: there is no room now, so nothing should be begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reserve = folder / RESERVE_NAME
    try:
        with open(reserve, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
        yield
    finally:
        reserve.unlink(missing_ok=True)
