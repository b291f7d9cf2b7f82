# SPDX-License-Identifier: Apache-2.0
"""Rule positional-order: two functions offered under one name whose parameters stand in different order."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from aiterlab.scan.findings import Finding, Related
from aiterlab.scan.project import Place, Project, Source, Unreadable, bound_by
from aiterlab.scan.scopes import FUNCTIONS

_INDENTED_IMPORT = re.compile(r"^[ \t]+from\s+\S+\s+import\s+(\([^)]*\)|.+)$", re.MULTILINE)
_INDENTED_BINDING = re.compile(r"^[ \t]+(?:def (\w+)\(|(\w+) = [\w.]+\s*(?:#|$))", re.MULTILINE)


@dataclass(frozen=True)
class Offer:
    """One function that a name may stand for."""

    statement: ast.stmt
    parameters: tuple[str, ...]  # positional ones, as the caller counts them
    place: Place


def check(source: Source, project: Project, scanned: Iterable[Source]) -> Iterator[Finding]:
    """Find names that alternative branches of one file bind to functions of different positional order."""
    if "fake_impl=" in source.text:
        yield from _fakes(source)
    names = _bound_twice(source.text)
    if not names:
        return
    for name, alternatives in _alternatives(source.tree.body, names):
        offers = [
            offer for statement in alternatives if (offer := _offer(source, project, statement, name)) is not None
        ]
        for number, other in enumerate(offers):
            earlier = offers[:number]
            if other.parameters in [one.parameters for one in earlier]:
                continue  # that order was told of
            conflicts = ((one, _first_conflict(one.parameters, other.parameters)) for one in earlier)
            first = next(((one, index) for one, index in conflicts if index is not None), None)
            if first is not None:
                yield _finding(source, project, name, first[0], other, first[1], scanned)


def _fakes(source: Source) -> Iterator[Finding]:
    """A custom operator and the stand-in that is traced for it: they are called with the same arguments."""
    for call in ast.walk(source.tree):
        if not isinstance(call, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        pair = [given.get("op_func"), given.get("fake_impl")]
        if not all(isinstance(part, ast.Name) for part in pair):
            continue
        functions = [source.top.get(part.id, []) for part in pair]
        if not all(len(found) == 1 and isinstance(found[0], ast.FunctionDef) for found in functions):
            continue
        real, fake = (found[0] for found in functions)
        one, other = (tuple(a.arg for a in (*f.args.posonlyargs, *f.args.args)) for f in (real, fake))
        if (index := _first_conflict(one, other)) is not None:
            yield Finding(
                "positional-order", "warning", source.path, fake.lineno, fake.col_offset + 1,
                f"`{fake.name}` stands in for `{real.name}` while the operator is traced, but takes `{other[index]}` "
                f"as argument {index + 1} where that takes `{one[index]}`",
                f"give it the parameters of `{real.name}`, in that order",
                (Related(real.lineno, "the operator"), Related(call.lineno, "registered here")),
            )  # fmt: skip


def _bound_twice(text: str) -> set[str]:
    """Names that the text binds in more than one place; most files have none, and need not be parsed."""
    count: dict[str, int] = {}
    for match in _INDENTED_IMPORT.finditer(text):
        for part in match[1].strip("()").replace("\n", " ").split(","):
            words = part.split("#")[0].split()
            if words:
                count[words[-1]] = count.get(words[-1], 0) + 1
    if not count:
        return set()
    for match in _INDENTED_BINDING.finditer(text):
        name = match[1] or match[2]
        count[name] = count.get(name, 0) + 1
    for match in re.finditer(r"^(?:def (\w+)\(|from \S+ import (\w+)$)", text, re.MULTILINE):
        name = match[1] or match[2]
        if name in count:
            count[name] += 1
    return {name for name, times in count.items() if times > 1 and name != "_"}


def _alternatives(body: list[ast.stmt], names: set[str]) -> Iterator[tuple[str, list[ast.stmt]]]:
    """For each name and scope: the statements that bind it in branches of which only one is taken."""
    found: dict[str, list[tuple[tuple, ast.stmt]]] = {}
    inner: list[list[ast.stmt]] = []

    def walk(statements: list[ast.stmt], path: tuple) -> None:
        for statement in statements:
            for name in bound_by(statement):
                if name in names:
                    found.setdefault(name, []).append((path, statement))
            if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
                inner.append(statement.body)
                continue
            arms = [getattr(statement, "body", []), getattr(statement, "orelse", [])]
            if isinstance(statement, ast.Try):  # what `else` binds belongs to the body that went well
                arms = [[*statement.body, *statement.orelse]]
            arms += [handler.body for handler in getattr(statement, "handlers", ())]
            arms += [case.body for case in getattr(statement, "cases", ())]
            for number, arm in enumerate(arms):
                if isinstance(arm, list):
                    walk(arm, (*path, (id(statement), number)))

    walk(body, ())
    for name, bindings in found.items():
        chosen = [
            statement
            for path, statement in bindings
            if any(_exclude(path, other) for other, another in bindings if another is not statement)
        ]
        if len(chosen) > 1:
            yield name, chosen
    for part in inner:
        yield from _alternatives(part, names)


def _exclude(one: tuple, other: tuple) -> bool:
    """Do two paths part at a statement of which one branch is taken, or does one bind over the other's default?"""
    for (statement, arm), (another, another_arm) in zip(one, other, strict=False):
        if statement != another:
            return False
        if arm != another_arm:
            return True
    return len(one) != len(other)


def _offer(source: Source, project: Project, statement: ast.stmt, name: str) -> Offer | None:
    for place in project.meaning(source, statement, name):
        function = place.node
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {ast.unparse(part).partition("(")[0].rpartition(".")[2] for part in function.decorator_list}
            if decorators & {"overload", "property", "setter"}:
                continue
            parameters = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
            if place.owner is not None and "staticmethod" not in decorators:
                parameters = parameters[1:]
            if parameters or not function.args.vararg:
                return Offer(statement, tuple(parameters), place)
    return None


def _first_conflict(one: tuple[str, ...], other: tuple[str, ...]) -> int | None:
    """The first position that the two give to different parameters, although one of them has the other's as well."""
    for index, (mine, others) in enumerate(zip(one, other, strict=False)):
        if mine != others and (mine in other or others in one):
            return index
    return None


def _finding(source: Source, project: Project, name: str, one: Offer, other: Offer, index: int,
             scanned: Iterable[Source]) -> Finding:  # fmt: skip
    calls = list(_positional_calls(source, project, name, index, scanned))
    severity = "warning" if calls else "note"
    few = ("no call in the scanned files depends on it", "1 call depends on it")
    used = few[len(calls)] if len(calls) < len(few) else f"{len(calls)} calls depend on it"
    node = other.statement
    return Finding(
        "positional-order", severity, source.path, node.lineno, node.col_offset + 1,
        f"`{name}` takes `{one.parameters[index]}` as argument {index + 1} if it comes from {_from(one)}, and "
        f"`{other.parameters[index]}` if it comes from {_from(other)}; {used}",
        "call it by keyword, or wrap one of the two so that both take the same order",
        (
            Related(one.statement.lineno, f"`{name}` with the other order"),
            *(Related(line, f"called with more than {index} positional arguments", path) for path, line in calls),
        ),
    )  # fmt: skip


def _from(offer: Offer) -> str:
    if offer.place.node is offer.statement:
        return f"line {offer.statement.lineno}"
    module = ".".join((*offer.place.source.package, offer.place.source.path.stem)).removesuffix(".__init__")
    return f"{module} (line {offer.statement.lineno})"


def _positional_calls(
    source: Source, project: Project, name: str, index: int, scanned: Iterable[Source]
) -> Iterator[tuple]:
    """Calls that fill the position in question without naming it, here and in files that import it from here."""
    for caller in scanned:
        try:
            if f"{name}(" not in caller.text or (caller is not source and source.path.stem not in caller.text):
                continue
            for part in ast.walk(caller.tree):
                if not (isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == name):
                    continue
                positional = len([a for a in part.args if not isinstance(a, ast.Starred)])
                if positional > index and (caller is source or _comes_from(caller, project, name, source)):
                    yield (None if caller is source else caller.path), part.lineno
        except Unreadable:
            continue


def _comes_from(caller: Source, project: Project, name: str, source: Source) -> bool:
    imports = [p for p in ast.walk(caller.tree) if isinstance(p, ast.ImportFrom) and name in bound_by(p)]
    targets = {place.source for statement in imports for place in project.meaning(caller, statement, name)}
    offered = {
        place.source for statement in source.top.get(name, []) for place in project.meaning(source, statement, name)
    }
    return bool(targets & (offered | {source}))
