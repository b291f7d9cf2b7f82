# SPDX-License-Identifier: Apache-2.0
"""Reach modules at the moment Python imports them.

An import decides things once per process, which is the very bug this project studies. So both the simulated machine
and the hotfix have to act at import time: before anybody has bound a name, and without importing anything earlier
than the code under study would.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the other finders answer and wraps the loader of the modules it waits for."""

    def __init__(self) -> None:
        self.callbacks: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.callbacks:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self.callbacks[fullname])
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, callbacks: list[Callable[[ModuleType], None]]) -> None:
        self.loader, self.callbacks = loader, callbacks

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # inspect and pickle see the true loader
        self.loader.exec_module(module)
        for callback in list(self.callbacks):
            callback(module)


_after_import = _AfterImport()


def after_import(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call `callback(module)` as soon as the module `name` has been executed; at once if that has happened already.

    A module that is being executed at this moment is out of reach: its callback waits for an import that never comes.
    """
    if (module := sys.modules.get(name)) is not None and not getattr(module.__spec__, "_initializing", False):
        callback(module)
        return
    if _after_import not in sys.meta_path:
        sys.meta_path.insert(0, _after_import)
    _after_import.callbacks.setdefault(name, []).append(callback)


class _Virtual(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves modules made by functions, for what exists only as a compiled file on the described machine."""

    def __init__(self, claims: Callable[[str], bool], fill: Callable[[ModuleType], None], origin: str) -> None:
        self.claims, self.fill, self.origin = claims, fill, origin

    def find_spec(self, fullname, path=None, target=None):
        if not self.claims(fullname):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=self.origin, is_package="." not in fullname)

    def create_module(self, spec):
        module = ModuleType(spec.name)
        module.__file__ = f"<{self.origin}>/{spec.name}"
        return module

    def exec_module(self, module: ModuleType) -> None:
        self.fill(module)


def serve(claims: Callable[[str], bool], fill: Callable[[ModuleType], None], origin: str) -> None:
    """Answer the import of every module whose full name `claims` accepts with a new module that `fill` fills."""
    sys.meta_path.insert(0, _Virtual(claims, fill, origin))


def serve_the_rest(claims: Callable[[str], bool], fill: Callable[[ModuleType], None], origin: str) -> None:
    """Like `serve`, but for modules that no other finder has: what is installed keeps its place."""
    sys.meta_path.append(_Virtual(claims, fill, origin))


def skip_address_grammars() -> None:
    """Let jsonschema do without a package that takes two seconds to import, where one has installed it.

    It compiles grammars of international addresses, and no schema that is checked here speaks of such.
    """
    sys.modules.setdefault("rfc3987_syntax", None)


class _Without(importlib.abc.MetaPathFinder):
    """The ordinary path finder of a machine on which some packages are not installed."""

    def __init__(self, packages: frozenset[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in self.packages:
            return None
        return importlib.machinery.PathFinder.find_spec(fullname, path, target)

    def find_distributions(self, *args, **kwargs):
        return importlib.machinery.PathFinder.find_distributions(*args, **kwargs)


def hide(*packages: str) -> None:
    """Make top-level packages look as if they were not installed: `find_spec` is None, `import` raises.

    Raises:
        RuntimeError: one of them has been imported already, so hiding it would deceive nobody.
    """
    if present := [name for name in packages if name in sys.modules]:
        raise RuntimeError(f"cannot hide what is imported already: {', '.join(present)}")
    for index, finder in enumerate(sys.meta_path):
        if finder is importlib.machinery.PathFinder:
            sys.meta_path[index] = _Without(frozenset(packages))
        elif isinstance(finder, _Without):
            sys.meta_path[index] = _Without(finder.packages | set(packages))
