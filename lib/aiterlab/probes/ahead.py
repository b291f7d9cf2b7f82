# SPDX-License-Identifier: Apache-2.0
"""Work that each cell would do alike, done once before the first: faster answers, and none that differ.

Most of a cell's time goes into importing AITER, which has to stay an event of the cell. What can go before it are a
tenth of a second for tables that AITER never fills otherwise, templates that it compiles and text that is read and
thrown away, and files whose code is executed in each cell and is the same in all.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.abc
import importlib.metadata
import importlib.util
import inspect
import logging.config
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from importlib import _bootstrap_external
from importlib.machinery import PathFinder, SourceFileLoader
from importlib.metadata import EntryPoints, PackageNotFoundError, PathDistribution, version
from inspect import Signature
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType

import jinja2

_FOLDER = ("jit", "utils")  # of AITER, from where it imports `hipify` as a top-level package
_HEADER = 16  # bytes of a .pyc before its code
_HELD = "held"  # a name for modules that nobody imports
_code: dict[Path, dict[str, CodeType]] = {}  # package -> file -> what it is compiled to
_PACKAGES_HELD = 3  # AITER, a tree, and the one that is asked while the last cells of that tree are
_read_code = SourceFileLoader.get_code
_find_module = inspect.getmodule
_ELSEWHERE = {"__signature__", "__text_signature__", "__wrapped__"}  # where a function may have its signature from
_SOURCES = "aiter_meta"  # AITER's C++ code
_VERSIONS_ASKED = ("transformers",)
_TABLES, _LAST = "hipify", "hipify.hipify_python"  # PyTorch's translation of CUDA's names into HIP's; imports the rest


def prepare() -> None:
    """Do it all, in a process that has neither vLLM nor AITER."""
    inspect.getmodule(prepare.__code__)  # it looks through every module; what it learns here, children know already
    inspect.getmodule = _module
    inspect.signature = _remembering_last(inspect.signature)
    if library := sys.modules.get("torch._library.utils"):
        library.get_source = _source
    if effects := sys.modules.get("torch._library.effects"):
        _look_for_effects_when_asked(effects.EffectHolder)
    if kernels := sys.modules.get("torch._library.triton"):
        kernels.get_inner_triton_kernels = partial(_Kernels, kernels.get_inner_triton_kernels)
    logging.config._handle_existing_loggers = _emptying_caches_once(logging.config._handle_existing_loggers)
    _hold_metadata()
    for folder in folders_of("aiter"):
        _hold_tables(folder.joinpath(*_FOLDER))
    for folder in folders_of(_SOURCES):
        _hold_templates(folder)


def folders_of(package: str) -> list[Path]:
    """Where an installed package lies, nowhere if it is not installed; it is not imported."""
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]


def share_compiled_files(apart: Iterable[Path]) -> None:
    """Take compiled files from where installers have put them; without that a prefix has all of them made anew.

    In a process whose compiled files are apart (`sys.pycache_prefix`): those below the folders `apart` stay so, and
    what nobody has compiled yet goes there too, not into somebody's environment.
    """
    find_below, folders = _bootstrap_external.cache_from_source, tuple(f"{folder}{os.sep}" for folder in apart)

    def find(path, *args, **kwargs) -> str:
        below = find_below(path, *args, **kwargs)
        if os.fspath(path).startswith(folders):
            return below
        prefix, sys.pycache_prefix = sys.pycache_prefix, None
        try:
            beside = find_below(path, *args, **kwargs)
        finally:
            sys.pycache_prefix = prefix
        return beside if os.path.exists(beside) else below

    _bootstrap_external.cache_from_source = find


def compile_once(folder: Path) -> None:
    """Keep in a folder what source is compiled to: releases have half of their files in common.

    It is kept by its content, so a file of another tree or at another place finds it; Python still keeps each file's
    compiled code by its path, which is what it looks at first.
    """
    compile_anew = SourceFileLoader.source_to_code

    def source_to_code(loader, data, path, **options) -> CodeType:
        if not isinstance(data, bytes) or options:
            return compile_anew(loader, data, path, **options)
        tag = f"{sys.implementation.cache_tag}.opt-{sys.flags.optimize}"
        kept = folder / f"{hashlib.sha256(data).hexdigest()}.{tag}.pyc"
        with contextlib.suppress(OSError, EOFError, ImportError, TypeError, ValueError):
            compiled = kept.read_bytes()
            _bootstrap_external._classify_pyc(compiled, str(kept), {})
            return _bootstrap_external._compile_bytecode(compiled[_HEADER:], source_path=os.fspath(path))
        code = compile_anew(loader, data, path)
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            _bootstrap_external._write_atomic(os.fspath(kept), _bootstrap_external._code_to_timestamp_pyc(code))
        return code

    SourceFileLoader.source_to_code = source_to_code


def hold_code(packages: Iterable[Path]) -> None:
    """Read the compiled code of these packages' modules, of those that anybody has imported before.

    Executing it stays with the processes that import them. In a process whose compiled files are apart from the
    packages, and no others with them. What has been read stays, but for packages that were not asked for lately.
    """
    SourceFileLoader.get_code = _held_code
    for package in packages:
        code = _code[package] = _code.pop(package, {})
        folders = set()
        for compiled in Path(sys.pycache_prefix, *package.parts[1:]).rglob(f"*.{sys.implementation.cache_tag}.pyc"):
            file = importlib.util.source_from_cache(str(compiled))
            if file in code:
                continue
            with contextlib.suppress(OSError, SyntaxError):  # its module has gone from a checkout, or is being edited
                code[file] = _read_code(SourceFileLoader(_HELD, file), _HELD)
                folders.add(str(Path(file).parent))
        for folder in folders:
            pkgutil.get_importer(folder).find_spec(_HELD)  # it lists the folder
    for package in list(_code)[:-_PACKAGES_HELD]:
        del _code[package]


def _held_code(loader: SourceFileLoader, name: str) -> CodeType:
    return next((code[loader.path] for code in _code.values() if loader.path in code), None) or _read_code(loader, name)


def _source(stacklevel: int) -> str:
    """The caller's file and line, as torch notes for each operator; its own function also reads the lines around it."""
    frame = sys._getframe(stacklevel)
    return f"{inspect.getsourcefile(frame) or inspect.getfile(frame)}:{frame.f_lineno}"


def _module(asked, _filename: str | None = None) -> ModuleType | None:
    """The module of a frame, as torch asks for each operator; its own function looks for the file among all modules."""
    if isinstance(asked, FrameType):
        module = sys.modules.get(asked.f_globals.get("__name__"))
        if getattr(module, "__file__", None) == asked.f_code.co_filename:
            return module
    return _find_module(asked, _filename)


def _remembering_last(find: Callable[..., Signature]) -> Callable[..., Signature]:
    """AITER and torch ask three times in a row for the signature of each operator's function."""
    last: tuple = ()
    found: Signature

    def signature(asked, **options) -> Signature:
        nonlocal last, found
        if options or type(asked) is not FunctionType or not _ELSEWHERE.isdisjoint(vars(asked)):
            return find(asked, **options)
        named = dict(asked.__kwdefaults__ or {}), dict(asked.__annotations__)
        about = asked, asked.__code__, asked.__defaults__, *named
        if about != last:
            found, last = find(asked), about
        return found

    return signature


def _look_for_effects_when_asked(holder: type) -> None:
    """Torch reads each operator's schema for objects with state when it is registered; its compiler alone asks."""
    if not hasattr(holder, "_set_default_effect"):
        return

    def __init__(self, qualname: str) -> None:
        self.qualname = qualname

    def __getattr__(self, name: str):
        if name != "_effect":
            raise AttributeError(name)
        self._set_default_effect()
        return self._effect

    holder.__init__, holder.__getattr__ = __init__, __getattr__


class _Kernels(Sequence):
    """The Triton kernels of an operator, looked for in its source when torch's compiler asks for them."""

    def __init__(self, find: Callable[[Callable], list], operator: Callable) -> None:
        self._find, self._operator = find, operator

    @cached_property
    def _found(self) -> list:
        return self._find(self._operator)

    def __getitem__(self, index):
        return self._found[index]

    def __len__(self) -> int:
        return len(self._found)


def _emptying_caches_once(handle: Callable[..., None]) -> Callable[..., None]:
    """Each level that is set empties the caches of all loggers, and a configuration sets one for each of vLLM's."""

    def handle_existing(*loggers) -> None:
        manager = logging.root.manager
        manager._clear_cache = lambda: None
        try:
            handle(*loggers)
        finally:
            del manager._clear_cache
            manager._clear_cache()

    return handle_existing


def _hold_templates(package: Path) -> None:
    """Compile the templates of this package, as whoever makes one from their text would do each time."""
    environment = jinja2.Template("").environment  # all that are made with no options have this one
    held = {text: environment.compile(text) for text in (file.read_text() for file in package.rglob("*.jinja"))}
    compile_anew = jinja2.Environment.compile

    def compile_once(self, source, *args, **kwargs):
        if self is environment and not args and not kwargs and source in held:
            return held[source]
        return compile_anew(self, source, *args, **kwargs)

    jinja2.Environment.compile = compile_once


def _hold_metadata() -> None:
    """Read once what installed packages say of themselves: vLLM asks for all entry points, and twice for a version."""
    for name in ("entry_points", "metadata"):
        setattr(PathDistribution, name, property(_remembering(getattr(PathDistribution, name).fget)))
    importlib.metadata.entry_points = _remembering_places(importlib.metadata.entry_points)
    importlib.metadata.entry_points()
    for name in _VERSIONS_ASKED:
        with contextlib.suppress(PackageNotFoundError):
            version(name)


def _remembering(read: Callable[[PathDistribution], object]) -> Callable[[PathDistribution], object]:
    known: dict[str, object] = {}

    def remembered(distribution: PathDistribution):
        place = str(distribution._path)
        if place not in known:
            known[place] = read(distribution)
        return known[place]

    return remembered


def _remembering_places(find: Callable[..., EntryPoints]) -> Callable[..., EntryPoints]:
    """Entry points by where they are looked for and by group; newer releases ask twice for each configuration."""
    known: dict[tuple[str, ...], dict[str | None, EntryPoints]] = {}

    def entry_points(**chosen: str) -> EntryPoints:
        places = tuple(sys.path)
        if places not in known:
            found = find()
            known[places] = {None: found} | {group: found.select(group=group) for group in found.groups}
        return known[places].get(chosen.get("group"), EntryPoints()).select(**chosen)

    return entry_points


def _hold_tables(folder: Path) -> None:
    if _TABLES in sys.modules or not (folder / _TABLES).is_dir():
        return
    sys.path.insert(0, str(folder))
    try:
        importlib.import_module(_LAST)
    except Exception:
        return  # another AITER: cells import what it has
    finally:
        sys.path.remove(str(folder))
        held = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == _TABLES}
    sys.meta_path.insert(0, _Held(held))


class _Held(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Hands out modules that have been executed already, to imports that would find the same files."""

    def __init__(self, modules: dict[str, ModuleType]) -> None:
        self.modules = modules
        self.specs = {name: module.__spec__ for name, module in modules.items()}

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.modules:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin == self.specs[fullname].origin:
            spec.loader = self
        return spec

    def create_module(self, spec):
        return self.modules[spec.name]

    def exec_module(self, module) -> None:
        module.__spec__ = self.specs[module.__name__]  # the import system has put that of this finder there
        if module.__name__ == _LAST:
            for name, other in self.modules.items():
                sys.modules.setdefault(name, other)  # what it imports
