# SPDX-License-Identifier: Apache-2.0
"""Walk a module's statements in the order Python runs them, all branches at once.

The module's body comes first: it says under which condition every name ends up bound. Then the functions that matter
are walked from that end, each read with the condition under which it is reached. What is understood: `if`, `try`
(each statement in it may be the one that fails), loops, `match`, `with suppress(…)`, early `return` and `raise`,
`assert`, flags set beside an import, functions of the module that check or raise, and what `__init__` has ensured
before another method runs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable

from aiterlab.scan.bindings import Bindings, position
from aiterlab.scan.formulas import FALSE, TRUE, Formula
from aiterlab.scan.scopes import imported_name
from aiterlab.scan.state import Atom, State, Value, merge

NEVER_RETURN = ("sys.exit", "os._exit", "exit", "quit", "pytest.skip", "pytest.fail", "pytest.exit")
CATCH_ALL = ("Exception", "BaseException")


class Flow(Bindings):
    """One module, walked."""

    def run(self) -> None:
        """Walk the module's body."""
        self.block(self.tree.body)
        self.end = self.state

    def block(self, body: Iterable[ast.stmt]) -> None:
        for statement in body:
            if self.state.reach == FALSE:
                return
            compound = isinstance(statement, ast.If | ast.Try | ast.With | ast.Match)
            if compound:
                self.blocks.append(statement)
            self.statement(statement)
            if compound:
                self.blocks.pop()

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.If():
                self.branch(self.test(node.test), node.body, node.orelse, self.text(node.test))
            case ast.Try():
                self.attempt(node)
            case ast.For() | ast.AsyncFor() | ast.While():
                self.loop(node)
            case ast.With() | ast.AsyncWith():
                self.context(node)
            case ast.Match():
                self.cases(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self.function(node)
            case ast.ClassDef():
                self.klass(node)
            case ast.Import() | ast.ImportFrom():
                self.may_fail(node)
                for alias in node.names:
                    if alias.name == "*":
                        self.open_ended = True
                        continue
                    name = imported_name(alias, node)
                    identity = ("import", getattr(node, "module", None), getattr(node, "level", 0), alias.name)
                    # an imported name may be a flag; a module is always true
                    known = (TRUE, FALSE) if isinstance(node, ast.Import) else (None, None)
                    self.bind(self.scope.target(name), Value(identity, *known), node)
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                self.assign(node)
            case ast.Return():
                truth = self.test(node.value) if node.value and self.wants_truth else (self.visit(node.value) or FALSE)
                self.returns.append((self.state, truth))
                self.state = State(FALSE)
            case ast.Raise():
                self.visit(node.exc)
                self.visit(node.cause)
                if self.catchers:
                    self.catchers[-1].append(self.state)
                self.state = State(FALSE)
            case ast.Assert():
                holds = self.test(node.test)
                if self.catchers:
                    self.catchers[-1].append(self.state.under(self.formulas, self.formulas.negation(holds)))
                self.state.reach = self.formulas.both(self.state.reach, holds)
            case ast.Break() | ast.Continue():
                if self.breaks:
                    self.breaks[-1].append(self.state)
                self.state = State(FALSE)
            case ast.Delete():
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        key = self.scope.target(target.id)
                        self.state.unbind(key)
                        self.deleted.add(target.id)
                    else:
                        self.visit(target)
            case ast.Expr():
                self.expression(node.value)
            case ast.Pass() | ast.Global() | ast.Nonlocal():
                pass
            case _:
                for child in ast.iter_child_nodes(node):
                    self.visit(child)

    def expression(self, node: ast.AST) -> None:
        self.visit(node)
        if isinstance(node, ast.Constant):
            return
        self.may_fail(node)
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function in NEVER_RETURN:
                self.state = State(FALSE)
            elif function.startswith(("globals()", "vars()")) or function in ("exec", "setattr"):
                self.open_ended = self.open_ended or not self.functions or function.startswith("globals()")

    def branch(self, condition: Formula, body: list, otherwise: list, text: str) -> None:
        formulas, before = self.formulas, self.state
        after = []
        for holds, statements, label in (
            (condition, body, text),
            (formulas.negation(condition), otherwise, f"not ({text})"),
        ):
            self.state = before.under(formulas, holds)
            with _pushed(self.path, label):
                self.block(statements)
            after.append(self.state)
        self.state = merge(formulas, after)

    def attempt(self, node: ast.Try) -> None:
        formulas = self.formulas
        failed: list[State] = []
        self.catchers.append(failed)
        kinds = {kind for handler in node.handlers for kind in _types(handler)}
        broad = "NameError" if "NameError" in kinds else "Exception" if kinds & {*CATCH_ALL, ""} else None
        self.caught.append(broad)
        with _pushed(self.path, self._success(node)):
            self.block(node.body)
            self.catchers.pop()
            self.caught.pop()
            propagating: list[State] = []
            self.catchers.append(propagating)  # failures in `else` and in handlers pass this `try` by
            self.block(node.orelse)
        after = [self.state]
        rest = merge(formulas, failed)
        for handler in node.handlers:
            if rest.reach == FALSE:
                break
            kinds = _types(handler)
            everything = bool(kinds & {*CATCH_ALL, ""})
            caught = (
                TRUE
                if everything
                else formulas.atom(Atom("caught", f"except {' | '.join(sorted(kinds))}", position(handler)))
            )
            self.state = rest.under(formulas, caught)
            with _pushed(self.path, f"the except of line {handler.lineno} is taken"):
                if handler.name:
                    self.bind(self.scope.target(handler.name), Value(position(handler), TRUE, FALSE), handler)
                self.block(handler.body)
                if handler.name:
                    self.state.unbind(self.scope.target(handler.name))
            after.append(self.state)
            rest = rest.under(formulas, formulas.negation(caught))
        propagating.append(rest)
        self.catchers.pop()
        self.finish(node.finalbody, merge(formulas, after), merge(formulas, propagating))

    def _success(self, node: ast.Try) -> str:
        imports = [part for part in node.body if isinstance(part, ast.Import | ast.ImportFrom)]
        if len(imports) == 1 and len(self.text(imports[0])) < 60:
            return f"`{self.text(imports[0])}` works"
        return (
            f"the imports of line {imports[0].lineno} work" if imports else f"the try of line {node.lineno} goes well"
        )

    def finish(self, body: list, normal: State, failing: State) -> None:
        formulas = self.formulas
        self.state = normal
        if body:
            self.state = merge(formulas, [normal, failing]).under(formulas, TRUE)
            self.block(body)
            failing = self.state.under(formulas, failing.reach)
            self.state = self.state.under(formulas, normal.reach)
        if self.catchers and failing.reach != FALSE:
            self.catchers[-1].append(failing)

    def loop(self, node: ast.For | ast.AsyncFor | ast.While) -> None:
        """The body is walked once; what it assigns is unknown when it starts."""
        formulas = self.formulas
        if not isinstance(node, ast.While):
            self.visit(node.iter)
            self.may_fail(node.iter)
        stored = {p.id for p in ast.walk(node) if isinstance(p, ast.Name) and isinstance(p.ctx, ast.Store)}
        unknown = {self.scope.target(name): Value((position(node), name)) for name in stored}
        self.state.values = {**self.state.values, **unknown}
        entered = self.test(node.test) if isinstance(node, ast.While) else TRUE
        before = self.state.under(formulas, formulas.negation(entered))
        self.state = self.state.under(formulas, entered)
        self.breaks.append([])
        if not isinstance(node, ast.While):
            self.store(node.target, None, node)
        self.block(node.body)
        after = merge(formulas, [self.state, *self.breaks.pop()])
        if isinstance(node, ast.While) and entered != TRUE:
            after = merge(formulas, [before, after])
        self.state = after
        self.block(node.orelse)

    def context(self, node: ast.With | ast.AsyncWith) -> None:
        suppresses = False
        for item in node.items:
            self.visit(item.context_expr)
            self.may_fail(item.context_expr)
            if item.optional_vars is not None:
                self.store(item.optional_vars, None, node)
            if isinstance(item.context_expr, ast.Call):
                suppresses |= ast.unparse(item.context_expr.func).endswith(("suppress", "raises"))
        if not suppresses:
            self.block(node.body)
            return
        failed: list[State] = []
        self.catchers.append(failed)
        self.caught.append("Exception")
        with _pushed(self.path, f"nothing fails in the with of line {node.lineno}"):
            self.block(node.body)
        self.catchers.pop()
        self.caught.pop()
        self.state = merge(self.formulas, [self.state, *failed])

    def cases(self, node: ast.Match) -> None:
        formulas = self.formulas
        self.visit(node.subject)
        rest, after = self.state, []
        for case in node.cases:
            always = isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None
            matches = (
                TRUE
                if always
                else formulas.atom(Atom("case", f"case {ast.unparse(case.pattern)}", position(case.pattern)))
            )
            self.state = rest.under(formulas, matches)
            for part in ast.walk(case.pattern):
                if name := getattr(part, "name", None) or getattr(part, "rest", None):
                    self.bind(self.scope.target(name), Value(position(part)), part)
            taken = self.test(case.guard) if case.guard else TRUE
            matches = formulas.both(matches, taken)
            self.state = self.state.under(formulas, taken)
            with _pushed(self.path, f"case {ast.unparse(case.pattern)}"):
                self.block(case.body)
            after.append(self.state)
            rest = rest.under(formulas, formulas.negation(matches))
        self.state = merge(formulas, [*after, rest])


def _types(handler: ast.ExceptHandler) -> set[str]:
    if handler.type is None:
        return {""}
    parts = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {ast.unparse(part).rpartition(".")[2] for part in parts}


class _pushed:
    def __init__(self, stack: list, item: str) -> None:
        self.stack, self.item = stack, item

    def __enter__(self) -> None:
        self.stack.append(self.item)

    def __exit__(self, *_) -> None:
        self.stack.pop()
