# SPDX-License-Identifier: Apache-2.0
"""In which order and in which nests of processes cells are asked, and what to do when one of these fails.

A unit of work is handed to a process of its own (nest.py): groups of one tree on one GPU. Of a tree that has many
groups, some cells of two are asked first in the plain way, to see what all of them import; what of that a base may
import is tried, and the others begin from there.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from aiterlab import records
from aiterlab.probes import answers
from aiterlab.probes.cells import Cell
from aiterlab.probes.preload import Names

WORTH_LEARNING = 8  # groups beyond the first on each GPU, from which trying imports pays for itself
_SCOUTS = 8  # cells of the largest group: enough that what they all import has nothing to do with what one asks
_UNITS_PER_WORKER, _CELLS_PER_UNIT = 2, 12  # no unit is so large that one worker would be left with it at the end

# What is noted of a unit: groups that need another base; cells that became other units, and that are their groups' own.
_OWN = {"sent_back": list, "handed_on": set, "alone": set}

Finish = Callable[[int, dict], None]


@dataclass
class _Tree:
    """The cells of one tree that are driven, or are not."""

    moved: list[str]  # switches in which they differ
    names: Names
    groups: dict[str, list[int]] = field(default_factory=dict)
    scouts: dict[int, list[str]] = field(default_factory=dict)  # unit -> what it imported
    watched: int = 0  # scouts still running
    planned: bool = False


class Plan:
    """The cells still to be asked.

    Args:
        todo: index -> the cell, and the file for its answer.
        limit_s: seconds after which a process is killed that has neither begun nor ended.
        finish: takes each row as soon as it is there.
        cold: ask each cell in a new interpreter.
    """

    def __init__(
        self, todo: dict[int, tuple[Cell, Path]], workers: int, limit_s: float, finish: Finish, *, cold: bool
    ) -> None:
        self.asked, self.workers, self.limit_s, self._finish = todo, workers, limit_s, finish
        self.todo = set(todo)  # what has no row yet
        self.folder = tempfile.TemporaryDirectory(prefix="aiterlab-")  # logs of what is not a cell
        self.numbers = itertools.count()
        self.ready: deque[dict] = deque()
        self.units: dict[int, dict] = {}  # handed out
        self.trees: list[_Tree] = []
        self.began: dict[tuple, str] = {}  # in what state the first cell began, of all, of a unit, of a group
        if cold:
            self.ready.extend(self._cold(index) for index in todo)
        else:
            self._sort()

    def _sort(self) -> None:
        context = answers.context()
        parts: dict[tuple, list[int]] = {}
        for index, (cell, _) in self.asked.items():
            parts.setdefault((cell.tree.fingerprint, str(cell.tree.environment), cell.drive), []).append(index)
        for key, indices in parts.items():
            moved = sorted({name for i in indices for name in self._cell_at(i).machine.switches})
            tree = _Tree(moved, Names(f"{key} {moved} {context}"))
            for i in indices:
                tree.groups.setdefault(self._cell_at(i).group, []).append(i)
            self.trees.append(tree)

    def _cell_at(self, index: int) -> Cell:
        return self.asked[index][0]

    def _hardware(self, index: int) -> tuple:
        machine = self._cell_at(index).machine
        return machine.arch, machine.flash_attn

    def next_unit(self) -> dict | None:
        """The next unit that a worker can take; None while everything waits for units that are running."""
        for tree in self.trees:
            if self.ready:
                break
            self._plan(tree)
        if not self.ready:
            return None
        unit = self.ready.popleft()
        self.units[unit["id"]] = unit
        return {name: value for name, value in unit.items() if name not in ("tree", *_OWN)}

    def _plan(self, tree: _Tree) -> None:
        """Make units of a tree's groups, as far as it is known what to import for them."""
        if tree.planned or tree.watched:
            return
        places = {self._hardware(indices[0]) for indices in tree.groups.values()}
        if tree.names.known or len(tree.groups) - len(places) < WORTH_LEARNING:
            tree.planned = True
            self._units(tree)
        elif not tree.scouts:
            largest = max(tree.groups.values(), key=len)
            other = next(indices for indices in reversed(tree.groups.values()) if indices is not largest)
            for indices in (largest[:: ceil(len(largest) / _SCOUTS)], other):
                unit = self._nest(tree, [indices], [])
                for cell in unit["groups"][0]["cells"]:
                    cell["imported"] = self._path("imported")
                self.ready.append(unit)
                tree.scouts[unit["id"]] = []
                tree.watched += 1
        else:
            one, other = tree.scouts.values()
            tree.watched += 1
            candidates = [name for name in one if name in set(other)]
            request = self._cell_at(next(iter(tree.groups.values()))[0]).request()
            asked = {"request": request, "candidates": candidates, "answer": self._path("names"), "tree": tree}
            self.ready.append(self._unit("imports", moved=tree.moved, **asked))

    def _units(self, tree: _Tree) -> None:
        left = [kept for indices in tree.groups.values() if (kept := [i for i in indices if i in self.todo])]
        limit = max(_CELLS_PER_UNIT, ceil(len(self.todo) / (self.workers * _UNITS_PER_WORKER)))
        parts: list[list[list[int]]] = []
        for _, groups in itertools.groupby(sorted(left, key=self._by_hardware), self._by_hardware):
            parts.append([])
            for indices in groups:
                if parts[-1] and sum(map(len, parts[-1])) + len(indices) > limit:
                    parts.append([])
                parts[-1].append(indices)
        for part in sorted(parts, key=lambda part: -sum(map(len, part))):  # the largest first: workers end together
            self.ready.append(self._nest(tree, part, tree.names.names))

    def _by_hardware(self, indices: list[int]) -> tuple:
        return tuple(map(str, self._hardware(indices[0])))

    def _nest(self, tree: _Tree, groups: list[list[int]], preload: list[str]) -> dict:
        told = [
            {
                "request": self._cell_at(indices[0]).request(),
                "log": _log(self.asked[indices[0]][1]) if len(indices) == 1 else self._path("group"),
                "cells": [
                    {"id": i, "request": self._cell_at(i).request(), "answer": str(file), "log": _log(file)}
                    for i in indices
                    for file in (self.asked[i][1],)
                ],
            }
            for indices in groups
        ]
        return self._unit("nest", groups=told, preload=preload, moved=tree.moved, tree=tree)

    def _cold(self, index: int) -> dict:
        cell, file = self.asked[index]
        return self._unit("cold", index=index, request=cell.request(), answer=str(file), log=_log(file))

    def _unit(self, kind: str, **told) -> dict:
        log = {"log": self._path(kind)}
        own = {name: kind() for name, kind in _OWN.items()}
        return {"id": next(self.numbers), "kind": kind, "limit_s": self.limit_s} | log | own | told

    def _path(self, kind: str) -> str:
        return str(Path(self.folder.name) / f"{kind}-{next(self.numbers)}")

    def hear(self, event: dict) -> int:
        """Take in what a unit reports; returns how many units this ended."""
        unit = self.units[event["unit"]]
        if "ended" in event:
            self._cell_ended(unit, event["ended"], event)
        elif "elsewhere" in event:
            unit["sent_back"] += [event["elsewhere"]]
        elif "threads" in event:  # what has threads cannot be forked: these cells get interpreters of their own
            self.ready.extend(self._cold(index) for index in event["ids"])
            unit["handed_on"] |= set(event["ids"])
        elif "alone" in event:
            unit["alone"].add(event["alone"])
        elif "group" in event:
            group = unit["groups"][event["group"]]
            if (first := group["cells"][0]["id"]) in unit["alone"]:
                self._cell_ended(unit, first, event)
            else:
                self._group_ended(unit, group, event)
        else:
            del self.units[unit["id"]]
            {"nest": self._nest_ended, "imports": self._imports_ended, "cold": self._cold_ended}[unit["kind"]](
                unit, event
            )
            return 1
        return 0

    def _cell_ended(self, unit: dict, index: int, ending: dict) -> None:
        cell, file = self.asked[index]
        log = Path(_log(file))
        if log.exists():
            records.scrub_file(log)  # warnings and tracebacks name the files of whoever runs this
        row = answers.read(cell, file, ending) if ending["exit_status"] == 0 else None
        if row and (wrong := self._strange(unit, index, row["began_with"])):
            file.unlink()
            row = answers.unasked(cell, f"not isolated: {wrong}")
        self._done(index, row or answers.unanswered(cell, ending, log))

    def _strange(self, unit: dict, index: int, began_with: dict) -> str | None:
        """What shows that this cell did not begin where the first of its group did; None as it should be."""
        if began_with["answered"]:
            return f"its process had answered {began_with['answered']} cells before"
        scopes = {"root": (), "base": (unit["id"],), "base's globals": (unit["id"],)}
        for name, digest in began_with.items():
            scope = scopes.get(name, (unit["id"], self._cell_at(index).group))
            if self.began.setdefault((name, *scope), digest) != digest:
                return f"it did not begin with the {name} that the first cell there began with"
        return None

    def _group_ended(self, unit: dict, group: dict, ending: dict) -> None:
        left = self._left(unit, group)
        if left and unit["preload"]:  # the plain way decides whether it is the tree or only what was imported for it
            self.ready.appendleft(self._nest(unit["tree"], [left], []))
            unit["handed_on"] |= set(left)
            return
        for index in left:
            self._done(index, answers.unanswered(self._cell_at(index), ending, Path(group["log"])))

    def _left(self, unit: dict, group: dict) -> list[int]:
        """Cells of a group that have no answer, and for which nobody else will give one."""
        given = unit["handed_on"].union(*unit["sent_back"])
        return [cell["id"] for cell in group["cells"] if cell["id"] in self.todo and cell["id"] not in given]

    def _nest_ended(self, unit: dict, ending: dict) -> None:
        tree, sent_back = unit["tree"], unit["sent_back"]
        left = [kept for group in unit["groups"] if (kept := self._left(unit, group))]
        if left and unit["preload"]:
            tree.names.forget()
            self.ready.appendleft(self._nest(tree, left, []))
        else:
            for index in (index for group in left for index in group):
                self._done(index, answers.unanswered(self._cell_at(index), ending, Path(unit["log"])))
        if sent_back:
            served = len(sent_back) < len(unit["groups"])
            self.ready.appendleft(self._nest(tree, sent_back, unit["preload"] if served else []))
        if unit["id"] in tree.scouts:
            tree.watched -= 1
            tree.scouts[unit["id"]] = _imported_by_all(unit["groups"][0])

    def _imports_ended(self, unit: dict, ending: dict) -> None:
        tree, answer = unit["tree"], Path(unit["answer"])
        tree.watched -= 1
        tree.names.replace(json.loads(answer.read_text()) if answer.exists() else [])

    def _cold_ended(self, unit: dict, ending: dict) -> None:
        self._cell_ended(unit, unit["index"], ending)

    def _done(self, index: int, row: dict) -> None:
        self._finish(index, row)
        self.todo.remove(index)


def _imported_by_all(group: dict) -> list[str]:
    """What a group has imported, and then every cell of it, whatever was asked there."""
    lists = [json.loads(file.read_text()) for cell in group["cells"] if (file := Path(cell["imported"])).exists()]
    common = set.intersection(*map(set, lists)) if lists else set()
    return [name for name in max(lists, key=len, default=[]) if name in common]


def _log(file: Path) -> str:
    return str(file.with_suffix(".log"))
