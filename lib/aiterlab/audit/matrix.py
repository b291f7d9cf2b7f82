# SPDX-License-Identifier: Apache-2.0
"""Which cells show what a tree selects? A set that takes under a minute, and all of them.

The cells are made so that statements can compare: each one has others from which it differs in one factor. What there
is to vary (switches, backends) is found in the tree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from itertools import product

from aiterlab import pairwise
from aiterlab.audit import backends, switches
from aiterlab.audit.checks import GOVERNED
from aiterlab.audit.switches import Switch
from aiterlab.machines import ARCHITECTURES, Machine
from aiterlab.machines.description import SWITCH_POSITIONS, with_switch
from aiterlab.probes.cells import Cell
from aiterlab.probes.layer import HEAD_SIZES, Layer
from aiterlab.trees import Tree

SUPPORTED = "gfx942"  # the GPU on which everything is varied
OTHERS = ("gfx950", "gfx1201")  # and the two that AITER's newer code treats apart
OLDER_CHOICE = "VLLM_ATTENTION_BACKEND"
MISSPELT = "VLLM_ROCM_USE_AITR"  # a name that no release knows
LATENT = Layer(kind="mla", block_size=None)
ENCODER = Layer(kind="encoder")
DRAFT = Layer(role="draft")
DECODER_FACTORS = {
    "head_size": (64, 72, 128, 256, 512),
    "dtype": ("float16", "bfloat16"),
    "kv_cache_dtype": ("auto", "fp8"),
    "block_size": (None, 16, 64),
}
LATENT_FACTORS = {
    "dtype": ("float16", "bfloat16"),
    "kv_cache_dtype": ("auto", "fp8"),
    "block_size": (None, 1, 16, 64),
}


def default(tree: Tree, architectures: Collection[str] = ARCHITECTURES) -> list[Cell]:
    """About 220 cells on about 60 machines; pairs of factors where all combinations would be too many.

    Args:
        architectures: GPUs of the machines; most is varied on gfx942.
    """
    cells = _distinct(Cell(tree, *question, drive=False) for question in _default(tree))
    return [cell for cell in cells if cell.machine.arch in architectures]


def _default(tree: Tree) -> Iterator[tuple[Machine, str | None, tuple, Layer]]:
    for machine in _machines():
        yield machine, None, (), Layer()
    for machine, explicit, layer in (*_explicit(tree), *_moved_switches(tree), *_layers(), *_drafts(), *_names()):
        yield machine, explicit, (), layer


def exhaustive(tree: Tree) -> list[Cell]:
    """Every machine with every attention switch moved alone, choice and kind; every layer on the plain machines."""
    moved = [{}, *({switch.name: value} for switch in switches.of_attention(tree) for value in ("0", "1"))]
    choices = [None, *backends.of_rocm(tree)]
    questions = [
        (_with(machine, setting), choice, (), layer)
        for machine, setting, choice, layer in product(
            _machines(), moved, choices, (Layer(), ENCODER, DRAFT, LATENT, replace(LATENT, block_size=16))
        )
    ]
    questions += [
        (machine, choice, (), layer)
        for machine, choice, layer in product(_machines(aiter=(True,)), choices, _all_layers())
    ]
    return _distinct(Cell(tree, *question, drive=False) for question in questions)


def describe(cells: Iterable[Cell]) -> dict[str, int | dict[str, int]]:
    """How many cells there are, on how many machines, and how they spread over each factor."""
    cells = list(cells)
    rows = [cell.coordinates() for cell in cells]
    factors = ("arch", "aiter", "switch", "selection", *(field.name for field in fields(Layer)))
    spread = {factor: dict(Counter(str(row[factor]) for row in rows)) for factor in factors}
    return {"cells": len(cells), "machines": len({cell.group for cell in cells})} | spread


def _machine(position: str = "unset", arch: str = SUPPORTED, aiter: bool = True) -> Machine:
    return with_switch(Machine(arch=arch, aiter=aiter), position)


def _machines(aiter: tuple[bool, ...] = (True, False)) -> list[Machine]:
    return [_machine(*asked) for asked in product(SWITCH_POSITIONS, ARCHITECTURES, aiter)]


def _with(machine: Machine, settings: Mapping[str, str]) -> Machine:
    return replace(machine, switches=machine.switches | settings)


def _kind(tree: Tree, name: str) -> Layer:
    return LATENT if backends.is_latent(name, backends.names(tree)[name]) else Layer()


def _explicit(tree: Tree) -> Iterator[tuple[Machine, str | None, Layer]]:
    """Every backend by name, at every position of the switch and where it is said not to work."""
    of_rocm = backends.of_rocm(tree)
    for name in backends.names(tree):
        positions = SWITCH_POSITIONS if name in of_rocm else SWITCH_POSITIONS[:1]
        for position in positions:
            yield _machine(position), name, _kind(tree, name)
    for name in of_rocm:
        if "AITER" in name:
            for position in SWITCH_POSITIONS:
                yield _machine(position, aiter=False), name, _kind(tree, name)
                yield _machine(position, "gfx1100"), name, _kind(tree, name)
            for arch in ("gfx90a", "gfx950", "gfx1151", "gfx1201"):
                yield _machine("1", arch), name, _kind(tree, name)
        else:
            yield _machine("1", "gfx1201"), name, _kind(tree, name)


def _moved_switches(tree: Tree) -> Iterator[tuple[Machine, str | None, Layer]]:
    """Each attention switch off alone and on alone, with the main switch on; on, too, where that one is unset."""
    found = switches.of_attention(tree)
    weighed = [switch for switch in found if switch.decides or (switch.dead and switch.name in GOVERNED)]
    off = {switch.name: "0" for switch in weighed}
    for switch, arch in product(weighed, (SUPPORTED, OTHERS[1])):
        for value, layer in product(dict.fromkeys(("0", switch.moved())), _layers_of(switch)):
            yield _with(_machine("1", arch), {switch.name: value}), None, layer
        for layer in (Layer(), LATENT):
            yield _with(_machine("1", arch), off | {switch.name: "1"}), None, layer
    for switch in weighed:
        for layer in _layers_of(switch):
            yield _with(_machine(arch=OTHERS[0], position="1"), off | {switch.name: "1"}), None, layer
            yield _with(_machine("unset"), {switch.name: "1"}), None, layer
    others = {switch.name: switch.moved() for switch in found if switch not in weighed}
    if others:  # they are about how attention is computed, or dead; that none of them decides shows in one machine
        for layer in (Layer(), LATENT):
            yield _with(_machine("1"), others), None, layer


def _layers_of(switch: Switch) -> tuple[Layer, ...]:
    """Of the kind that vLLM documents the switch for, or of both."""
    kind, _ = GOVERNED.get(switch.name, (None, ()))
    return tuple(layer for layer in (Layer(), LATENT) if kind in (None, layer.kind))


def _layers() -> Iterator[tuple[Machine, str | None, Layer]]:
    for factors, kind in ((DECODER_FACTORS, "decoder"), (LATENT_FACTORS, "mla")):
        machines = {"position": ("unset", "1"), "arch": (SUPPORTED, OTHERS[1])}
        for row in pairwise.cover(factors | machines):
            machine = _machine(row.pop("position"), row.pop("arch"))
            yield machine, None, Layer(kind=kind, **row)
    for position, head_size in product(SWITCH_POSITIONS, (72, 512)):  # sizes that few backends have
        yield _machine(position), None, Layer(head_size=head_size)
    for position, arch in product(("unset", "1"), (SUPPORTED, *OTHERS)):
        yield _machine(position, arch), None, ENCODER
        yield _machine(position, arch), None, LATENT
    for arch in (SUPPORTED, OTHERS[0]):
        yield _machine("1", arch), None, replace(LATENT, block_size=16)


def _drafts() -> Iterator[tuple[Machine, str | None, Layer]]:
    """Beside each of these stands the same question about the target."""
    for machine, explicit in (
        *((_machine(position), None) for position in SWITCH_POSITIONS),
        (_machine("1", "gfx1201"), None),
        *((_machine(position), "ROCM_AITER_FA") for position in ("unset", "1")),
        (_machine(), "TRITON_ATTN"),
        (_machine("1"), "ROCM_ATTN"),
    ):
        yield machine, explicit, DRAFT
        yield machine, explicit, Layer()


def _names() -> Iterator[tuple[Machine, str | None, Layer]]:
    """A name that is known to no tree, and the one that older trees read."""
    yield _with(_machine(), {MISSPELT: "1"}), None, Layer()
    yield _with(_machine(), {OLDER_CHOICE: "ROCM_AITER_FA"}), None, Layer()


def _all_layers() -> Iterator[Layer]:
    for kind, factors in (("decoder", DECODER_FACTORS), ("encoder", DECODER_FACTORS), ("mla", LATENT_FACTORS)):
        for values in product(*factors.values()):
            yield Layer(kind=kind, **({"head_size": HEAD_SIZES[kind]} | dict(zip(factors, values, strict=True))))
    for head_size in DECODER_FACTORS["head_size"]:
        yield replace(DRAFT, head_size=head_size)


def _distinct(cells: Iterable[Cell]) -> list[Cell]:
    return list({(cell.group, cell.key("")): cell for cell in cells}.values())
