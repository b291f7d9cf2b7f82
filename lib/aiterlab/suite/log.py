# SPDX-License-Identifier: Apache-2.0
"""Keep all that a notebook's processes write, up to a size at which nobody reads it and the disk suffers."""

import os
import threading
from pathlib import Path
from typing import Self

LIMIT_BYTES = 64_000_000
_CHUNK_BYTES = 1 << 16


class CappedLog:
    """A log file, and the end of a pipe that processes can write to as if it were the file.

    What comes after the limit, or after the disk is full, is read and dropped: whoever writes never blocks and never
    fails for its log's sake.
    """

    def __init__(self, path: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self.path, self.limit_bytes = path, limit_bytes
        self.written_bytes = self.dropped_bytes = 0
        self.error: OSError | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._file = open(self.path, "ab", buffering=0)
        read, self.descriptor = os.pipe()
        self._pump = threading.Thread(target=self._drain, args=(read,), name="log", daemon=True)
        self._pump.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End once every process that holds the pipe is gone."""
        os.close(self.descriptor)
        self._pump.join()
        if self.dropped_bytes and self.error is None:
            self._append(f"\n... {self.dropped_bytes} bytes more were written and are not kept ...\n".encode())
        self._file.close()

    def write(self, text: str) -> int:
        """Write text; what is not encodable (half of a surrogate pair) is written as its escape."""
        self._keep(text.encode("utf-8", errors="backslashreplace"))
        return len(text)

    def flush(self) -> None:
        """Do nothing: every write is one."""

    def _drain(self, read: int) -> None:
        with os.fdopen(read, "rb", buffering=0) as pipe:
            while chunk := pipe.read(_CHUNK_BYTES):
                self._keep(chunk)

    def _keep(self, data: bytes) -> None:
        with self._lock:
            kept = data[: max(0, self.limit_bytes - self.written_bytes)] if self.error is None else b""
            self.dropped_bytes += len(data) - len(kept)
            self._append(kept)

    def _append(self, data: bytes) -> None:
        while data and self.error is None:
            try:
                written = self._file.write(data)
            except OSError as error:
                self.error = error
                self.dropped_bytes += len(data)
                return
            self.written_bytes += written
            data = data[written:]
