# SPDX-License-Identifier: Apache-2.0
"""What is done before cells are asked: lists that were learnt by watching, kept between runs.

They make answers faster and never different: a list that fits badly costs time.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from aiterlab import paths, records

# In these the machines differ, so a module that asks for one while it is imported holds an answer of the wrong machine.
_OF_MACHINES = ("aiter", "aiter_meta", "amdsmi", "csrc", "flash_attn", "vllm")
# Packages whose import is the very thing that a cell observes.
OBSERVED = ("aiter", "aiter_meta", "aiterlab", "amdsmi", "csrc", "flash_attn", "torchvision", "vllm")


# Their compilation takes a tenth of a second: AITER makes two of 30,000 characters when it is imported.
_LONG_PATTERN = 10_000
_compiled: set[str] = set()  # by `compile_all`, in this process or in one that it was forked from


class Names:
    """A list of names, or of patterns, in the cache.

    Args:
        kind: what the list is for.
        basis: all that the list depends on.
    """

    def __init__(self, kind: str, basis: str) -> None:
        self.file = Path(paths.cache_dir() / f"preload-{kind}-{hashlib.sha256(basis.encode()).hexdigest()[:16]}.json")
        self.known = self.file.exists()
        self.names: list[str] = json.loads(self.file.read_text()) if self.known else []

    def extend(self, names: Iterable[str]) -> None:
        """Add names at the end, each once."""
        if new := [name for name in dict.fromkeys(names) if name not in set(self.names)]:
            self.replace(self.names + new)

    def replace(self, names: list[str]) -> None:
        self.known, self.names = True, names
        self.file.parent.mkdir(parents=True, exist_ok=True)
        records.atomic_write_text(self.file, json.dumps(names))

    def forget(self) -> None:
        self.names = []
        self.file.unlink(missing_ok=True)


class _AskedForMachine(BaseException):
    """Ends an import that would otherwise go on with what is installed here."""


class _Refuser(importlib.abc.MetaPathFinder):
    """Finds nothing, and lets nobody look for what is part of a machine."""

    asked = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in _OF_MACHINES:
            self.asked = True
            raise _AskedForMachine(fullname)


def import_all(names: Iterable[str]) -> str | None:
    """Import what does not depend on the machine; the rest is left to the processes that need it.

    Returns:
        The first name that asked for a part of a machine and got over the refusal: this process is spoilt.
    """
    refuser = _Refuser()
    sys.meta_path.insert(0, refuser)
    try:
        for name in names:
            refuser.asked = False
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    importlib.import_module(name)
                except (Exception, _AskedForMachine):
                    sys.modules.pop(name, None)
                    continue
            if refuser.asked:
                return name
    finally:
        sys.meta_path.remove(refuser)
    return None


def imported_after(last: str | None) -> list[str]:
    """Names of the modules imported after the module `last`, or of all; the others are not touched."""
    names = []
    for name in reversed(sys.modules):
        if name == last:
            break
        names.append(name)
    return names[::-1]


def loadable(names: Iterable[str]) -> list[str]:
    """Of some imported modules, the third-party and standard ones that another process can import by name.

    Left out is what a cell observes, and every file in the folders of those packages: AITER also imports parts of
    itself as top-level modules.
    """
    observed = [f"{folder}{os.sep}" for name in OBSERVED for folder in getattr(sys.modules.get(name), "__path__", ())]
    kept = []
    for name in names:
        spec = getattr(sys.modules[name], "__spec__", None)
        origin = getattr(spec, "origin", None)
        if origin is None or spec.name != name or name.partition(".")[0] in OBSERVED:
            continue
        file_of_others = Path(origin).is_file() and not any(origin.startswith(folder) for folder in observed)
        if origin in ("built-in", "frozen") or file_of_others:
            kept.append(name)
    return kept


def compile_all(patterns: Iterable[str]) -> None:
    """Compile regular expressions before the processes that need them begin."""
    for pattern in patterns:
        re.compile(pattern)
        _compiled.add(pattern)


def long_patterns() -> list[str]:
    """Regular expressions whose compilation takes long, and that nobody has compiled ahead of this process."""
    return [
        pattern
        for kind, pattern, flags in list(getattr(re, "_cache", ()))
        if kind is str and len(pattern) > _LONG_PATTERN and not flags and pattern not in _compiled
    ]
