# SPDX-License-Identifier: Apache-2.0
"""Does an expression depend on what the user prefers, that is on a switch in the environment?

Followed through flags, class attributes and functions, within the tree. A switch says yes or no (or names a choice):
paths, ports, sizes and ranks are settings of other kinds and prefer nothing.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from aiterlab.scan.project import Place, Project, Source, Unreadable, dotted_name, statements
from aiterlab.scan.scopes import bound_names

DEPTH = 3  # of calls and flags
_READERS = ("os.getenv", "getenv", "os.environ.get", "environ.get")
_MAPPINGS = ("os.environ", "environ")
_COLLECTIONS = (ast.Dict, ast.List, ast.Set, ast.Tuple, ast.Lambda, type(None))  # hold many answers, not one
_SWITCH = re.compile(r"(^|_)(USE|ENABLED?|DISABLED?|FORCE|ALLOW|NO|BACKEND)(_|$)")
_ASSERTION = re.compile(r"(^|_)(HAS|SKIP|TEST|CI|DEBUG)(_|$)")  # the user states a fact, or takes a risk
_GENERIC = frozenset({"VLLM", "ROCM", "CUDA", "XPU", "CPU", "GPU", "USE", "ENABLE", "ENABLED", "DISABLE", "DISABLED"})
_CLAIM = re.compile(
    r"^_*(?:is|are)_(?:\w+_)?(?:available|found|supported|installed|importable|present)(?:_|$)"
    r"|_(?:available|found|supported|installed|importable)$"
    r"|^_*(?:has|have|can|supports?)_"
)
_ADMITS = re.compile(
    r"enabled|should|prefer|want|requested|default|allowed|selected|(?:^|_)(?:used?|fuse[ds]?|fusion)(?:_|$)"
)


@dataclass(frozen=True)
class Read:
    """One switch that an answer depends on, and the way there."""

    switch: str
    source: Source
    line: int
    through: tuple[str, ...] = ()  # functions and flags between the question and the switch


def claims_availability(name: str) -> bool:
    """Does a function's name say that it answers whether something CAN be used, and nothing about whether it should?"""
    return bool(_CLAIM.search(name)) and not _ADMITS.search(name)


def concerns(switch: str, subject: str) -> bool:
    """Is a switch about the very thing that a function speaks of, so that it prefers it or not?"""
    subject = subject.replace("_", "").lower()
    words = [word.lower() for word in switch.split("_") if word not in _GENERIC and len(word) > 2]
    return any(word in subject for word in words)


class Preferences:
    """Answers for one project, each found once."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self._of_function: dict[tuple[ast.AST, int], list[Read]] = {}
        self._local_names: dict[ast.AST, frozenset[str]] = {}
        self._types: dict[Source, dict[str, str]] = {}

    def of_expression(self, source: Source, node: ast.AST, function: ast.AST | None, owner: ast.ClassDef | None,
                      depth: int = DEPTH) -> list[Read]:  # fmt: skip
        """The switches that an expression reads, standing in a function (of a class) or at module level."""
        found: list[Read] = []
        for part in ast.walk(node):
            if switch := self._switch(source, part, function):
                found.append(Read(switch, source, part.lineno))
            elif depth and isinstance(part, ast.Call):
                found += self._through(source, part.func, function, owner, depth)
            elif depth and isinstance(part, ast.Name | ast.Attribute) and isinstance(part.ctx, ast.Load):
                found += self._flag(source, part, function, owner, depth)
        return list({(read.switch, read.through): read for read in found}.values())

    def of_function(self, place: Place, depth: int = DEPTH) -> list[Read]:
        """The switches that what a function returns depends on."""
        key = (place.node, depth)
        if key not in self._of_function:
            self._of_function[key] = []  # for a function that calls itself
            reads: list[Read] = []
            for expression in deciding(place.node):
                reads += self.of_expression(place.source, expression, place.node, place.owner, depth)
            self._of_function[key] = list({(read.switch, read.through): read for read in reads}.values())
        return self._of_function[key]

    def _through(self, source: Source, called: ast.AST, function: ast.AST | None, owner: ast.ClassDef | None,
                 depth: int) -> list[Read]:  # fmt: skip
        found = []
        for place in self._places(source, called, function, owner):
            if isinstance(place.node, ast.FunctionDef) and place.node is not function:
                for read in self.of_function(place, depth - 1):
                    found.append(Read(read.switch, read.source, read.line, (place.node.name, *read.through)))
                found += self._through_decorators(place, depth)
        return found

    def _through_decorators(self, place: Place, depth: int) -> Iterator[Read]:
        for decorator in place.node.decorator_list:
            name = dotted_name(decorator)
            for gate in self.project.find(place.source, name) if name else ():
                if isinstance(gate.node, ast.FunctionDef):
                    for inner in ast.walk(gate.node):
                        if isinstance(inner, ast.FunctionDef) and inner is not gate.node:
                            for read in self.of_function(Place(gate.source, inner), depth - 1):
                                yield Read(read.switch, read.source, read.line, (place.node.name, name, *read.through))

    def _flag(self, source: Source, node: ast.AST, function: ast.AST | None, owner: ast.ClassDef | None,
              depth: int) -> list[Read]:  # fmt: skip
        """A module's or a class's own variable that was set from a switch."""
        if isinstance(node, ast.Name) and function is not None and node.id in self._locals(function):
            return []
        found = []
        for place in self._places(source, node, function, owner):
            value = getattr(place.node, "value", None)
            if isinstance(place.node, ast.Assign | ast.AnnAssign) and not isinstance(value, _COLLECTIONS):
                name = ast.unparse(node)
                reads = self.of_expression(place.source, value, None, place.owner, depth - 1)
                found += [Read(read.switch, read.source, read.line, (name, *read.through)) for read in reads]
        return found

    def _places(
        self, source: Source, node: ast.AST, function: ast.AST | None, owner: ast.ClassDef | None
    ) -> list[Place]:
        dotted = dotted_name(node)
        if dotted is None:
            return []
        first, _, rest = dotted.partition(".")
        if first in ("self", "cls") and owner is not None and rest and "." not in rest:
            return list(self.project.in_class(Place(source, owner), rest, 2))
        return self.project.find(source, dotted, function)

    def _locals(self, function: ast.AST) -> frozenset[str]:
        if function not in self._local_names:
            self._local_names[function] = bound_names(function)[0]
        return self._local_names[function]

    # Switches

    def _switch(self, source: Source, node: ast.AST, function: ast.AST | None) -> str | None:
        match node:
            case ast.Call(func=reader, args=[ast.Constant(value=str(name)), *_]) if dotted_name(reader) in _READERS:
                return name if _by_name(name) else None
            case ast.Subscript(value=mapping, slice=ast.Constant(value=str(name)), ctx=ast.Load()):
                return name if dotted_name(mapping) in _MAPPINGS and _by_name(name) else None
            case ast.Compare(left=ast.Constant(value=str(name)), comparators=[mapping]):
                return name if dotted_name(mapping) in _MAPPINGS and _by_name(name) else None
            case ast.Attribute(value=base, attr=name, ctx=ast.Load()) if name.isupper() and (
                dotted := dotted_name(base)
            ):
                if dotted.rpartition(".")[2] in ("envs", "env"):
                    return name if self._is_switch(source, dotted, name, function) else None
        return None

    def _is_switch(self, source: Source, module: str, name: str, function: ast.AST | None) -> bool:
        for place in self.project.find(source, module, function):
            if place.node is None and name in (types := self._declared(place.source)):
                is_choice = types[name].removesuffix(" | None") == "bool" or name.endswith("_BACKEND")
                return is_choice and not _ASSERTION.search(name)
        return _by_name(name)

    def _declared(self, source: Source) -> dict[str, str]:
        """The types that a module of environment variables declares, name by name."""
        if source not in self._types:
            try:
                declared = [s for s in statements(source.tree.body) if isinstance(s, ast.AnnAssign)]
            except Unreadable:
                declared = []
            self._types[source] = {ast.unparse(part.target): ast.unparse(part.annotation) for part in declared}
        return self._types[source]


def deciding(function: ast.AST) -> list[ast.AST]:
    """The expressions of a function that decide what it returns: returned ones, conditions on the way to a `return` or
    `raise`, and what local variables in those were set from."""
    if isinstance(function, ast.Lambda):
        return [function.body]
    own = list(statements(function.body))
    expressions: list[ast.AST] = [s.value for s in own if isinstance(s, ast.Return) and s.value is not None]
    for statement in own:
        if isinstance(statement, ast.If | ast.While) and any(
            isinstance(inner, ast.Return | ast.Raise) for inner in statements([*statement.body, *statement.orelse])
        ):
            expressions.append(statement.test)
        if isinstance(statement, ast.Assert):
            expressions.append(statement.test)
    wanted: set[str] = set()
    for expression in expressions:  # grows while it is walked
        names = {part.id for part in ast.walk(expression) if isinstance(part, ast.Name)} - wanted
        wanted |= names
        for statement in own:
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            sets = any(isinstance(target, ast.Name) and target.id in names for target in targets)
            if sets and isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign) and statement.value:
                expressions.append(statement.value)
    return expressions


def _by_name(name: str) -> bool:
    return bool(_SWITCH.search(name)) and not _ASSERTION.search(name)
