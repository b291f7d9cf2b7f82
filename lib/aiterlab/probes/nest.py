# SPDX-License-Identifier: Apache-2.0
"""The nested processes in which the cells of one tree on one GPU are answered.

    base      the tree on the GPU, with everything imported that depends neither on the switches nor on AITER
      group   AITER or none, one setting of the switches: has asked what neither the choice nor the layer can change
        cell  one choice and one layer: answers, and ends

Each forks the next, one child at a time, and answers nothing itself; so a cell begins where its group stood before its
first cell, and sees nothing of another one. A group of one cell is that cell.

Which modules a base imports is found by trying, and what they read of the switches all the same is written down
(reads.py): a group that would have read something else is sent back, to begin in a base of its own.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from importlib.machinery import SourceFileLoader
from pathlib import Path

from aiterlab import records
from aiterlab.probes import child, forks, inspection, models
from aiterlab.probes.layer import Layer
from aiterlab.probes.preload import ON_A_MACHINE
from aiterlab.probes.reads import Forbidden, Reads

TREE = "vllm"
ROUNDS = 4  # of trying, each without what failed in the one before

Report = Callable[[dict], None]


def serve(unit: dict, report: Report) -> None:
    """Be the base of one unit of work and fork its groups, one after another.

    Args:
        unit: `groups`, each with its `request` (that of any of its cells), `log` and `cells`, which have a file
            `imported` if they are to say which modules were imported; `preload`, the modules to import here; `moved`,
            the variables in which groups of this tree differ; `limit_s` for each process.
        report: takes what happens, as JSON.
    """
    last, root = next(reversed(sys.modules)), child.state()
    reads = _become_base(unit["groups"][0]["request"], unit["preload"], unit["moved"])
    _settle()
    forks.begun()
    watched = max(unit["groups"], key=lambda group: len(group["cells"]))
    for number, group in enumerate(unit["groups"]):
        below = {"root": _digest(root), "base": _digest(child.state(last))}
        if _at_an_end(number, unit["groups"]):
            below["base's globals"] = _globals()
        running = forks.fork(
            lambda g=group, b=below: _serve_group(unit, g, reads, last, b, g is watched, report), group["log"]
        )
        ending = running.wait(unit["limit_s"])
        report({"group": number, "begun": running.begun, **asdict(ending)})


def _become_base(request: dict, preload: list[str], moved: list[str]) -> Reads:
    child.take_place(request | {"machine": request["machine"] | {"switches": {}}})
    reads = Reads(moved)
    if preload:
        child.set_switches(request, moved)
        with reads:
            _resolve_platform()
            others = [name for name in ON_A_MACHINE if name.partition(".")[0] in sys.modules]
            for name in (*preload, *others):
                importlib.import_module(name)
    return reads


def _resolve_platform() -> None:
    """Do the first thing that a cell does with a tree."""
    from vllm.platforms import current_platform

    current_platform.is_rocm()


def _settle() -> None:
    """Keep what this process holds out of its children's garbage collections, which would copy it."""
    gc.freeze()  # not collected first: that costs more than the garbage of a process that lives for seconds


def _serve_group(unit: dict, group: dict, reads: Reads, last: str, below: dict, watched: bool, report: Report) -> None:
    report({"process": os.getpid()})
    request = group["request"]
    child.set_switches(request, unit["moved"])
    child.settle_aiter(request)
    child.remember_apart(request, "pooled")
    if not reads.holds():
        report({"elsewhere": [cell["id"] for cell in group["cells"]]})
        return
    completed = _Completed()
    with completed:
        probe = child.make_probe(request)
        inspection.expect(models.architectures(Layer(**cell["request"]["layer"]) for cell in group["cells"]))
        probe.begin(request["drive"])
    if (count := threading.active_count()) > 1:
        report({"threads": count, "ids": [cell["id"] for cell in group["cells"]]})
        return
    if len(group["cells"]) == 1:  # this process has no other cell to begin, so it may be the one of this
        (cell,) = group["cells"]
        report({"alone": cell["id"]})
        _answer(probe, cell, below | child.state(last), completed)
        return
    _settle()
    forks.begun()

    def answer(cell: dict, began_with: dict) -> None:
        report({"process": os.getpid()})
        _answer(probe, cell, began_with, completed)

    for number, cell in enumerate(group["cells"]):
        began_with = below | child.state(last)
        if watched and _at_an_end(number, group["cells"]):
            began_with["globals"] = _globals()
        running = forks.fork(functools.partial(answer, cell, began_with), cell["log"], group["log"])
        report({"ended": cell["id"], **asdict(running.wait(unit["limit_s"]))})


def _answer(probe, cell: dict, began_with: dict, completed: _Completed) -> None:
    began_with |= {"answered": child.answered()}
    with completed:
        facts = child.finish(probe, cell["request"])
    if file := cell.get("imported"):
        records.atomic_write_text(Path(file), json.dumps(completed.names))
    child.keep(facts, began_with, cell["answer"])


_containers: dict[str, tuple[int, list]] = {}  # module -> its names' values in one number, and those that hold others


def _at_an_end(number: int, children: list) -> bool:
    """Whether this child is the first or the last, to which the globals are compared.

    Reading what every name is bound to writes to the memory of every value, which a child then has to itself: before
    each child it would take a tenth of the time. What leaks from one stays, so it shows at the last; and what one group
    lets leak, all do, so the largest of each unit is watched that closely.
    """
    return number in (0, len(children) - 1)


def _globals() -> str:
    """A digest of what the names in the tree's modules are bound to, and how much their containers hold."""
    digest = hashlib.sha256()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == TREE:
            values = tuple(vars(module).values())
            bound = hash(tuple(map(id, values)))
            if _containers.get(name, (None, []))[0] != bound:
                _containers[name] = bound, [value for value in values if type(value) in (dict, list, set)]
            digest.update(f"{name} {bound} {list(map(len, _containers[name][1]))}\n".encode())
    return digest.hexdigest()[:16]


def _digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


class _Completed:
    """The tree's modules in the order in which their imports were completed: what a module needs comes before it."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __enter__(self) -> _Completed:
        load = self._load = SourceFileLoader.exec_module

        def exec_module(loader, module) -> None:
            load(loader, module)
            if module.__name__.partition(".")[0] == TREE:
                self.names.append(module.__name__)

        SourceFileLoader.exec_module = exec_module
        return self

    def __exit__(self, *exception) -> None:
        SourceFileLoader.exec_module = self._load


def try_imports(unit: dict, report: Report) -> None:
    """Find out which of `candidates` can be imported in a base: those that read no switch and do not import AITER.

    The platform is resolved before, as it is in a base; what that reads does not count here. Writes the names to the
    file `answer`.
    """
    child.take_place(unit["request"] | {"machine": unit["request"]["machine"] | {"switches": {}}})
    child.set_switches(unit["request"], unit["moved"])
    names = unit["candidates"]
    for _ in range(ROUNDS):
        with tempfile.NamedTemporaryFile("r") as file:
            forks.fork(lambda names=names, to=file.name: _try_imports(names, unit["moved"], to)).wait(unit["limit_s"])
            kept = json.loads(file.read() or "[]")
        if kept == names:
            records.atomic_write_text(Path(unit["answer"]), json.dumps(kept))
            return
        names = kept


def _try_imports(names: list[str], moved: list[str], file: str) -> None:
    with Reads(moved):
        _resolve_platform()
    kept = []
    with Reads(moved, forbid=True) as reads:
        for name in names:
            reads.tripped = False
            with contextlib.suppress(Exception, Forbidden):
                importlib.import_module(name)
                if not reads.tripped:  # a module may have caught what it tripped over
                    kept.append(name)
    Path(file).write_text(json.dumps(kept))
