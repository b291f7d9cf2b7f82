# SPDX-License-Identifier: Apache-2.0
"""Walk a module's functions from the end of its body, and learn from one function what another may rely on."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass

from aiterlab.scan.bindings import Function
from aiterlab.scan.flow import Flow
from aiterlab.scan.formulas import TRUE, Formula, TooComplex
from aiterlab.scan.state import Atom, State, Value, merge

DEPTH = 3  # of calls that are followed into the module's own functions
BUDGET = 10_000  # formulas for one function that is followed
LONGEST = 120  # lines of a function that is followed
TRANSPARENT = (
    "cache",
    "lru_cache",
    "staticmethod",
    "classmethod",
    "wraps",
    "contextmanager",
    "inference_mode",
    "no_grad",
)


@dataclass(frozen=True)
class Reference:
    """A mention of one of the module's own functions."""

    node: ast.AST
    reach: Formula
    called: bool
    function: ast.AST | None  # where it stands


class Module(Flow):
    """One module with its functions."""

    def __init__(self, tree: ast.Module, source: str) -> None:
        super().__init__(tree)
        self.lines = source.splitlines()
        self.references: dict[str, list[Reference]] = {}
        self.walked: set[ast.AST] = set()
        self.unfinished: list[ast.AST] = []  # functions whose conditions were too many to follow
        self.following: list[ast.AST] = []
        self.ensured: dict[ast.ClassDef, State | None] = {}
        self.calling: ast.AST | None = None  # the expression that is being called, so not merely mentioned
        self._summaries: dict[ast.AST, tuple[Formula, Formula] | None] = {}

    def walk_functions(self, names: Iterable[str]) -> None:
        """Walk every function of the module that mentions one of the names, and was not walked yet."""
        if not (names := sorted(names)):
            return
        wanted = re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\b")
        waiting = [function for function in self.defined.values() if not function.outer]
        while waiting:
            function = waiting.pop(0)
            if function.node in self.walked or not self.mentions(function.node, wanted):
                continue
            self.walked.add(function.node)
            known = set(self.defined)
            try:
                with self.formulas.allowance(4 * BUDGET):
                    self.enter(function)
            except TooComplex:
                self.unfinished.append(function.node)
            waiting += [inner for node, inner in self.defined.items() if node not in known]

    def mentions(self, node: ast.AST, wanted: re.Pattern) -> bool:
        """Does code of the function, annotations aside, hold one of the names?"""
        if not wanted.search("\n".join(self.lines[node.lineno - 1 : node.end_lineno])):
            return False
        waiting = list(node.body) if isinstance(node.body, list) else [node.body]
        while waiting:
            part = waiting.pop()
            if not isinstance(part, ast.AST):
                continue
            name = part.id if isinstance(part, ast.Name) else part.attr if isinstance(part, ast.Attribute) else ""
            if name and wanted.fullmatch(name):
                return True
            for field, value in ast.iter_fields(part):
                if field in ("annotation", "returns"):
                    continue
                waiting += [value] if isinstance(value, ast.AST) else value if isinstance(value, list) else ()
        return False

    def enter(self, function: Function) -> State:
        """Walk one function's body; return the state in which it comes back."""
        keep = {name: getattr(self, name) for name in _CONTEXT}
        try:
            return self._run(function)
        finally:
            for name, value in keep.items():
                setattr(self, name, value)

    def _run(self, function: Function) -> State:
        entry = self._entry(function)
        self.scope, self.owner, self.state = function.outside.inner(function.node), None, entry
        self.functions = [*function.outer, function.node]
        self.catchers, self.breaks, self.caught, self.path, self.returns, self.blocks = [], [], [], [], [], []
        if isinstance(function.node, ast.Lambda):
            self.visit(function.node.body)
        else:
            self.block(function.node.body)
        back = merge(self.formulas, [self.state, *(state for state, _ in self.returns)])
        back_true = self.formulas.either(*(self.formulas.both(s.reach, truth) for s, truth in self.returns))
        self.last_outcome = (back_true, self.formulas.both(back.reach, self.formulas.negation(back_true)))
        return back

    def _entry(self, function: Function) -> State:
        formulas = self.formulas
        if function.outer or self.end is None:
            base = (function.met if function.outer else self.state).under(formulas, TRUE)
        else:
            base = self.end.under(formulas, function.met.reach)
        scope = function.outside.inner(function.node)
        values = {(scope.number, name): Value((scope.number, name)) for name in scope.names}
        if function.owner is not None:
            if "self" in scope.names:
                values[(scope.number, "self")] = Value(("self", function.owner.name))
            if self.end is not None and getattr(function.node, "name", "") not in _MAKERS:
                ensured = self.ensure(function.owner)
                if ensured is not None and not _is_static(function.node):
                    base.reach = formulas.both(base.reach, ensured.reach)
                    values |= ensured.values
        base.values = {**base.values, **values}
        return base

    # What a class ensures

    def ensure(self, owner: ast.ClassDef) -> State | None:
        """What holds of every object of a class once it is made: its `__init__` came back."""
        if owner in self.ensured:
            return self.ensured[owner]
        self.ensured[owner] = None  # while it is being found out
        methods = [f for f in self.defined.values() if f.owner is owner and _name(f.node) in _MAKERS]
        if methods:
            try:
                with _silent(self), self.formulas.allowance(BUDGET):
                    back = [self.enter(method) for method in methods]
            except TooComplex:
                return None
            last = back[-1]
            changed = _attributes_stored(owner, outside=_MAKERS)
            lasting = {k: v for k, v in last.values.items() if k[0] == "self" and k[1] not in changed}
            reach = self.formulas.both(*(self._lasting(state.reach) for state in back))
            self.ensured[owner] = State(reach, values=lasting)
        else:
            bases = [self.class_named(base.id) for base in owner.bases if isinstance(base, ast.Name)]
            found = [ensured for base in bases if base is not None and (ensured := self.ensure(base))]
            self.ensured[owner] = found[0] if found else None
        return self.ensured[owner]

    def class_named(self, name: str) -> ast.ClassDef | None:
        sites = self.sites.get(name, [])
        return sites[0].node if len(sites) == 1 and isinstance(sites[0].node, ast.ClassDef) else None

    # What a call tells

    def called(self, node: ast.Call) -> tuple[Formula, Formula] | None:
        function = self._target(node)
        if function is None:
            return None
        if function.node.name == "__init__":
            ensured = self.ensure(function.owner) if function.owner else None
            return (ensured.reach, ensured.reach) if ensured else None
        if function.node in self._summaries:
            return self._summaries[function.node]
        if len(self.following) >= DEPTH or function.node in self.following or not _can_be_followed(function.node):
            return None
        summary = None
        self.following.append(function.node)
        wanted_truth, self.wants_truth = self.wants_truth, True
        try:
            with _silent(self), self.formulas.allowance(BUDGET):
                self.enter(function)
                summary = tuple(self._lasting(outcome) for outcome in self.last_outcome)
        except TooComplex:
            pass
        finally:
            self.wants_truth = wanted_truth
            self.following.pop()
        if self.end is not None:
            self._summaries[function.node] = summary
        return summary

    def _target(self, node: ast.Call) -> Function | None:
        match node.func:
            case ast.Name(id=name) if self.scope.key(name)[0] == 0:
                found = self.by_name.get(name, [])
                return found[0] if len(found) == 1 and len(self.sites.get(name, ())) <= 1 else None
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name):
                owner = self._owner()
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr="__init__" as name):
                owner = self._owner()
                bases = owner.bases if owner else ()
                owner = next((self.class_named(base.id) for base in bases if isinstance(base, ast.Name)), None)
            case _:
                return None
        if owner is None:
            return None
        return next((f for f in self.defined.values() if f.owner is owner and _name(f.node) == name), None)

    def _owner(self) -> ast.ClassDef | None:
        return self.defined[self.functions[0]].owner if self.functions else None

    def _lasting(self, formula: Formula) -> Formula:
        return self.formulas.forget(formula, lambda atom: not (isinstance(atom, Atom) and atom.lasting))

    # Who calls whom

    def visit(self, node: ast.AST | None) -> None:
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name) if node is not self.calling:
                self._refer(name, node, called=False)
        super().visit(node)

    def call(self, node: ast.Call) -> tuple[Formula, Formula] | None:
        match node.func:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name):
                self._refer(name, node, called=True)
                self.calling = node.func
        return super().call(node)

    def read(self, node: ast.Name, attribute: str | None = None, called: bool = False) -> None:
        if self.scope.key(node.id)[0] == 0 and node.id in self.by_name:
            self._refer(node.id, node, called)
        super().read(node, attribute, called)

    def _refer(self, name: str, node: ast.AST, called: bool) -> None:
        if not self.following:
            function = self.functions[-1] if self.functions else None
            self.references.setdefault(name, []).append(Reference(node, self.state.reach, called, function))

    def entered_under(self, node: ast.AST, depth: int = DEPTH) -> Formula:
        """The condition under which the module itself calls one of its functions; TRUE if that cannot be told."""
        if depth == 0 or isinstance(node, ast.Lambda) or self.defined[node].outer:
            return TRUE
        self.walk_functions([node.name])
        references = self.references.get(node.name, [])
        if not references or any(not reference.called for reference in references):
            return TRUE
        conditions = []
        for reference in references:
            condition = self._lasting(reference.reach)
            if reference.function is not None and reference.function is not node:
                condition = self.formulas.both(condition, self.entered_under(reference.function, depth - 1))
            conditions.append(condition)
        return self.formulas.either(*conditions)


_MAKERS = ("__init__", "__new__", "__post_init__", "setUp", "setup_method")
_CONTEXT = ("scope", "owner", "functions", "catchers", "breaks", "caught", "path", "returns", "state", "blocks")


class _silent:
    """Walk without noting what is read: the same function is walked again for that."""

    def __init__(self, module: Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.uses, self.references = list(self.module.uses), {k: list(v) for k, v in self.module.references.items()}

    def __exit__(self, *_) -> None:
        self.module.uses, self.module.references = self.uses, self.references


def _name(node: ast.AST) -> str:
    return getattr(node, "name", "")


def _is_static(node: ast.AST) -> bool:
    return any(ast.unparse(d) in ("staticmethod", "classmethod") for d in getattr(node, "decorator_list", ()))


def _can_be_followed(node: ast.AST) -> bool:
    if not isinstance(node, ast.FunctionDef) or (node.end_lineno or 0) - node.lineno > LONGEST:
        return False
    if any(not ast.unparse(d).partition("(")[0].endswith(TRANSPARENT) for d in node.decorator_list):
        return False
    return not any(isinstance(part, ast.Yield | ast.YieldFrom) for part in ast.walk(node))


def _attributes_stored(owner: ast.ClassDef, outside: tuple[str, ...]) -> set[str]:
    return {
        part.attr
        for method in owner.body
        if getattr(method, "name", None) not in outside
        for part in ast.walk(method)
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
    }
