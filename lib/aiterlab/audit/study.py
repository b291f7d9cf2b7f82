# SPDX-License-Identifier: Apache-2.0
"""One audit from names of trees to judgements, step by step, with the checks on how its answers were had.

The notebook's side of what `python -m aiterlab audit` does on a command line.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from aiterlab import host
from aiterlab.audit import detector, matrix, statements, wording
from aiterlab.audit.judgement import Judgement
from aiterlab.machines import ARCHITECTURES
from aiterlab.probes import pool
from aiterlab.progress import Progress
from aiterlab.trees import Tree, get_all, releases

_FACT = ("fact", "pooled", "cold")  # what is no coordinate of a cell in a difference
RANGE = "releases:"  # before `all` or FIRST..LAST, in the place of a tree


@dataclass(frozen=True)
class Pace:
    """How long some cells took, all workers together."""

    cells: int
    seconds: float
    workers: int

    @property
    def seconds_per_cell(self) -> float | None:
        """Amortised: the time that passed, by the cells that were asked in it."""
        return self.seconds / self.cells if self.cells else None


class Audit:
    """Trees, the cells of the default matrix, their answers, and what the statements make of them."""

    def __init__(self, wanted: Sequence[str], workers: int = 0, architectures: Collection[str] = ARCHITECTURES) -> None:
        self.found = get_all(names(wanted))
        self.trees = {name: tree for name, tree in self.found.items() if isinstance(tree, Tree)}
        self.workers = workers or host.usable_cores()
        self.cells = [cell for tree in self.trees.values() for cell in matrix.default(tree, architectures)]
        self.rows: list[dict] = []
        self.judgements: list[Judgement] = []
        self.differing: list[dict] = []
        self.scanned: list[detector.Scanned] = []
        self.pooled = self.cold = Pace(0, 0.0, self.workers)

    @property
    def lacking(self) -> dict[str, str]:
        """Trees that could not be had, with the reason."""
        return {name: str(error) for name, error in self.found.items() if name not in self.trees}

    def ask(self) -> None:
        """Ask every cell, and hold the answers against the statements."""
        start = time.monotonic()
        self.rows = pool.ask(self.cells, workers=self.workers, progress=Progress())
        asked = sum(not row["reused"] for row in self.rows)
        self.pooled = Pace(asked, time.monotonic() - start, self.workers)
        self.judgements = statements.judge_trees(self.rows, self.lacking, list(self.found))

    def ask_again(self, share: float, seed: int) -> None:
        """Ask a random share of the cells in new interpreters, and keep what they answer differently."""
        start, counted = time.monotonic(), _Counted()
        self.differing = pool.compare_cold(
            self.cells, self.rows, share=share, seed=seed, workers=self.workers, progress=counted
        )
        self.cold = Pace(counted.total, time.monotonic() - start, self.workers)

    def scan(self) -> None:
        """Let the detector read every tree."""
        self.scanned = detector.scan(list(self.trees.values()), self.workers)

    def judged(self, tree: str) -> list[Judgement]:
        """The judgements on one tree.

        Raises:
            ValueError: it is not among those asked.
        """
        if tree not in self.found:
            raise ValueError(f"{tree!r} is not among the trees: {', '.join(self.found)}")
        return [judged for judged in self.judgements if judged.tree == tree]

    def chosen(self, looked_at: str, compared: Sequence[str]) -> tuple[str, str, str]:
        """The tree to look at and the two to compare; where they are not named, the last ones that there are.

        Raises:
            ValueError: one is not among those asked, not two are to be compared, or no tree could be had.
        """
        if not self.trees:
            raise ValueError("; ".join(self.lacking.values()) or "name a tree to ask")
        *earlier, last = self.trees
        compared = compared or (earlier[-1] if earlier else last, last)
        if len(compared) != 2:
            raise ValueError(f"compared={list(compared)}: name two trees, or none for the last two")
        for name in (looked_at or last, *compared):
            self.judged(name)
        return looked_at or last, *compared

    def agreement(self) -> str:
        """What the cold processes said, in one sentence."""
        if not self.cold.cells:
            return "No cell was asked again in a new interpreter."
        cells = {
            str(sorted((name, str(value)) for name, value in one.items() if name not in _FACT))
            for one in self.differing
        }
        told = f"{wording.counted(len(cells), 'cell')} of {self.cold.cells}" if cells else f"none of {self.cold.cells}"
        return f"Asked again in a new interpreter, {told} answered differently."


class _Counted(Progress):
    """Progress that remembers how many cells there were."""

    total = 0

    def __init__(self) -> None:
        super().__init__(what="cold cells")

    def __call__(self, done: int, total: int, elapsed_s: float) -> None:
        self.total = total
        super().__call__(done, total, elapsed_s)


def names(wanted: Sequence[str]) -> list[str]:
    """Names of trees, each once, with every range of releases in place of its two ends.

    Raises:
        ValueError: a range without a release in it.
    """
    found: dict[str, None] = {}
    for name in wanted:
        found |= dict.fromkeys(releases.between(name.removeprefix(RANGE)) if name.startswith(RANGE) else [name])
    return list(found)
