# SPDX-License-Identifier: Apache-2.0
"""Rules builtin-stand-in and conditional-name: names that are bound only under a condition, and used without it."""

from __future__ import annotations

import ast
import builtins
import itertools
import re
from collections.abc import Iterator

from aiterlab.scan.bindings import Site
from aiterlab.scan.expressions import Use
from aiterlab.scan.findings import SEVERITIES, Finding, Related
from aiterlab.scan.formulas import FALSE, TRUE, TooComplex
from aiterlab.scan.functions import Module
from aiterlab.scan.preference import Preferences, claims_availability
from aiterlab.scan.project import Project, Source, Unreadable, module_name
from aiterlab.scan.state import Atom

# A module can only leave a name unbound if something at its top level is conditional.
_CANDIDATE = re.compile(r"^(?:if|try|for|while|with|match|async)\b", re.MULTILINE)
_GLOBAL = re.compile(r"^[ \t]+global[ \t]+([\w, \t]+)", re.MULTILINE)
_FLAG = re.compile(r"(?:^|_)(?:HAS|HAVE|AVAILABLE|FOUND|SUPPORTED|INSTALLED)(?:_|$)", re.IGNORECASE)
_PLATFORM = re.compile(r"platform|version|\bos\.name\b|\bis_(?:cuda|rocm|hip|xpu|cpu|tpu|musa|npu)", re.IGNORECASE)
_CONDITIONS = (ast.Call, ast.Name, ast.Attribute, ast.Compare, ast.BoolOp)
_LONG = 60  # characters of an import that a message quotes
_SHOWN = 6  # uses and names that a message lists


class TooManyConditions(Exception):
    """A module, or some of its functions, could not be followed to the end."""


def check(source: Source, preferences: Preferences) -> Iterator[Finding]:
    """Find the conditional names of one file.

    Raises:
        TooManyConditions: at the end, if a part of the file was not followed.
    """
    if not _CANDIDATE.search(source.text):
        return
    module = Module(source.tree, source.text)
    try:
        yield from _conditional_names(source, module, preferences)
    finally:
        module.module.close()


def _conditional_names(source: Source, module: Module, preferences: Preferences) -> Iterator[Finding]:
    try:
        module.run()
    except TooComplex:
        raise TooManyConditions("its conditions are too many to follow") from None
    if module.open_ended:
        return
    suspects = _suspects(module, source)
    module.walk_functions(suspects)
    groups: dict[tuple, dict[str, list[Use]]] = {}
    for use in sorted(module.uses, key=lambda use: (use.node.lineno, use.node.col_offset)):
        if use.name in suspects and use.caught != "NameError" and not _is_before_binding(module, use):
            sites = _sites(module, source, use.name)
            key = (hasattr(builtins, use.name), *dict.fromkeys(id(site.block) for site in sites))
            uses = groups.setdefault(key, {}).setdefault(use.name, [])
            if use.node not in [other.node for other in uses]:
                uses.append(use)
    for (is_builtin, *_), names in groups.items():
        if (finding := _finding(source, module, preferences, names, is_builtin)) is not None:
            yield finding
    if module.unfinished:
        functions = ", ".join(getattr(node, "name", "a lambda") for node in module.unfinished)
        raise TooManyConditions(f"the conditions in {functions} are too many to follow")


def _suspects(module: Module, source: Source) -> set[str]:
    """The names that may be missing when the module's functions run."""
    # some function binds these when it is called
    lazy = {name for names in _GLOBAL.findall(source.text) for name in re.findall(r"\w+", names)}
    formulas, end = module.formulas, module.end
    return {
        name
        for name in module.scope.names - lazy - module.deleted
        if formulas.both(end.reach, formulas.negation(end.bound.get((0, name), FALSE))) != FALSE
    }


def _is_before_binding(module: Module, use: Use) -> bool:
    """A use at module level above the binding is a matter of order, and for other tools."""
    sites = module.sites.get(use.name)
    return use.function is None and bool(sites) and use.node.lineno < min(site.node.lineno for site in sites)


def _sites(module: Module, source: Source, name: str) -> list[Site]:
    """Where a name is bound; what only type checkers see was not walked."""
    if name in module.sites:
        return module.sites[name]
    return [Site(node, ("TYPE_CHECKING",), None) for node in source.top.get(name, [])[:1]]


def _finding(source: Source, module: Module, preferences: Preferences, names: dict[str, list[Use]],
             is_builtin: bool) -> Finding | None:  # fmt: skip
    first = min(names, key=lambda name: names[name][0].node.lineno)
    sites = _sites(module, source, first)
    if not sites:
        return None
    uses = [use for name in names for use in names[name]]
    for_types_only = first not in module.sites
    if is_builtin and (for_types_only or _is_deliberate(first, names[first], sites)):
        return None
    grades = {use: _graded(source, module, preferences, use, for_types_only) for use in uses}
    worst = min(2, max(rank for rank, _ in grades.values()))
    uses = [use for use in uses if grades[use][0] >= worst]  # the harmless ones would only hide the others
    names = {name: kept for name in names if (kept := [use for use in names[name] if use in uses])}
    first = min(names, key=lambda name: names[name][0].node.lineno)
    sites, remark = _sites(module, source, first), grades[uses[0]][1]
    if worst == 2 and not is_builtin and not for_types_only and (line := _asked_elsewhere(module, first)):
        worst, remark = 1, f"line {line} asks for that condition: see whether every way here passes it"
    in_functions = worst == 1 and not is_builtin and all(use.function for use in uses)
    if in_functions and (refusal := _refused_elsewhere(preferences.project, source, sites)):
        worst, remark = 0, f"{refusal} refuses with a reason where it does not hold: see whether every way passes it"
    severity = SEVERITIES[worst]
    condition = _condition(module, source, names)
    lines = sorted({use.node.lineno for use in uses})
    where = "line " + _listed(lines) if len(lines) == 1 else "lines " + _listed(lines)
    subject = _listed([f"`{name}`" for name in names])
    is_, its = ("is", "its") if len(names) == 1 else ("are", "their")
    bound = "only for type checkers, never at run time" if for_types_only else f"only if {condition}"
    message = f"{subject} {is_} bound {bound}, and used without that on {where}"
    if example := _example(module, uses):
        message += f" (missing if {example})"
    if is_builtin:
        message += f": Python's builtin `{first}` then silently takes {its} place"
    if remark:
        message += f"; {remark}"
    node = sites[0].node
    related = [Related(site.node.lineno, f"`{first}` is bound here too") for site in sites[1:]]
    related += [Related(use.node.lineno, f"`{use.name}` is used here") for use in uses]
    rule = "builtin-stand-in" if is_builtin else "conditional-name"
    mend = _mend(first, sites, severity, is_builtin, for_types_only)
    return Finding(rule, severity, source.path, node.lineno, node.col_offset + 1, message, mend, tuple(related))


def _is_deliberate(name: str, uses: list[Use], sites: list[Site]) -> bool:
    """A backport of a builtin, or a richer twin of one: the builtin is meant to stand in, and can."""
    if any("version_info" in condition or "builtins" in condition for site in sites for condition in site.conditions):
        return True
    serves = all(use.attribute is None or hasattr(getattr(builtins, name), use.attribute) for use in uses)
    imported = all(isinstance(site.node, ast.ImportFrom | ast.FunctionDef) for site in sites)
    return serves and imported


def _graded(
    source: Source, module: Module, preferences: Preferences, use: Use, for_types_only: bool
) -> tuple[int, str]:
    """How grave one use is (as in SEVERITIES), and why it is less so than it looks."""
    if use.caught == "Exception":
        return 0, "an enclosing try catches what follows"
    if use.function is not None and _guarded_by_callers(module, use):
        return 0, "every call in this file is under the condition"
    if for_types_only:
        return 2, ""
    rank = _rank(source, module, preferences, use)
    return (max(1, 2 * rank) if hasattr(builtins, use.name) else rank), ""


def _asked_elsewhere(module: Module, name: str) -> int | None:
    """The line in a function that asks for the very condition under which a name is bound."""
    wanted = {site.conditions[-1] for site in module.sites[name] if site.conditions}
    for function in module.defined:
        for part in ast.walk(function):
            if isinstance(part, _CONDITIONS) and module.text(part) in wanted:
                return part.lineno
    return None


def _refused_elsewhere(project: Project, source: Source, sites: list[Site]) -> str | None:
    """Where another file of the package asserts the condition, or refuses with a reason if it does not hold.

    That says little of a module which a registry names in a string: whoever asks for it by name comes another way.
    """
    others = project.neighbours(source)
    for condition in {site.conditions[-1] for site in sites if site.conditions}:
        asked = condition.removesuffix(" is not None")
        holds, fails = re.escape(condition), re.escape(f"not {asked}" if asked == condition else f"{asked} is None")
        refusal = re.compile(rf"\bassert {holds}|\bif {fails}:\s+(?:raise\b|return \(?\s*False,)")
        for other in others:
            if asked in _text(other) and (match := refusal.search(other.text)):
                name = ".".join(module_name(source))
                chosen = any(f'"{name}' in _text(file) or f"'{name}" in _text(file) for file in others)
                return None if chosen else f"{other.path.name}:{other.text.count(chr(10), 0, match.start()) + 1}"
    return None


def _text(source: Source) -> str:
    try:
        return source.text
    except Unreadable:
        return ""


def _rank(source: Source, module: Module, preferences: Preferences, use: Use) -> int:
    """2 if a preference decides, 0 if only the platform does, 1 otherwise."""
    formulas, bound = module.formulas, module.end.bound.get((0, use.name), FALSE)
    asked = formulas.support(bound)
    relevant = formulas.forget(use.missing, lambda atom: atom not in asked)
    blamed = [a for a in asked if formulas.both(relevant, formulas.toggled(bound, a)) != FALSE]
    rank = 0
    for atom in blamed or formulas.support(relevant) or asked:
        if atom.kind in ("test", "none"):
            expression = ast.parse(atom.text, mode="eval").body
            if preferences.of_expression(source, expression, None, None):
                return 2
            about_platform = _PLATFORM.search(atom.text) and not _says_available(expression)
            rank = max(rank, 0 if about_platform else 1)
        else:
            rank = max(rank, 1)
    return rank


def _says_available(expression: ast.AST) -> bool:
    names = [
        part.attr if isinstance(part, ast.Attribute) else part.id
        for part in ast.walk(expression)
        if isinstance(part, ast.Name | ast.Attribute)
    ]
    return any(claims_availability(name) or _FLAG.search(name) or name in ("find_spec", "hasattr") for name in names)


def _guarded_by_callers(module: Module, use: Use) -> bool:
    formulas = module.formulas
    entered = module.entered_under(use.function)
    missing = formulas.forget(use.missing, lambda atom: not (isinstance(atom, Atom) and atom.lasting))
    return formulas.both(missing, entered) == FALSE


def _condition(module: Module, source: Source, names: dict[str, list[Use]]) -> str:
    """The condition that all of the names are bound under, in the words of the source."""
    blocks: dict[int, list[tuple[str, ...]]] = {}
    for name in names:
        for site in _sites(module, source, name):
            blocks.setdefault(id(site.block), []).append(site.conditions)
    common = [_common_start(conditions) for conditions in blocks.values()]
    return " or ".join(dict.fromkeys(" and ".join(conditions) for conditions in common if conditions))


def _common_start(conditions: list[tuple[str, ...]]) -> list[str]:
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*conditions, strict=False))
    return [parts[0] for parts in same]


def _example(module: Module, uses: list[Use]) -> str:
    """What makes the first of the names missing: each single answer that is enough, else the fewest that are."""
    formulas, use = module.formulas, uses[0]
    absent = formulas.negation(module.end.bound.get((0, use.name), FALSE))
    answers = [(atom, answer) for atom in formulas.support(absent) for answer in (False, True)]
    enough = [
        _said(atom, answer)
        for atom, answer in answers
        if formulas.given(absent, atom, answer) == TRUE and formulas.given(use.missing, atom, answer) != FALSE
    ]
    if any(enough):
        return " or ".join([part for part in enough if part][:3])
    asked = formulas.support(absent)
    together = formulas.example(formulas.forget(use.missing, lambda atom: atom not in asked))
    return " and ".join([part for atom, answer in together if (part := _said(atom, answer))][:3])


def _said(atom: Atom, answer: bool) -> str:
    if atom.kind == "raises":
        return f"{_code(atom.text)} {'fails' if answer else 'works'}"
    if atom.kind == "test":
        return atom.text if answer else f"not {atom.text}"
    return ""


def _mend(name: str, sites: list[Site], severity: str, is_builtin: bool, for_types_only: bool) -> str:
    if for_types_only:
        return f"import `{name}` where it is used, or quote the annotation"
    imports = [site.node for site in sites if isinstance(site.node, ast.Import | ast.ImportFrom)]
    if is_builtin and imports:
        return f"import it inside the functions that use it, or under another name (`import {name} as {name}_module`)"
    if severity == "error":
        return "import it inside the functions that use it, or ask for availability: a preference must not decide"
    if any(isinstance(site.block, ast.Try) for site in sites):
        return f"bind it in the except branch too (`{name} = None`) and check it where it is used, or let the error out"
    return "bind it in the other branch too, raise there with a reason, or use it only under the same condition"


def _listed(items: list) -> str:
    shown = ", ".join(str(item) for item in items[:_SHOWN])
    return shown + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


def _code(text: str) -> str:
    if " " not in text or text.startswith("line "):
        return text
    return f"`{text if len(text) <= _LONG else text[:_LONG].rpartition(' ')[0] + ' …'}`"
