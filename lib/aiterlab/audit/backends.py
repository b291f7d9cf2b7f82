# SPDX-License-Identifier: Apache-2.0
"""Which attention backends does a tree have, and which of them does its ROCm platform speak of?

Read out of the tree's source: its list of names, and the function of the platform that chooses, with all it calls.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from aiterlab.trees import Tree

_REGISTRIES = ("v1/attention/backends/registry.py", "attention/backends/registry.py", "platforms/interface.py")
_LISTS = ("AttentionBackendEnum", "_Backend")  # the class that lists them, by its newer and its older name
_PLATFORM = "platforms/rocm.py"
_CHOICE = "get_attn_backend_cls"


def names(tree: Tree) -> dict[str, str]:
    """Every name by which a user can ask for a backend -> its class, or "" where the tree keeps no table of classes."""
    return dict(_names(tree.source, tree.fingerprint))


def of_rocm(tree: Tree) -> list[str]:
    """The names that the platform's own choice speaks of, in the order of the tree's list."""
    spoken_of = _spoken_of(tree.source, tree.fingerprint)
    return [name for name in names(tree) if name in spoken_of]


def is_latent(name: str, path: str) -> bool:
    """Whether a backend is one for multi-head latent attention."""
    return ".mla." in path or "MLA" in name


@cache
def _names(package: Path, fingerprint: str) -> tuple[tuple[str, str], ...]:
    for file in _REGISTRIES:
        path = package / file
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else ():
            if isinstance(node, ast.ClassDef) and node.name in _LISTS:
                return tuple(_members(node))
    return ()


def _members(listing: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for statement in listing.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            value = statement.value
            path = value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""
            # A name without a class is one that somebody registers later, unless no name has one.
            if path or not isinstance(value, ast.Constant):
                yield statement.targets[0].id, path


@cache
def _spoken_of(package: Path, fingerprint: str) -> frozenset[str]:
    found = set()
    for function in functions_of_the_choice(package):
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and "Backend" in node.value.id:
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and ".attention.backends." in str(node.value):
                found.add(node.value.split(".")[-2].upper())  # a class's path; its module bears the backend's name
    return frozenset(found)


def functions_of_the_choice(package: Path) -> list[ast.FunctionDef]:
    """The platform's function that chooses a backend, and the functions of its module that it calls."""
    tree = ast.parse((package / _PLATFORM).read_text(encoding="utf-8"))
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    found, waiting = {}, [_CHOICE]
    while waiting:
        name = waiting.pop()
        if name in functions and name not in found:
            found[name] = functions[name]
            waiting += mentions(functions[name])
    return list(found.values())


def mentions(node: ast.AST) -> Iterator[str]:
    """Every name and attribute in this piece of code."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.Name):
            yield part.id
