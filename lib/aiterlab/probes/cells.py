# SPDX-License-Identifier: Apache-2.0
"""A cell: which question was asked of which tree on which machine, and what its answer means in one word."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import product

from aiterlab import policy
from aiterlab.machines import Machine
from aiterlab.machines.description import with_switch
from aiterlab.probes.layer import Layer
from aiterlab.trees import Tree

EXPLICIT = "ROCM_AITER_FA"
SHUFFLE_SWITCH = policy.FEATURES["shuffle_kv_cache"].switch
STEPS = ("prefill", "extend", "decode")
TARGET = Layer()
TRAP = "'builtin_function_or_method' object has no attribute"


class Verdict(StrEnum):
    """What happened when an attention layer was built and, if AITER's backend was chosen, driven."""

    WORKS = "works"  # AITER's backend was chosen and every step agrees with float64
    OTHER = "other backend"  # another backend was chosen; nothing to drive
    REFUSED = "refused"  # vLLM said, with a reason, that the choice is not possible here
    MISSING = "not installed"  # it ended in an import error that names AITER
    TRAPPED = "builtin trap"  # Python's builtin `aiter` was used in place of the module
    BROKEN = "broken"  # any other exception, or a wrong number
    UNANSWERED = "no answer"  # the probe itself crashed or timed out


@dataclass(frozen=True)
class Cell:
    """One probe's coordinates."""

    tree: Tree
    machine: Machine
    explicit: str | None  # name of the backend asked for by name, None for auto-selection
    draft_tokens: tuple[int, ...] = ()  # with which EAGLE is to propose; none: it is not asked to
    layer: Layer = TARGET
    drive: bool = True  # False: the platform, the policy and the selection of the layer; nothing is run

    @property
    def group(self) -> str:
        """Cells with equal groups share all that happens before the choice and the layer matter: `Probe.begin`."""
        told = self.request()
        return json.dumps([told["tree"], told["machine"], self.drive], sort_keys=True)

    def request(self) -> dict:
        """What the child process is told."""
        tree = {
            "folder": str(self.tree.folder),
            "fingerprint": self.tree.fingerprint,
            "environment": self.tree.environment,
        }
        asked = {"explicit": self.explicit, "draft_tokens": list(self.draft_tokens), "drive": self.drive}
        asked["layer"] = asdict(self.layer)
        return {"tree": tree, "machine": asdict(self.machine)} | asked

    def key(self, context: str) -> str:
        """Name under which the answer is kept: equal keys mean the same question under the same conditions."""
        told = self.request()
        told["tree"] = {name: value for name, value in told["tree"].items() if name != "folder"}
        return hashlib.sha256(f"{context}\n{json.dumps(told, sort_keys=True)}".encode()).hexdigest()[:32]

    def coordinates(self) -> dict:
        """The cell's place in a truth table, as flat columns."""
        switches = {name: value for name, value in self.machine.switches.items()}
        return {
            "tree": self.tree.name,
            "simulated": self.machine.simulated,
            "arch": self.machine.arch or "native",
            "aiter": {None: "as found", True: "present", False: "absent"}[self.machine.aiter],
            "flash_attn": self.machine.flash_attn,
            "switch": self.machine.switch,
            "switches": switches,
            "selection": self.explicit or "auto",
            **asdict(self.layer),
        }


def grid(
    trees: list[Tree],
    architectures: list[str],
    switches: list[str],
    aiter=(True, False),
    explicit=(None, EXPLICIT),
) -> list[Cell]:
    """Every combination on simulated machines; on `native`, where the machine is given, only what can be varied.

    Raises:
        ValueError: an unknown architecture or switch position, or a tree named twice.
    """
    if twice := {tree.name for tree in trees if [t.name for t in trees].count(tree.name) > 1}:
        raise ValueError(f"named twice: {', '.join(sorted(twice))}; each tree is asked once")
    machines = []
    for arch, present in product(architectures, aiter):
        if arch == "native":
            machines += [Machine("native")] if present == aiter[0] else []
        else:
            machines.append(Machine(arch=arch, aiter=present))
    return [
        Cell(tree, with_switch(machine, position), choice)
        for tree, machine, position, choice in product(trees, machines, switches, explicit)
    ]


def ablation(trees: list[Tree], arch: str) -> list[Cell]:
    """AITER's backend asked for by name with the main switch unset, with the plain and with the shuffled KV cache."""
    base = Machine("native") if arch == "native" else Machine(arch=arch)
    shuffled = replace(base, switches={SHUFFLE_SWITCH: "1"})
    return [Cell(tree, machine, EXPLICIT) for tree, machine in product(trees, (base, shuffled))]


def verdict(facts: dict) -> Verdict:
    """Sum up the selection and the steps; decided by outcomes and exceptions, never by a tree's name or version."""
    if why_unanswered(facts):
        return Verdict.UNANSWERED
    selection = facts["selection"]
    if selection["outcome"] == "error":
        return (
            Verdict.MISSING if _names_aiter(selection) else Verdict.REFUSED if _is_reason(selection) else Verdict.BROKEN
        )
    if "drive" not in selection:
        return Verdict.OTHER
    steps = [selection["drive"][name] for name in STEPS]
    if all(step["outcome"] == "ok" for step in steps):
        return Verdict.WORKS
    failures = [step for step in steps if step["outcome"] == "error"]
    if any(step["type"] == "AttributeError" and TRAP in step["message"] for step in failures):
        return Verdict.TRAPPED
    if failures and all(_names_aiter(step) for step in failures):
        return Verdict.MISSING
    return Verdict.BROKEN


def why_unanswered(facts: dict) -> str | None:
    """Why these facts say nothing about the tree: the probe's own limits must not count as a failure of vLLM."""
    if "selection" not in facts:
        return "the probe ended without an answer"
    if facts.get("platform", {}).get("is_rocm") is False:
        return "this machine has no ROCm GPU"
    selection = facts["selection"]
    for fact in (selection, *(selection.get("drive", {}).get(name, {}) for name in STEPS)):
        if fact.get("outcome") != "error":
            continue
        if fact["raised_in"] == "aiterlab" and fact["type"] == "NotImplementedError":
            return f"the simulated machine has no stand-in: {fact['message']}"
        if fact["raised_in"] == "torch" and "not compiled with CUDA" in fact["message"]:
            return "the simulated machine has no GPU memory, and the backend asked for some"
        if fact["type"] == "ModuleNotFoundError" and "'aiter" not in fact["message"] and "'vllm" not in fact["message"]:
            return f"the environment lacks what this tree imports: {fact['message']}"
    return None


def _names_aiter(error: dict) -> bool:
    return error["type"] == "ModuleNotFoundError" and error["message"] == "No module named 'aiter'"


def _is_reason(error: dict) -> bool:
    """vLLM refuses a choice on purpose: its platform or its selector says so, in words about the backend."""
    at = (error["raised_at"] or {}).get("file", "")
    on_purpose = error["type"] in ("ValueError", "NotImplementedError") and "backend" in error["message"].lower()
    return on_purpose and (at.startswith("vllm/platforms/") or at.endswith("/selector.py"))
