# SPDX-License-Identifier: Apache-2.0
"""Walk expressions in the order Python evaluates them: what is read under which condition, and when it is true."""

from __future__ import annotations

import ast
from collections.abc import Hashable
from dataclasses import dataclass

from aiterlab.scan.formulas import FALSE, TRUE, Formula, Formulas
from aiterlab.scan.scopes import COMPREHENSIONS, Key, Scope, module_scope
from aiterlab.scan.state import Atom, State, Value, merge


@dataclass(frozen=True)
class Use:
    """A read of a module's name at a point where it may not be bound."""

    name: str
    node: ast.Name
    missing: Formula  # the point is reached and the name is not bound
    function: ast.AST | None  # the function that reads it, null at module level
    attribute: str | None  # `name.attribute` is what is read
    called: bool  # `name(…)`
    caught: str | None  # "NameError" or "Exception": an enclosing `try` catches that


class Expressions:
    """Evaluates expressions on the current state. Statements are the business of `flow.Flow`."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.formulas = Formulas()
        self.scope: Scope = module_scope(tree)
        self.module = self.scope
        self.state = State()
        self.uses: list[Use] = []
        self.functions: list[ast.AST] = []  # those being walked, innermost last
        self.caught: list[str | None] = []
        self._texts: dict[ast.AST, str] = {}
        self._mentions: dict[ast.AST, list[str]] = {}
        self.lazy_annotations = any(
            isinstance(part, ast.ImportFrom)
            and part.module == "__future__"
            and any(alias.name == "annotations" for alias in part.names)
            for part in tree.body
        )

    # Hooks for flow.Flow

    def define(self, node: ast.AST) -> None:
        """A function's body is met; it runs later."""

    def called(self, node: ast.Call) -> tuple[Formula, Formula] | None:
        """What is known after a call: where it returns something true, and where something false."""

    # Reading

    def read(self, node: ast.Name, attribute: str | None = None, called: bool = False) -> None:
        scope, name = key = self.scope.key(node.id)
        if scope != 0 or name not in self.module.names:
            return
        bound = self.state.bound.get(key, FALSE)
        missing = self.formulas.both(self.state.reach, self.formulas.negation(bound))
        if missing != FALSE:
            function = self.functions[-1] if self.functions else None
            caught = next((kind for kind in reversed(self.caught) if kind), None)
            self.uses.append(Use(name, node, missing, function, attribute, called, caught))

    def visit(self, node: ast.AST | None) -> None:
        """Evaluate an expression for its reads alone."""
        match node:
            case None | ast.Constant():
                pass
            case ast.Name():
                if isinstance(node.ctx, ast.Load):
                    self.read(node)
            case ast.Attribute(value=ast.Name() as base):
                self.read(base, attribute=node.attr)
                key = self.scope.key(base.id)
                value = self.state.values.get(key)
                if key[0] == 0 and value is not None and value.cases:  # None has no attributes: what follows ran on
                    none = value.truth(self.formulas, base.id, True)[1]
                    self.state.reach = self.formulas.both(self.state.reach, self.formulas.negation(none))
            case ast.BoolOp() | ast.IfExp() | ast.Compare(ops=[_]):
                self.test(node)
            case ast.Call():
                self.call(node)
            case ast.NamedExpr():
                self.bind(self.scope.target(node.target.id), self.value(node.value), node)
            case ast.Lambda():
                for default in (*node.args.defaults, *node.args.kw_defaults):
                    self.visit(default)
                self.define(node)
            case _ if isinstance(node, COMPREHENSIONS):
                self.comprehension(node)
            case _:
                for child in ast.iter_child_nodes(node):
                    self.visit(child)

    def call(self, node: ast.Call) -> tuple[Formula, Formula] | None:
        if isinstance(node.func, ast.Name):
            self.read(node.func, called=True)
        else:
            self.visit(node.func)
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.visit(argument)
        if (outcomes := self.called(node)) is not None:
            self.state.reach = self.formulas.both(self.state.reach, self.formulas.either(*outcomes))
        return outcomes

    def comprehension(self, node: ast.AST) -> None:
        self.visit(node.generators[0].iter)
        outside, before = self.scope, self.state
        self.scope = outside.inner(node)
        self.state = before.under(self.formulas, TRUE)
        own = {(self.scope.number, name): Value((self.scope.number, name)) for name in self.scope.names}
        self.state.values = {**before.values, **own}
        for index, generator in enumerate(node.generators):
            if index:
                self.visit(generator.iter)
            for condition in generator.ifs:
                self.state.reach = self.formulas.both(self.state.reach, self.test(condition))
        for part in (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,):
            self.visit(part)
        self.scope, self.state = outside, before

    # Truth

    def test(self, node: ast.AST) -> Formula:
        """Evaluate an expression as a condition: the formula of its being true."""
        formulas = self.formulas
        match node:
            case ast.Constant():
                return TRUE if node.value else FALSE
            case ast.UnaryOp(op=ast.Not()):
                return formulas.negation(self.test(node.operand))
            case ast.BoolOp():
                return self._short_circuit(node)
            case ast.IfExp():
                condition = self.test(node.test)
                then = self.test_if(condition, node.body)
                otherwise = self.test_if(formulas.negation(condition), node.orelse)
                return formulas.choose(condition, then, otherwise)
            case ast.Compare(ops=[operator], comparators=[other]):
                return self._compared(node, operator, other)
            case ast.Call(func=ast.Name(id="bool"), args=[argument], keywords=[]):
                return self.test(argument)
            case ast.NamedExpr():
                value = self.value(node.value)
                self.bind(self.scope.target(node.target.id), value, node)
                return value.truth(formulas, node.target.id, False)[0]
            case _:
                return self.value(node).truth(formulas, self.text(node), self.lasting(node))[0]

    def value(self, node: ast.AST) -> Value:
        """Evaluate an expression: what conditions on its value will mean."""
        formulas = self.formulas
        match node:
            case ast.Constant():
                return Value(repr(node.value), TRUE if node.value else FALSE, TRUE if node.value is None else FALSE)
            case ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING"):
                return Value("TYPE_CHECKING", FALSE, FALSE)
            case ast.Name():
                self.read(node)
                key = self.scope.key(node.id)
                return self.state.values.get(key) or Value(key)
            case ast.Attribute(value=ast.Name(id="self")) if known := self.state.values.get(("self", node.attr)):
                return known
            case ast.Compare(ops=[_]) | ast.UnaryOp(op=ast.Not()):
                return Value(self._identity(node), self.test(node), FALSE)
            case ast.IfExp() | ast.BoolOp():
                truthy = self.test(node)
                none = formulas.atom(
                    Atom("none", f"{self.text(node)} is None", self._identity(node), self.lasting(node))
                )
                return Value(self._identity(node), truthy, formulas.both(formulas.negation(truthy), none))
            case ast.Lambda() | ast.JoinedStr():
                self.visit(node)
                return Value(_place(node), TRUE, FALSE)
            case ast.List() | ast.Tuple() | ast.Set() | ast.Dict():
                self.visit(node)
                full = bool(node.keys if isinstance(node, ast.Dict) else node.elts)
                return Value(_place(node), TRUE if full else FALSE, FALSE)
            case ast.NamedExpr():
                value = self.value(node.value)
                self.bind(self.scope.target(node.target.id), value, node)
                return value
            case _:
                return self._opaque(node)

    def _opaque(self, node: ast.AST) -> Value:
        """A value that only running could tell: equal texts about equal bindings are equal."""
        formulas = self.formulas
        outcomes = None
        if isinstance(node, ast.Call):
            outcomes = self.call(node)
        else:
            self.visit(node)
        identity, text, lasting = self._identity(node), self.text(node), self.lasting(node)
        truthy = formulas.atom(Atom("test", text, identity, lasting, node))
        none = formulas.atom(Atom("none", f"{text} is None", identity, lasting, node))
        if outcomes is not None:  # what the called function returns is known to this extent
            true, false = outcomes
            self.state.reach = formulas.both(self.state.reach, formulas.choose(truthy, true, false))
        return Value(identity, truthy, formulas.both(formulas.negation(truthy), none))

    def _short_circuit(self, node: ast.BoolOp) -> Formula:
        formulas, conjunction = self.formulas, isinstance(node.op, ast.And)
        result = TRUE if conjunction else FALSE
        for part in node.values:
            outcome = self.test_if(result if conjunction else formulas.negation(result), part)
            result = (formulas.both if conjunction else formulas.either)(result, outcome)
        return result

    def test_if(self, condition: Formula, node: ast.AST) -> Formula:
        """Evaluate a part of an expression that is reached only under a condition."""
        formulas, before = self.formulas, self.state
        self.state = before.under(formulas, condition)
        result = self.test(node)
        elsewhere = before.under(formulas, formulas.negation(condition))
        if self.state.values is before.values:
            self.state.reach = formulas.either(elsewhere.reach, self.state.reach)
        else:  # a `:=` was met
            self.state = merge(formulas, [self.state, elsewhere])
        return result

    def _compared(self, node: ast.Compare, operator: ast.cmpop, other: ast.AST) -> Formula:
        formulas = self.formulas
        negative = isinstance(operator, ast.IsNot | ast.NotEq | ast.NotIn)
        result: Formula | None = None
        if isinstance(other, ast.Constant) and isinstance(operator, ast.Is | ast.IsNot | ast.Eq | ast.NotEq):
            if other.value is None:
                text = self.text(node.left)
                result = self.value(node.left).truth(formulas, text, self.lasting(node.left))[1]
            elif isinstance(other.value, bool):
                truth = self.test(node.left)
                result = truth if other.value else formulas.negation(truth)
        elif isinstance(node.left, ast.Constant) and self.text(other) in ("globals()", "vars()"):
            result = self.state.bound.get((0, node.left.value), FALSE)
        if result is None:
            self.visit(node.left)
            self.visit(other)
            positive = ast.Compare(node.left, [_POSITIVE.get(type(operator), type(operator))()], [other])
            atom = Atom("test", ast.unparse(positive), self._identity(node), self.lasting(node), node)
            result = formulas.atom(atom)
        return formulas.negation(result) if negative else result

    # What an expression is about

    def text(self, node: ast.AST) -> str:
        if node not in self._texts:
            self._texts[node] = " ".join(ast.unparse(node).split())
        return self._texts[node]

    def _names(self, node: ast.AST) -> list[tuple[str, Key]]:
        if node not in self._mentions:
            self._mentions[node] = sorted({part.id for part in ast.walk(node) if isinstance(part, ast.Name)})
        return [(name, self.scope.key(name)) for name in self._mentions[node]]

    def _identity(self, node: ast.AST) -> Hashable:
        values = self.state.values
        return (
            self.text(node),
            tuple((name, values[key].identity if key in values else key[0]) for name, key in self._names(node)),
        )

    def lasting(self, node: ast.AST) -> bool:
        """Can another function ask the same question? Not if it is about a local variable."""
        return all(key[0] == 0 or name == "self" for name, key in self._names(node))

    def bind(self, key: Key, value: Value, node: ast.AST) -> None:
        self.state.bind(key, value)


_POSITIVE = {ast.IsNot: ast.Is, ast.NotEq: ast.Eq, ast.NotIn: ast.In}


def _place(node: ast.AST) -> Hashable:
    return (node.lineno, node.col_offset)
