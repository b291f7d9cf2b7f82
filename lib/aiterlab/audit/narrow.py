# SPDX-License-Identifier: Apache-2.0
"""From the command line to cells: which machine, which choice, which layer is meant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from itertools import product

from aiterlab.machines import Machine
from aiterlab.machines.description import ARCHITECTURES, SWITCH_POSITIONS, with_switch
from aiterlab.policy import MAIN_SWITCH
from aiterlab.probes import Cell
from aiterlab.probes.layer import Layer
from aiterlab.trees import Tree

NATIVE = "native"
_PLAIN = Layer()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that pick cells; each takes a comma-separated list, and all lists are combined."""
    group = parser.add_argument_group(
        "narrow the question",
        "With any of these, just the cells that they describe are asked, and their answers are printed.\n"
        "Each takes one value or several, separated by commas; what is left out has the value in brackets.",
    )

    def add(option: str, values: str, about: str, read: Callable[[str], object] = str) -> None:
        group.add_argument(option, metavar=values, type=_list_of(read), help=about)

    add("--arch", "GFX", f"GPU: {', '.join(ARCHITECTURES)}, or {NATIVE} for the one in this machine [gfx942]", _arch)
    add("--aiter", "present|absent", "whether the library is installed [present]", _one_of("present", "absent"))
    add("--switch", "unset|0|1", f"position of {MAIN_SWITCH} [unset]", _one_of(*SWITCH_POSITIONS))
    add("--explicit", "BACKEND|auto", "backend asked for by name, such as ROCM_AITER_FA [auto]")
    group.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        type=_setting,
        help="environment variable of the machine; repeat it for several [none]",
    )
    add("--kind", "KIND", "of the layer: decoder, encoder or mla [decoder]")
    add("--role", "ROLE", "of its model: target, or draft of speculative decoding [target]")
    add("--head-size", "N", f"of the layer [{_PLAIN.head_size}, or what is usual for the kind]", _number)
    add("--dtype", "DTYPE", f"of the model [{_PLAIN.dtype}]")
    add("--kv-cache-dtype", "DTYPE", f"of the KV cache [{_PLAIN.kv_cache_dtype}]")
    add("--block-size", "N|vllm", f"tokens per KV cache page; vllm leaves it to vLLM [{_PLAIN.block_size}]", _pages)


_MACHINE = {"arch": "gfx942", "aiter": "present", "switch": "unset", "explicit": "auto"}
_LAYER = ("kind", "role", "head_size", "dtype", "kv_cache_dtype", "block_size")


def narrowed(options: argparse.Namespace) -> bool:
    """Whether the command line describes cells of its own."""
    return any(getattr(options, name) for name in ("set", *_MACHINE, *_LAYER))


def cells(tree: Tree, options: argparse.Namespace) -> list[Cell]:
    """Every combination of what the options list, on one tree.

    Raises:
        ValueError: no such layer.
    """
    given = {name: values for name in _LAYER if (values := getattr(options, name))}
    layers = [Layer(**dict(zip(given, values, strict=True))) for values in product(*given.values())]
    machines = product(*(getattr(options, name) or [default] for name, default in _MACHINE.items()))
    asked = []
    for (arch, aiter, switch, explicit), layer in product(machines, layers):
        kind, arch = ("native", None) if arch == NATIVE else ("simulated", arch)
        machine = Machine(kind, arch, aiter == "present", switches=dict(options.set))
        choice = None if explicit == "auto" else explicit
        asked.append(Cell(tree, with_switch(machine, switch), choice, layer=layer, drive=False))
    return asked


def _list_of(read: Callable[[str], object]) -> Callable[[str], list]:
    def parse(text: str) -> list:
        return [read(part.strip()) for part in text.split(",")]

    return parse


def _one_of(*known: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}")
        return text

    return read


_arch = _one_of(*ARCHITECTURES, NATIVE)


def _number(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return int(text)


def _pages(text: str) -> int | None:
    return None if text == "vllm" else _number(text)


def _setting(text: str) -> tuple[str, str]:
    match = re.fullmatch(r"(\w+)=(.*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    if match[1] == MAIN_SWITCH:
        raise argparse.ArgumentTypeError(f"{MAIN_SWITCH} has an option of its own: --switch {match[2]}")
    return match[1], match[2]
