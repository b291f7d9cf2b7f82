# SPDX-License-Identifier: Apache-2.0
"""Which scope a name belongs to, by Python's own rules."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
Key = tuple[int, str]  # which scope, which name


@dataclass(eq=False)
class Scope:
    """A region of source with names of its own."""

    node: ast.AST
    parent: Scope | None = None
    names: frozenset[str] = frozenset()
    module_names: frozenset[str] = frozenset()  # declared `global` in it
    outer_names: frozenset[str] = frozenset()  # declared `nonlocal` in it
    number: int = 0  # 0 is the module
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    children: dict[ast.AST, Scope] = field(default_factory=dict)

    @property
    def is_class(self) -> bool:
        return isinstance(self.node, ast.ClassDef)

    @property
    def is_comprehension(self) -> bool:
        return isinstance(self.node, COMPREHENSIONS)

    def inner(self, node: ast.AST) -> Scope:
        """The scope that a function, class or comprehension opens inside this one."""
        if node not in self.children:
            names, module_names, outer_names = bound_names(node)
            self.children[node] = Scope(node, self, names, module_names, outer_names, next(self.numbers), self.numbers)
        return self.children[node]

    def close(self) -> None:
        """Let go of the scopes inside: they hold this one, and such circles stay in memory until looked for."""
        for inner in self.children.values():
            inner.close()
        self.children.clear()

    def key(self, name: str) -> Key:
        """Where a name that is used here is looked up; the module's scope is 0, and holds what nobody binds, too."""
        scope: Scope | None = self
        while scope and scope.parent:
            if name in scope.module_names:
                break
            visible = not scope.is_class or scope is self
            if visible and name in scope.names and name not in scope.outer_names:
                return scope.number, name
            scope = scope.parent
        return 0, name

    def target(self, name: str) -> Key:
        """Where an assignment here puts a name; one inside a comprehension is a `:=`, which belongs outside it."""
        scope = self
        while scope.is_comprehension and scope.parent:
            scope = scope.parent
        return scope.key(name) if scope.parent else (0, name)


def module_scope(tree: ast.Module) -> Scope:
    names, module_names, _ = bound_names(tree)
    return Scope(tree, names=names | module_names)


def bound_names(node: ast.AST) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """The names that a scope binds, and those it declares global and nonlocal."""
    if isinstance(node, COMPREHENSIONS):
        return frozenset(name for generator in node.generators for name in _stored(generator.target)), *_NONE
    collector = _Collector()
    if isinstance(node, FUNCTIONS):
        arguments = node.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        collector.names |= {argument.arg for argument in named if argument}
    body = node.body if isinstance(node.body, list) else [node.body]
    for part in body:
        collector.visit(part)
    names = collector.names - collector.module_names
    return frozenset(names), frozenset(collector.module_names), frozenset(collector.outer_names)


_NONE = (frozenset(), frozenset())


def imported_name(alias: ast.alias, statement: ast.Import | ast.ImportFrom) -> str:
    """The name that one part of an import statement binds."""
    return alias.asname or (alias.name.partition(".")[0] if isinstance(statement, ast.Import) else alias.name)


def _stored(target: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(target) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}


class _Collector(ast.NodeVisitor):
    """Collects what one scope binds, without entering the scopes inside it."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.module_names: set[str] = set()
        self.outer_names: set[str] = set()

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load):
            self.names.add(node.id)

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        self.names |= {imported_name(alias, node) for alias in node.names if alias.name != "*"}

    visit_ImportFrom = visit_Import

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self.names.add(node.name)
        outside = [*node.decorator_list]
        if isinstance(node, ast.ClassDef):
            outside += [*node.bases, *(keyword.value for keyword in node.keywords)]
        else:
            outside += [*node.args.defaults, *(default for default in node.args.kw_defaults if default)]
        for part in outside:  # a `:=` there binds in this scope
            self.visit(part)

    visit_AsyncFunctionDef = visit_ClassDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for part in (*node.args.defaults, *(default for default in node.args.kw_defaults if default)):
            self.visit(part)

    def _comprehension(self, node: ast.AST) -> None:
        for part in ast.walk(node):  # only a `:=` in it binds outside it
            if isinstance(part, ast.NamedExpr):
                self.names.add(part.target.id)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.name:
            self.names.add(node.name)
        self.generic_visit(node)

    def visit_MatchAs(self, node: ast.MatchAs | ast.MatchStar) -> None:
        if node.name:
            self.names.add(node.name)
        self.generic_visit(node)

    visit_MatchStar = visit_MatchAs

    def visit_MatchMapping(self, node: ast.MatchMapping) -> None:
        if node.rest:
            self.names.add(node.rest)
        self.generic_visit(node)

    def visit_TypeAlias(self, node: ast.AST) -> None:
        self.names.add(node.name.id)

    def visit_Global(self, node: ast.Global) -> None:
        self.module_names |= set(node.names)

    def visit_Nonlocal(self, node: ast.Nonlocal) -> None:
        self.outer_names |= set(node.names)
        self.names |= set(node.names)
