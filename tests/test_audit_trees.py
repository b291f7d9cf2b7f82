# SPDX-License-Identifier: Apache-2.0
"""The statements on real trees: where the regression begins and ends, and what a release of 2026 breaks."""

import argparse
import shlex
from collections.abc import Sequence

import pytest

from aiterlab import trees
from aiterlab.audit import narrow, statements
from aiterlab.audit.judgement import Judgement
from aiterlab.machines import Machine
from aiterlab.machines.description import with_switch
from aiterlab.probes import Cell, pool
from aiterlab.probes.layer import Layer

pytestmark = pytest.mark.slow
FA = "ROCM_AITER_FA"


def cell(tree: str, switch: str, explicit: str | None = None, *, layer=None, **machine) -> Cell:
    asked = with_switch(Machine(**machine), switch)
    return Cell(trees.get(tree), asked, explicit, layer=layer or Layer(), drive=False)


def judged(cells: Sequence[Cell]) -> dict[tuple[str, str], Judgement]:
    return {(j.tree, j.statement.id): j for j in statements.judge(pool.ask(cells))}


def test_availability_breaks_in_the_regression_and_nowhere_around_it():
    around = ("release:0.15.1", "regressed", "release:0.16.0")
    found = judged([cell(tree, switch, FA) for tree in around for switch in ("unset", "1")])
    assert [found[tree, "availability"].verdict for tree in around] == ["holds", "broken", "holds"]
    assert [found[tree, "bound-names"].verdict for tree in around] == ["holds", "broken", "holds"]
    (trap,) = found["regressed", "bound-names"].violations
    assert trap.what.startswith("vllm/v1/attention/backends/rocm_aiter_fa.py:")
    assert trap.what.endswith("uses `aiter`, which is not bound: Python's builtin aiter stands in for it")


def test_what_0_32_0_breaks():
    tree = "release:0.32.0"
    cells = [
        cell(tree, "1"),
        cell(tree, "1", FA),
        cell(tree, "0", layer=Layer(head_size=72)),
        cell(tree, "0", FA, aiter=False),
        cell(tree, "1", "ROCM_AITER_UNIFIED_ATTN", arch="gfx90a"),
    ]
    found = judged(cells)
    told = {name: [violation.what for violation in found[tree, name].violations] for _, name in found}
    assert told["documented-default"] == [
        "auto-selection takes ROCM_ATTN, not ROCM_AITER_FA, although the switch is on"
    ]
    assert told["switch-off"] == ["auto-selection takes ROCM_AITER_UNIFIED_ATTN although the switch is off"]
    assert told["missing-library"] == ["ROCM_AITER_FA is accepted although AITER is not installed"]
    assert told["architecture"] == [
        "ROCM_AITER_UNIFIED_ATTN is accepted on a GPU that this tree does not count as supported"
    ]
    assert told["explicit-choice"] == told["availability"] == told["bound-names"] == []
    for name in ("documented-default", "switch-off", "missing-library", "architecture"):
        (violation,) = found[tree, name].violations
        assert violation.what in told_again(violation.command)[name]


def told_again(command: str) -> dict[str, list[str]]:
    """What the statements say to the cells that a printed command describes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tree")
    narrow.add_options(parser)
    program, words = shlex.split(command)[:4], shlex.split(command)[4:]
    assert program == ["python", "-m", "aiterlab", "audit"]
    options = parser.parse_args(words)
    found = judged(narrow.cells(trees.get(options.tree), options))
    return {name: [violation.what for violation in judgement.violations] for (_, name), judgement in found.items()}
