# SPDX-License-Identifier: Apache-2.0
"""Which names does a backend's code use that its module binds on other machines, but not on this one?

A module that binds a name only under a condition or in a `try`, and functions that use it in any case: that is the
trap of the regression. Nothing is run to see it: the module has been imported, its compiled code says which names it
may bind and which of them its functions look up, and its dictionary says which of them it has bound here.
"""

from __future__ import annotations

import builtins
import dis
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType

from aiterlab.probes import guards


def unbound(layer, package: Path) -> list[dict]:
    """Names that functions in the modules of a layer's backend, and of what it inherits from, look up in vain.

    `builtin` is true where Python has a builtin of the same name, which then takes the place of the missing object, and
    `value` names that builtin. Without one the function ends in a NameError when it comes to that line. `kept_off` says
    why it will not come to it (None: nothing keeps it off): "the same condition", under which the name would be bound,
    or "not called", as nothing that this layer can run refers to the function.
    """
    backend = layer.attn_backend
    classes = [cls for own in (backend, type(layer.impl), backend.get_builder_cls()) for cls in own.__mro__]
    modules = [module for module in map(sys.modules.get, dict.fromkeys(cls.__module__ for cls in classes))
               if (getattr(module, "__file__", None) or "").startswith(str(package))]  # fmt: skip
    missing = {module: uses for module in modules if (uses := _missing(module))}
    if not missing:
        return []
    run = _functions_run(layer, classes, modules)
    found = []
    for module, uses in missing.items():
        guarded = guards.Guards(Path(module.__file__).read_text(encoding="utf-8"))
        for name, where in sorted(uses.items()):
            called = [(line, function) for line, function in where if (module.__name__, function) in run]
            open_ones = [(line, function) for line, function in called if not guarded.cover(name, line)]
            shown = open_ones or called or where
            builtin = hasattr(builtins, name)
            found.append(
                {
                    "module": module.__name__,
                    "file": f"vllm{module.__file__.removeprefix(str(package))}",
                    "name": name,
                    "line": min(line for line, _ in shown),
                    "functions": sorted({function for _, function in shown}),
                    "builtin": builtin,
                    "value": f"builtins.{name}" if builtin else None,
                    "kept_off": None if open_ones else "the same condition" if called else "not called",
                }
            )
    return found


def _missing(module: ModuleType) -> dict[str, list[tuple[int, str]]]:
    """Names that the module may bind, has not bound, and that its functions look up: where they do."""
    code = _code(module)
    if vars(module).keys() >= set(code.co_names):
        return {}
    names = _bound(code) - vars(module).keys()
    uses = defaultdict(list)
    for function in _functions(code):
        if names.isdisjoint(function.co_names):
            continue  # reading instructions takes most of a cell's time here, and few functions use such a name
        for step in dis.get_instructions(function):
            if step.opname == "LOAD_GLOBAL" and step.argval in names:
                uses[step.argval].append((step.positions.lineno or function.co_firstlineno, function.co_qualname))
    return dict(uses)


def _bound(code: CodeType) -> set[str]:
    """Names that a module's code may bind, without what `dis` would tell of each of its instructions besides."""
    steps = dis._unpack_opargs(code.co_code)
    return {code.co_names[argument] for _, operation, argument in steps if operation == dis.opmap["STORE_NAME"]}


def _functions_run(layer, classes: list[type], modules: list[ModuleType]) -> set[tuple[str, str]]:
    """(module, function) of all that an engine can come to from this layer, its backend and its metadata builder.

    It starts from their public methods, the builder's constructor and the functions that the layer holds; the layer's
    own constructor has run. From there it follows names, so it may count too much and never too little.
    """
    known = {(module.__name__, code.co_qualname): code for module in modules for code in _functions(_code(module))}
    methods = {(cls.__module__, cls.__qualname__) for cls in classes}
    builder = {(cls.__module__, f"{cls.__qualname__}.__init__") for cls in layer.attn_backend.get_builder_cls().__mro__}
    held = {getattr(value, "__name__", None) for value in vars(layer.impl).values() if callable(value)}
    by_name, by_scope = defaultdict(list), defaultdict(list)
    waiting = []
    for key in known:
        module, function = key
        scope, _, name = function.rpartition(".")
        if (module, scope) not in methods:
            by_scope[module, function.partition(".")[0]].append(key)
            if not scope and name in held:
                waiting.append(key)
        elif name != "__init__" or key in builder:
            by_name[name].append(key)
            if not name.startswith("_") or name.startswith("__") or name in held:
                waiting.append(key)
    run: set[tuple[str, str]] = set()
    while waiting:
        if (key := waiting.pop()) in run:
            continue
        run.add(key)
        module, function = key
        waiting += [other for other in known if other[0] == module and other[1].startswith(f"{function}.<locals>")]
        for step in dis.get_instructions(known[key]):
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                waiting += by_name[step.argval]
            elif step.opname == "LOAD_GLOBAL":
                waiting += by_scope[module, step.argval]
    return run


def _code(module: ModuleType) -> CodeType:
    return module.__spec__.loader.get_code(module.__name__)


def _functions(code: CodeType) -> Iterator[CodeType]:
    """Every function below `code`; the body of a class runs when the module does and counts for its functions only."""
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield part
            yield from _functions(part)
