# SPDX-License-Identifier: Apache-2.0
"""What a tree reads of the switches, and of AITER, while it is imported: the evidence that an import may be shared.

Two processes that were told the same by everything they asked are in the same state. So a process that has imported a
part of a tree under one setting of the switches may serve another setting if, and only if, everything that was read
meanwhile has the same value there. Whether AITER is installed may not be asked at all: it is still open.
"""

from __future__ import annotations

import importlib.abc
import os
import subprocess
import sys
from collections.abc import Iterable
from types import ModuleType

from aiterlab import importing

PARSER = "vllm.envs"  # its module-level __getattr__ turns environment variables into the values that the tree sees
WATCHED = "aiter"  # whether it is there differs between the machines, and its imports are what a cell observes


class Forbidden(BaseException):
    """AITER was looked for, or a switch was read where none may be: this import cannot be shared."""


class Reads(importlib.abc.MetaPathFinder):
    """Records what is read of some environment variables; as a context manager, in this process.

    Args:
        moved: names of the variables in which the settings differ.
        forbid: raise at such a read instead of recording it. Looking for AITER always raises.
    """

    def __init__(self, moved: Iterable[str], *, forbid: bool = False) -> None:
        self.moved, self.forbid = frozenset(moved), forbid
        self.raw: dict[str, str | None] = {}  # read as they are
        self.parsed: dict[str, object] = {}  # read through the tree's own parser only
        self.everything = False  # read as a whole, written to, or handed to another process
        self.tripped = False
        self._active = False
        self._setting: dict[str, str | None] = {}
        self._parsing: set[str] | None = None
        self._parser: ModuleType | None = None

    def holds(self) -> bool:
        """Whether this process, with the environment it has now, would have read the same."""
        if self._setting == self._set_now():
            return True
        getters = getattr(self._parser, "environment_variables", {})
        return (
            not self.everything
            and all(os.environ.get(name) == value for name, value in self.raw.items())
            and all(_same(getters[name](), value) for name, value in self.parsed.items())
        )

    def __enter__(self) -> Reads:
        self._setting = self._set_now()
        kind = os._Environ
        self._kept = [(kind, name, getattr(kind, name)) for name in ("__getitem__", "__iter__")]
        self._kept += [(kind, name, getattr(kind, name)) for name in ("__setitem__", "__delitem__")]
        self._kept += [(subprocess.Popen, "__init__", subprocess.Popen.__init__)]
        get, iterate, put, delete, start = (value for _, _, value in self._kept)

        def __getitem__(environ, name):
            self._read(name, environ)
            return get(environ, name)

        def __iter__(environ):
            self._all()
            return iterate(environ)

        def __setitem__(environ, name, value):
            self._write(name)
            put(environ, name, value)

        def __delitem__(environ, name):
            self._write(name)
            delete(environ, name)

        def __init__(process, *args, **kwargs):
            self._all()  # a new process inherits the environment
            start(process, *args, **kwargs)

        for (owner, name, _), wrapper in zip(
            self._kept, (__getitem__, __iter__, __setitem__, __delitem__, __init__), strict=True
        ):
            setattr(owner, name, wrapper)
        sys.meta_path.insert(0, self)
        self._active = True
        importing.after_import(PARSER, self._found_parser)
        return self

    def find_spec(self, fullname, path=None, target=None):
        """Find nothing: statements that import a module, and questions whether there is one, come here first."""
        if fullname.partition(".")[0] == WATCHED:
            self.tripped = True
            raise Forbidden(f"looks for {fullname}")

    def _set_now(self) -> dict[str, str | None]:
        return {name: os.environ.get(name) for name in self.moved}

    def __exit__(self, *exception) -> None:
        self._active = False
        sys.meta_path.remove(self)
        for owner, name, value in self._kept:
            setattr(owner, name, value)
        if self._parser is not None and vars(self._parser).get("__getattr__") is self._recording_parser:
            self._parser.__getattr__ = self._plain_parser

    def _found_parser(self, parser: ModuleType) -> None:
        if not self._active or not callable(plain := vars(parser).get("__getattr__")):
            return
        getters = vars(parser).get("environment_variables", {})
        self._parser, self._plain_parser = parser, plain

        def __getattr__(name):
            if name not in getters or self._parsing is not None:
                return plain(name)
            self._parsing = set()
            try:
                value = plain(name)
            except BaseException:
                self.everything = self.everything or bool(self._parsing)
                raise
            finally:
                read, self._parsing = self._parsing, None
            if read:
                self.parsed[name] = value
            return value

        parser.__getattr__ = self._recording_parser = __getattr__

    def _read(self, name: str | bytes, environ) -> None:
        name = os.fsdecode(name)
        if name not in self.moved:
            return
        self._trip(name)
        if self._parsing is not None:
            self._parsing.add(name)
        else:
            data = environ._data.get(environ.encodekey(name))
            self.raw[name] = None if data is None else os.fsdecode(data)

    def _write(self, name: str | bytes) -> None:
        if os.fsdecode(name) in self.moved:
            self._all()

    def _all(self) -> None:
        self._trip("the whole environment")
        self.everything = True

    def _trip(self, what: str) -> None:
        if self.forbid:
            self.tripped = True
            raise Forbidden(what)


def _same(one, other) -> bool:
    return type(one) is type(other) and one == other
