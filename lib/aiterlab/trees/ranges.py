# SPDX-License-Identifier: Apache-2.0
"""Read parts of a large file on a server, so that a wheel's Python files come without its compiled ones."""

from __future__ import annotations

import io
import re
import ssl
import urllib.request
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

from aiterlab.trees import index

BLOCK_BYTES = 512 * 1024
KEPT_BLOCKS = 8  # a reader in the order of the file needs one, and the directory at the end a few
TIMEOUT_S = 60


class RangeError(OSError):
    """The server does not serve parts of this file."""


def open_url(url: str) -> BinaryIO:
    """Open a file on a server or on this disk for reading anywhere in it.

    Raises:
        OSError: it cannot be read, or not in parts.
    """
    scheme, _, _ = url.partition(":")
    if scheme == "file":
        return Path(urllib.request.url2pathname(url.removeprefix("file://").partition("#")[0])).open("rb")
    return io.BufferedReader(RangedFile(url, _opener()))  # a read may end at a block's end; zipfile expects all


class RangedFile(io.RawIOBase):
    """A seekable file of which only the blocks that are read are fetched."""

    def __init__(self, url: str, opener: urllib.request.OpenerDirector) -> None:
        self.url, self.opener, self.position, self.size = url, opener, 0, None
        self.blocks: OrderedDict[int, bytes] = OrderedDict()
        self.fetched_bytes = 0
        self._block(0)  # the first answer says how long the file is

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence])
        return self.position

    def readinto(self, buffer) -> int:
        if self.position >= self.size:
            return 0
        number, start = divmod(self.position, BLOCK_BYTES)
        piece = self._block(number)[start : start + len(buffer)]
        buffer[: len(piece)] = piece
        self.position += len(piece)
        return len(piece)

    def _block(self, number: int) -> bytes:
        if number not in self.blocks:
            self.blocks[number] = self._fetch(number * BLOCK_BYTES)
            if len(self.blocks) > KEPT_BLOCKS:
                self.blocks.popitem(last=False)
        self.blocks.move_to_end(number)
        return self.blocks[number]

    def _fetch(self, start: int) -> bytes:
        last = start + BLOCK_BYTES - 1
        # An encoded answer would be counted in other bytes than the file's.
        headers = {"Range": f"bytes={start}-{last}", "Accept-Encoding": "identity"}
        request = urllib.request.Request(self.url, headers=headers)
        with self.opener.open(request, timeout=TIMEOUT_S) as reply:
            told = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", reply.headers.get("Content-Range", ""))
            if reply.status != 206 or told is None:
                raise RangeError(f"{self.url}: the server does not answer in parts")
            first, end, size = map(int, told.groups())
            if first != start or end != min(last, size - 1) or self.size not in (None, size):
                raise RangeError(f"{self.url}: the server answers with another part than the one asked for")
            content = reply.read()
        if len(content) != end - first + 1:
            raise RangeError(f"{self.url}: the answer ends too early")
        self.size = size
        self.fetched_bytes += len(content)
        return content


def _opener() -> urllib.request.OpenerDirector:
    """What speaks to an index as pip does, as far as certificates and proxies go."""
    handlers = [urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=index.setting("cert")))]
    if proxy := index.setting("proxy"):
        handlers.append(urllib.request.ProxyHandler({"http": proxy, "https": proxy}))
    return urllib.request.build_opener(*handlers)
