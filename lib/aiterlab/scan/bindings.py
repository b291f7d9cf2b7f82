# SPDX-License-Identifier: Apache-2.0
"""Walk what binds names: assignments, functions and classes."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass

from aiterlab.scan.expressions import Expressions
from aiterlab.scan.formulas import FALSE, TRUE, Formula
from aiterlab.scan.scopes import Key, Scope
from aiterlab.scan.state import Atom, State, Value


@dataclass(frozen=True)
class Site:
    """A statement that binds a name of the module."""

    node: ast.AST
    conditions: tuple[str, ...]
    block: ast.AST | None  # the compound statement that it belongs to


@dataclass(eq=False)
class Function:
    """A function that was met while walking: where, and under which condition it comes to exist."""

    node: ast.AST
    outside: Scope
    owner: ast.ClassDef | None
    met: State
    outer: tuple[ast.AST, ...]


class Bindings(Expressions):
    """Binds names in the current state. Which statements run, and when, is the business of `flow.Flow`."""

    def __init__(self, tree: ast.Module) -> None:
        super().__init__(tree)
        self.end: State | None = None  # of the module's body
        self.defined: dict[ast.AST, Function] = {}
        self.by_name: dict[str, list[Function]] = {}  # functions of the module's own scope
        self.sites: dict[str, list[Site]] = {}  # name -> where the module's body binds it
        self.path: list[str] = []
        self.blocks: list[ast.AST] = []  # the compound statements around, innermost last
        self.catchers: list[list[State]] = []
        self.breaks: list[list[State]] = []
        self.returns: list[tuple[State, Formula | None]] = []
        self.owner: ast.ClassDef | None = None
        self.open_ended = False  # a star import or a write to globals() may bind anything
        self.wants_truth = False  # of what functions return
        self.deleted: set[str] = set()

    def block(self, body: Iterable[ast.stmt]) -> None:
        """Walk statements one after another."""
        raise NotImplementedError

    def bind(self, key: Key, value: Value, node: ast.AST) -> None:
        super().bind(key, value, node)
        if key[0] == 0 and not self.functions:
            self.sites.setdefault(key[1], []).append(Site(node, tuple(self.path), self._block()))

    def _block(self) -> ast.AST | None:
        """What a binding belongs to: the outermost `try` around it, which fails whole, else the innermost statement."""
        attempts = [block for block in self.blocks if isinstance(block, ast.Try)]
        return (attempts or self.blocks[-1:] or [None])[0]

    def may_fail(self, node: ast.AST) -> None:
        """Inside a `try`: leave a copy of this point for its handlers, and go on where nothing failed."""
        if not self.catchers or self.state.reach == FALSE:
            return
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        identity = None if is_import else (node.lineno, node.col_offset)
        atom = Atom("raises", self.text(node) if is_import else f"line {node.lineno}", identity, is_import, node)
        fails = self.formulas.atom(atom)
        self.catchers[-1].append(self.state.under(self.formulas, fails))
        self.state.reach = self.formulas.both(self.state.reach, self.formulas.negation(fails))

    def assign(self, node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> None:
        if isinstance(node, ast.AnnAssign) and not self.functions and not self.lazy_annotations:
            self.visit(node.annotation)
        if node.value is None:
            return
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if isinstance(node, ast.AugAssign):
            self.visit(node.value)
            if isinstance(node.target, ast.Name):
                self.read(node.target)
            value = None
        else:
            value = self.value(node.value)
        if not isinstance(node.value, ast.Constant | ast.Name | ast.Lambda):
            self.may_fail(node)
        for target in targets:
            self.store(target, value, node, node.value)

    def store(self, target: ast.AST, value: Value | None, node: ast.AST, source: ast.AST | None = None) -> None:
        match target:
            case ast.Name():
                self.bind(self.scope.target(target.id), value or Value((position(target), target.id)), node)
            case ast.Tuple() | ast.List():
                parts = source.elts if isinstance(source, ast.Tuple | ast.List) else ()
                for index, element in enumerate(target.elts):
                    same = len(parts) == len(target.elts) and isinstance(parts[index], ast.Constant | ast.Name)
                    self.store(element, self.value(parts[index]) if same else None, node)
            case ast.Starred():
                self.store(target.value, None, node)
            case ast.Attribute(value=ast.Name(id="self")):
                self.state.bind(("self", target.attr), value or Value(position(target)))
            case ast.Subscript() if ast.unparse(target.value) in ("globals()", "vars()"):
                self.open_ended = True
            case _:
                self.visit(target)

    def function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        skipped = FALSE
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and decorator.args:
                called = ast.unparse(decorator.func).rpartition(".")[2]
                if called in ("skipif", "skipIf", "skipUnless"):
                    condition = self.test(decorator.args[0])
                    skipped = condition if called != "skipUnless" else self.formulas.negation(condition)
            self.visit(decorator)
        for default in (*node.args.defaults, *node.args.kw_defaults):
            self.visit(default)
        if not self.lazy_annotations:
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            for annotation in (*(argument.annotation for argument in every if argument), node.returns):
                self.visit(annotation)
        self.define(node, skipped)
        self.bind(self.scope.target(node.name), Value(position(node), TRUE, FALSE), node)

    def define(self, node: ast.AST, skipped: Formula = FALSE) -> None:
        met = self.state.under(self.formulas, self.formulas.negation(skipped))
        function = Function(node, self.scope, self.owner, met, tuple(self.functions))
        self.defined[node] = function
        if not isinstance(node, ast.Lambda) and self.scope is self.module:
            self.by_name.setdefault(node.name, []).append(function)

    def klass(self, node: ast.ClassDef) -> None:
        for part in (*node.decorator_list, *node.bases, *(keyword.value for keyword in node.keywords)):
            self.visit(part)
        outside, owner = self.scope, self.owner
        self.scope, self.owner = outside.inner(node), node
        self.block(node.body)
        self.scope, self.owner = outside, owner
        self.bind(self.scope.target(node.name), Value(position(node), TRUE, FALSE), node)


def position(node: ast.AST) -> tuple[int, int]:
    return (node.lineno, node.col_offset)
