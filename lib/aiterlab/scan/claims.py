# SPDX-License-Identifier: Apache-2.0
"""Rules availability-reads-preference and preference-gate: what says "can" and asks "should"."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from aiterlab.scan.findings import Finding, Related
from aiterlab.scan.preference import Preferences, Read, claims_availability, concerns
from aiterlab.scan.project import Place, Source, dotted_name, statements

_CANDIDATE = re.compile(
    r"\bdef _*(?:\w*(?:available|found|supported|installed|importable|present)\w*|(?:has|have|can|supports?)_\w+)\("
)
_GATE = re.compile(r"^(?:async )?def \w+\((?:func|fn|f|function|method|callable|wrapped)\b", re.MULTILINE)
_ALLOWED = re.compile(r"(?:^|_)(?:allowed|supported|valid|accepted|permitted|compatible)(?:_|$)")
_LIST = re.compile(r"\b(?:\w+_)?(?:allowed|supported|valid|accepted|permitted|compatible)(?:_\w+)?\b[^=\n]*=[^=]")


def check(source: Source, preferences: Preferences) -> Iterator[Finding]:
    """Find the availability functions, decorators and lists of what is allowed that follow a switch."""
    if _CANDIDATE.search(source.text):
        for function, owner in _functions(source.tree.body, None):
            if claims_availability(function.name) and (found := _availability(source, preferences, function, owner)):
                yield found
    if _GATE.search(source.text):
        for function in source.tree.body:
            if isinstance(function, ast.FunctionDef) and (found := _decorator(source, preferences, function)):
                yield found
    if _LIST.search(source.text) and re.search(r"\.(?:append|extend|add|update)\(|[+|]=", source.text):
        for function, owner in _functions(source.tree.body, None):
            yield from _lists(source, preferences, function, owner)


def _functions(
    body: list[ast.stmt], owner: ast.ClassDef | None
) -> Iterator[tuple[ast.FunctionDef, ast.ClassDef | None]]:
    for statement in statements(body):
        if isinstance(statement, ast.ClassDef):
            yield from _functions(statement.body, statement)
        elif isinstance(statement, ast.FunctionDef):
            yield statement, owner


def _availability(source: Source, preferences: Preferences, function: ast.FunctionDef,
                  owner: ast.ClassDef | None) -> Finding | None:  # fmt: skip
    subject = f"{source.path.stem}{owner.name if owner else ''}{function.name}"
    reads = [
        read
        for read in preferences.of_function(Place(source, function, owner))
        if concerns(read.switch, subject) and not any(claims_availability(step) for step in read.through)
    ]
    if not reads:
        return None
    name = f"{owner.name}.{function.name}" if owner else function.name
    return Finding(
        "availability-reads-preference", "warning", source.path, function.lineno, function.col_offset + 1,
        f"`{name}` says what can be used, but its answer follows {_switches(reads)}",
        "ask only for platform, library and architecture here, and for the switch where a default is chosen",
        _related(source, reads),
    )  # fmt: skip


def _decorator(source: Source, preferences: Preferences, function: ast.FunctionDef) -> Finding | None:
    """A decorator that runs the function only if a switch is on, and says so neither in its name nor in theirs."""
    if not function.args.args:
        return None
    argument = function.args.args[0].arg
    inner = [part for part in ast.walk(function) if isinstance(part, ast.FunctionDef) and part is not function]
    reads: list[Read] = []
    for wrapper in inner:
        if not any(
            isinstance(p, ast.Call) and isinstance(p.func, ast.Name) and p.func.id == argument
            for p in ast.walk(wrapper)
        ):
            continue
        for part in statements(wrapper.body):
            if isinstance(part, ast.If):
                reads += preferences.of_expression(source, part.test, wrapper, None)
    if not reads or "enabled" in function.name:
        return None
    gated = [f for f, _ in _functions(source.tree.body, None) if _is_decorated(f, function.name)]
    explicit = [f for f in gated if "enabled" not in f.name]
    if not explicit and not claims_availability(function.name.removeprefix("if_").removeprefix("requires_")):
        return None
    count = f"{len(gated)} function{'s' if len(gated) != 1 else ''} here"
    return Finding(
        "preference-gate", "warning", source.path, function.lineno, function.col_offset + 1,
        f"the decorator `{function.name}` ({count}) runs what it decorates only if {_switches(reads)} is on, on "
        "explicit paths too",
        "let the decorator ask for availability; leave the switch to the functions that choose a default",
        (*_related(source, reads), *(Related(f.lineno, f"`{f.name}` is gated") for f in explicit)),
    )  # fmt: skip


def _is_decorated(function: ast.FunctionDef, name: str) -> bool:
    return any(dotted_name(decorator) == name for decorator in function.decorator_list)


def _lists(source: Source, preferences: Preferences, function: ast.FunctionDef,
           owner: ast.ClassDef | None) -> Iterator[Finding]:  # fmt: skip
    """An `if` on a switch that puts something on a list of what is allowed."""
    own = list(statements(function.body))
    allowed = {name for part in own for name in _feeds_allowed(part)}
    if not allowed:
        return
    for part in own:
        if not isinstance(part, ast.If):
            continue
        added = [inner for inner in statements(part.body) if _adds_to(inner) in allowed]
        if added and (reads := preferences.of_expression(source, part.test, function, owner)):
            yield Finding(
                "preference-gate", "warning", source.path, part.lineno, part.col_offset + 1,
                f"what `{_adds_to(added[0])}` allows follows {_switches(reads)}: where it is off, an "
                "explicit choice is refused",
                "put it on the list whenever it is available; the switch decides about defaults only",
                (*_related(source, reads), *(Related(inner.lineno, "added here") for inner in added)),
            )  # fmt: skip


def _feeds_allowed(statement: ast.stmt) -> Iterator[str]:
    """The variables that a list of what is allowed is made from, and that list itself."""
    if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
        return
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    for target in targets:
        name = target.attr if isinstance(target, ast.Attribute) else target.id if isinstance(target, ast.Name) else ""
        if _ALLOWED.search(name):
            yield ast.unparse(target)
            value = statement.value
            if isinstance(value, ast.Call) and dotted_name(value.func) in ("tuple", "list", "set", "frozenset"):
                value = value.args[0] if value.args else value
            if isinstance(value, ast.Name | ast.Attribute):
                yield ast.unparse(value)


def _adds_to(statement: ast.stmt) -> str | None:
    match statement:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=base, attr="append" | "extend" | "add" | "update"))):
            return ast.unparse(base)
        case ast.AugAssign(target=target, op=ast.Add() | ast.BitOr()):
            return ast.unparse(target)
    return None


def _switches(reads: list[Read]) -> str:
    parts = {}
    for read in reads:
        steps = [step for step in read.through]
        parts.setdefault(
            read.switch, f"the switch {read.switch}" + (f" (through {' → '.join(steps)})" if steps else "")
        )
    return " and ".join(parts.values())


def _related(source: Source, reads: list[Read]) -> tuple[Related, ...]:
    return tuple(
        Related(read.line, f"reads {read.switch}", None if read.source is source else read.source.path)
        for read in reads
    )
