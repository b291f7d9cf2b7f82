# SPDX-License-Identifier: Apache-2.0
"""Does the condition under which a module binds a name also stand over its use?"""

from __future__ import annotations

import ast


class Guards:
    """The conditions in one module's source."""

    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source)
        self.above: dict[ast.AST, ast.AST] = {
            child: parent for parent in ast.walk(self.tree) for child in ast.iter_child_nodes(parent)
        }

    def cover(self, name: str, line: int) -> bool:
        """Whether every use of `name` in this line stands under a condition under which the module binds it.

        That is the condition itself, or a flag assigned beside the binding, as in `try: import x; HAS_X = True`.
        """
        signs = self._signs(name)
        uses = [
            node for node in ast.walk(self.tree)
            if isinstance(node, ast.Name) and node.id == name and node.lineno <= line <= (node.end_lineno or line)
        ]  # fmt: skip
        return bool(uses) and all(self._conditions(use) & signs for use in uses)

    def _signs(self, name: str) -> set[str]:
        signs = set()
        for node in ast.walk(self.tree):
            if not self._binds(node, name) or self._function(node):
                continue
            signs |= self._conditions(node)
            for beside in getattr(self.above[node], "body", []) + getattr(self.above[node], "orelse", []):
                if isinstance(beside, ast.Assign) and not isinstance(self.above[node], ast.Module):
                    signs |= {target.id for target in beside.targets if isinstance(target, ast.Name)}
        return signs - {name}

    def _binds(self, node: ast.AST, name: str) -> bool:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return any((alias.asname or alias.name.partition(".")[0]) == name for alias in node.names)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            return node.name == name
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        return any(isinstance(target, ast.Name) and target.id == name for target in targets)

    def _function(self, node: ast.AST) -> bool:
        while (node := self.above.get(node)) is not None:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                return True
        return False

    def _conditions(self, node: ast.AST) -> set[str]:
        """Every part of the tests that must have held where `node` stands, as text."""
        found: set[str] = set()
        while (parent := self.above.get(node)) is not None:
            if isinstance(parent, (ast.If, ast.IfExp)):
                body = parent.body if isinstance(parent.body, list) else [parent.body]
                if node in body:
                    found |= {ast.unparse(part) for part in self._parts(parent.test)}
            elif isinstance(parent, ast.BoolOp) and isinstance(parent.op, ast.And):
                for earlier in parent.values[: parent.values.index(node)]:
                    found |= {ast.unparse(part) for part in self._parts(earlier)}
            node = parent
        return found

    def _parts(self, test: ast.expr) -> list[ast.expr]:
        """The conditions joined by `and`."""
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            return [part for value in test.values for part in self._parts(value)]
        return [test]
