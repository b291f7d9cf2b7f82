# SPDX-License-Identifier: Apache-2.0
"""Which environment switches does a tree have for AITER, and which of them does its attention look at?

Both are read out of the tree's source. `vllm/envs.py` says which names there are, with their types and defaults; who
reads a name, directly or through the functions of `_aiter_ops.py` that read it for others, says what it is about. A
switch that nothing reads any more counts as one of attention's too: it may have been.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from aiterlab.audit import backends
from aiterlab.policy import MAIN_SWITCH
from aiterlab.trees import Tree

_NAME = re.compile(r"\bVLLM_\w+")
_CALL = re.compile(r"\brocm_aiter_ops\.(\w+)|\b(is_\w*aiter\w*)")
_READING = re.compile(r"envs\.|environ|getenv|is_set")
_OPERATORS = "_aiter_ops.py"
_ATTENTION = ("attention/", "v1/attention/", "model_executor/layers/attention/", "model_executor/layers/mla.py")
_declared: dict[tuple[Path, str], tuple[Switch, ...]] = {}  # by place and fingerprint of a tree
_known: dict[bytes, tuple[frozenset[str], frozenset[str]]] = {}  # digest of a file -> what it speaks of


@dataclass(frozen=True)
class Switch:
    """One environment variable of a tree."""

    name: str
    type: str  # as annotated: bool, int, Literal[…]
    default: str  # as written: False, 'auto', None
    read_in: tuple[str, ...]  # files that look at it, below vllm/
    decides: bool  # read, directly or through others, by the function that chooses attention backends

    @property
    def of_attention(self) -> bool:
        return self.decides or self.dead or any(file.startswith(_ATTENTION) for file in self.read_in)

    @property
    def dead(self) -> bool:
        """Declared, and looked at by nothing."""
        return not self.read_in

    def moved(self) -> str | None:
        """The value opposite to its default; None: it is no simple switch."""
        return {"False": "1", "True": "0"}.get(self.default) if self.type.startswith("bool") else None


def declared(tree: Tree) -> list[Switch]:
    """The tree's switches for AITER and for ROCm's attention, in the order in which it declares them."""
    key = tree.source, tree.fingerprint
    if key not in _declared:
        _declared[key] = _read(tree)
    return list(_declared[key])


def of_attention(tree: Tree) -> list[Switch]:
    """The switches that attention may depend on and that can be moved, without the main one."""
    found = [switch for switch in declared(tree) if switch.of_attention and switch.moved()]
    return [switch for switch in found if switch.name != MAIN_SWITCH]


def _read(tree: Tree) -> tuple[Switch, ...]:
    package = tree.source
    known = _annotations(ast.parse((package / "envs.py").read_text(encoding="utf-8")))
    through = _functions_of_operators(package)
    readers = _readers(tree, set(known), through)
    deciding = _deciding(package, through)
    found = []
    for name, (kind, default) in known.items():
        about_attention = any(file.startswith(_ATTENTION) for file in readers[name])
        if "AITER" in name or name in deciding or ("ROCM" in name and about_attention):
            found.append(Switch(name, kind, default, tuple(sorted(readers[name])), name in deciding))
    return tuple(found)


def _annotations(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Name -> (type, default) from the block that tells type checkers what the module has."""
    return {
        node.target.id: (ast.unparse(node.annotation), ast.unparse(node.value) if node.value else "None")
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id.startswith("VLLM_")
    }


def _readers(tree: Tree, names: set[str], through: dict[str, set[str]]) -> dict[str, set[str]]:
    """Name -> files that read it; a file that calls a function of the operator module reads what that one reads."""
    readers: dict[str, set[str]] = defaultdict(set)
    for file, digest in tree.files.items():
        if file in ("envs.py", _OPERATORS):
            continue
        read, called = _spoken_of(tree.source / file, digest)
        for name in (names & read).union(*(through.get(function, ()) for function in called)):
            readers[name].add(file)
    return readers


def _spoken_of(path: Path, digest: bytes) -> tuple[frozenset[str], frozenset[str]]:
    """Names of switches in code, and functions of the operator module; releases have half of their files in common."""
    if digest not in _known:
        text = path.read_text(encoding="utf-8", errors="replace")
        read = _NAME.findall(_code_only(text)) if "VLLM_" in text else ()
        called = _CALL.findall(text) if "aiter" in text else ()
        _known[digest] = frozenset(read), frozenset(method or function for method, function in called)
    return _known[digest]


def _code_only(text: str) -> str:
    """The lines that name a switch, without comments and without those of docstrings that only mention it."""
    lines = (line for line in text.splitlines() if "VLLM_" in line)
    return "\n".join(line.partition("#")[0] for line in lines if _READING.search(line))


def _functions_of_operators(package: Path) -> dict[str, set[str]]:
    """Function or method of the operator module -> the switches that it reads, through its class's attributes too."""
    path = package / _OPERATORS
    if not path.exists():
        return {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    attributes = {
        target.id: _read_among(backends.mentions(node.value))
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    direct, calls = {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            mentioned = calls[node.name] = set(backends.mentions(node))
            direct[node.name] = _read_among(mentioned).union(*(attributes.get(name, ()) for name in mentioned))
    for _ in range(4):  # functions that call functions
        for name, called in calls.items():
            direct[name] = direct[name].union(*(direct.get(other, ()) for other in called))
    refresh = {name for name in direct if name.startswith("refresh")}  # reads them all, and only on request
    return {name: reads for name, reads in direct.items() if name not in refresh}


def _deciding(package: Path, through: dict[str, set[str]]) -> set[str]:
    """The switches that the platform's choice of a backend reads."""
    found = set()
    for function in backends.functions_of_the_choice(package):
        mentioned = set(backends.mentions(function))
        found |= _read_among(mentioned).union(*(through.get(name, ()) for name in mentioned))
    return found


def _read_among(mentioned: Iterable[str]) -> set[str]:
    """The switches among the names in a piece of code, as in `envs.NAME`."""
    return {name for name in mentioned if name.startswith("VLLM_")}
