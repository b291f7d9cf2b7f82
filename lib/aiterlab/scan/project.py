# SPDX-License-Identifier: Apache-2.0
"""Source files, and what a name in one of them refers to in another. Files are read, never imported."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from aiterlab.scan.scopes import FUNCTIONS, imported_name

DEPTH = 8  # of re-exports that are followed
SKIPPED = frozenset({"__pycache__", "node_modules", "site-packages", "venv"})


class Unreadable(Exception):
    """A file is not Python that this interpreter can parse; the message is one line."""


class Source:
    """One file."""

    def __init__(self, path: Path, root: Path, package: tuple[str, ...]) -> None:
        self.path, self.root, self.package = path, root, package
        self.wanted_by_others = False

    @cached_property
    def text(self) -> str:
        try:
            content = self.path.read_bytes()
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
            return content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
        except (OSError, SyntaxError, UnicodeDecodeError, LookupError) as error:
            raise Unreadable(f"cannot be read: {_one_line(error)}") from None

    @cached_property
    def tree(self) -> ast.Module:
        try:
            return ast.parse(self.text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            where = f"line {error.lineno}: " if getattr(error, "lineno", None) else ""
            raise Unreadable(f"is not Python here: {where}{_one_line(error)}") from None

    def forget(self) -> None:
        """Let the syntax tree go unless other files look things up in it: all trees together need a gigabyte."""
        if not self.wanted_by_others:
            for name in ("tree", "top"):
                self.__dict__.pop(name, None)

    @cached_property
    def top(self) -> dict[str, list[ast.stmt]]:
        """The statements that bind each name of the module, wherever they stand outside functions and classes."""
        found: dict[str, list[ast.stmt]] = {}
        for statement in statements(self.tree.body):
            for name in bound_by(statement):
                found.setdefault(name, []).append(statement)
        return found


@dataclass(frozen=True)
class Place:
    """Where a name leads: a module (`node` is null), or a statement in one."""

    source: Source
    node: ast.stmt | None = None
    owner: ast.ClassDef | None = None


class Project:
    """Files around the ones that are looked at, found as Python's import would and parsed once."""

    def __init__(self, libraries: Iterable[Path] = ()) -> None:
        self.libraries = [path.resolve() for path in libraries]
        self._sources: dict[Path, Source] = {}
        self._imports: dict[ast.AST, list[tuple[ast.stmt, list[str]]]] = {}  # those inside one function
        self._packages: dict[Path, list[Source]] = {}
        self._modules: dict[tuple[Path, str], Source | None] = {}

    def source(self, path: Path) -> Source:
        path = path.resolve()
        if path not in self._sources:
            root = path.parent
            while (root / "__init__.py").is_file() and root.parent != root:
                root = root.parent
            inside = path.relative_to(root).parts
            self._sources[path] = Source(path, root, inside[:-1])
        return self._sources[path]

    def module(self, name: str, near: Source) -> Source | None:
        """The source of a module, from the tree of the file that imports it or from a library."""
        for root in (near.root, *self.libraries):
            key = (root, name)
            if key not in self._modules:
                base = root.joinpath(*name.split("."))
                found = next((p for p in (base / "__init__.py", base.with_suffix(".py")) if p.is_file()), None)
                self._modules[key] = self.source(found) if found else None
            if (found := self._modules[key]) is not None:
                found.wanted_by_others |= found is not near
                return found
        return None

    def neighbours(self, source: Source) -> list[Source]:
        """The other files of the package that a file belongs to."""
        if not source.package:
            return []
        top = source.root / source.package[0]
        if top not in self._packages:
            self._packages[top] = [self.source(path) for path in python_files(top)]
        return [other for other in self._packages[top] if other is not source]

    def find(self, source: Source, dotted: str, function: ast.AST | None = None, depth: int = DEPTH) -> list[Place]:
        """What a dotted name in a file may refer to: every binding of it that source can show."""
        first, *rest = dotted.split(".")
        places = self._bound_in_function(source, first, function, depth) if function is not None else []
        if not places:
            places = self._in_module(source, first, depth)
        for part in rest:
            places = [found for place in places for found in self._member(place, part, depth)]
        return places

    def _in_module(self, source: Source, name: str, depth: int) -> list[Place]:
        if depth == 0:
            return []
        try:
            bindings = source.top.get(name, [])
        except Unreadable:
            return []
        return [place for statement in bindings for place in self.meaning(source, statement, name, depth - 1)]

    def _bound_in_function(self, source: Source, name: str, function: ast.AST, depth: int) -> list[Place]:
        if function not in self._imports:
            imports = [part for part in ast.walk(function) if isinstance(part, ast.Import | ast.ImportFrom)]
            self._imports[function] = [(statement, bound_by(statement)) for statement in imports]
        found = [statement for statement, names in self._imports[function] if name in names]
        return [place for statement in found for place in self.meaning(source, statement, name, depth - 1)]

    def meaning(self, source: Source, statement: ast.stmt, name: str, depth: int = DEPTH) -> list[Place]:
        """What one statement that binds a name makes of it."""
        match statement:
            case ast.Import():
                for alias in statement.names:
                    if imported_name(alias, statement) == name:
                        module = self.module(alias.name if alias.asname else name, source)
                        return [Place(module)] if module else []
            case ast.ImportFrom():
                for alias in statement.names:
                    if alias.name != "*" and imported_name(alias, statement) == name:
                        return self._imported_from(source, statement, alias.name, depth)
            case ast.Assign(value=ast.Name() | ast.Attribute() as value) if dotted := dotted_name(value):
                places = self.find(source, dotted, None, depth)
                known = [place for place in places if not isinstance(place.node, ast.Assign | ast.AnnAssign)]
                return known or [Place(source, statement)]
            case _:
                return [Place(source, statement)]
        return []

    def _imported_from(self, source: Source, statement: ast.ImportFrom, name: str, depth: int) -> list[Place]:
        if statement.level:
            package = source.package[: len(source.package) - statement.level + 1]
            parts = (*package, *(statement.module or "").split(".")) if statement.module else package
        else:
            parts = tuple((statement.module or "").split("."))
        if not all(parts) or not parts:
            return []
        module = self.module(".".join(parts), source)
        if module is not None and (found := self._in_module(module, name, depth)):
            return found
        inner = self.module(".".join((*parts, name)), source)
        return [Place(inner)] if inner else []

    def _member(self, place: Place, name: str, depth: int) -> Iterator[Place]:
        if place.node is None:
            found = self._in_module(place.source, name, depth)
            inner = self.module(".".join((*module_name(place.source), name)), place.source) if not found else None
            yield from found or ([Place(inner)] if inner else [])
        elif isinstance(place.node, ast.ClassDef):
            yield from self.in_class(place, name, depth)
        elif isinstance(place.node, ast.Assign) and isinstance(place.node.value, ast.Call) and depth:
            called = dotted_name(place.node.value.func)  # an object made by a class of the tree
            for made in self.find(place.source, called, None, depth - 1) if called else ():
                if isinstance(made.node, ast.ClassDef):
                    yield from self.in_class(made, name, depth)

    def in_class(self, place: Place, name: str, depth: int = DEPTH) -> Iterator[Place]:
        """What an attribute of a class is, there or in a base class of the tree."""
        own = [part for part in statements(place.node.body) if name in bound_by(part)]
        yield from (Place(place.source, part, place.node) for part in own)
        if not own and depth:
            for base in place.node.bases:
                for parent in self.find(place.source, dotted_name(base) or "", None, depth - 1):
                    if isinstance(parent.node, ast.ClassDef):
                        yield from self.in_class(parent, name, depth - 1)


def statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Every statement of one scope: also those inside `if`, `try`, `with` and loops, not those inside functions."""
    for statement in body:
        yield statement
        if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from statements(getattr(statement, field, ()))
        for inner in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
            yield from statements(inner.body)


def dotted_name(node: ast.AST) -> str | None:
    """`a.b.c` as text, if that is all there is to an expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join((node.id, *reversed(parts))) if isinstance(node, ast.Name) else None


def python_files(path: Path) -> list[Path]:
    """The Python files below a folder, or the file itself; hidden folders and installed packages are left out."""
    if path.is_file():
        return [path]
    found: list[Path] = []
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            if entry.name not in SKIPPED and not entry.name.startswith("."):
                found += python_files(entry)
        elif entry.suffix in (".py", ".pyi") and entry.is_file():
            found.append(entry)
    return found


def bound_by(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.Import() | ast.ImportFrom():
            return [imported_name(alias, statement) for alias in statement.names]
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [statement.name]
        case ast.Assign():
            return [target.id for target in statement.targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def module_name(source: Source) -> tuple[str, ...]:
    """The name that a file is imported under, part by part."""
    return source.package if source.path.stem == "__init__" else (*source.package, source.path.stem)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
