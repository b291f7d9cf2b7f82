# SPDX-License-Identifier: Apache-2.0
"""Synthetic answers in the shape that audit cells give, for the tests of the audit."""

import copy
from dataclasses import asdict

from aiterlab.policy import MAIN_SWITCH
from aiterlab.probes.layer import Layer


def row(facts: dict, selection: str = "auto", *, tree="t", arch="gfx942", aiter="present", switch="unset", layer=None,
        others=None) -> dict:  # fmt: skip
    """One row as the pool returns it."""
    switches = ({} if switch == "unset" else {MAIN_SWITCH: switch}) | (others or {})
    return {
        "tree": tree,
        "simulated": True,
        "arch": arch,
        "aiter": aiter,
        "flash_attn": True,
        "switch": switch,
        "switches": switches,
        "selection": selection,
        **asdict(layer or Layer()),
        "facts": {name: copy.deepcopy(fact) for name, fact in facts.items() if name != "why"},
        "no_answer_reason": facts.get("why"),
    }


def picked(backend: str, **said) -> dict:
    """Facts of a cell that chose a backend; `said` goes to the policy or to the selection, wherever it belongs."""
    policy, rest = _policy(said)
    return {"policy": policy, "selection": {"outcome": "ok", "backend": backend, "requested": backend} | rest}


def imported(backend: str, importer: str, **said) -> dict:
    """Facts of a cell in which AITER was imported."""
    entry = {"module": "aiter", "importer": importer, "file": "vllm/a.py", "line": 3, "step": "selection"}
    return picked(backend, **said) | {"aiter_imports": [entry]}


def refused(message: str, **said) -> dict:
    """Facts of a cell whose choice vLLM refused."""
    return _error("ValueError", message, "raise ValueError(", **said)


def asserted(message: str, **said) -> dict:
    """Facts of a cell that ended in an assertion with a text."""
    return _error("AssertionError", message, "assert block_size == 1, (", **said)


def crashed(kind: str, message: str, **said) -> dict:
    """Facts of a cell that ended in an exception that nobody meant as a refusal."""
    return _error(kind, message, "self.kernel = kernels[name]", **said)


def unanswered(reason: str) -> dict:
    """Facts of a cell whose probe did not answer."""
    return {"why": reason}


def answers(rows: list[dict]) -> int:
    """How many rows hold an answer."""
    return sum(row["no_answer_reason"] is None for row in rows)


def _error(kind: str, message: str, source: str, **said) -> dict:
    policy, rest = _policy(said)
    at = {"file": "vllm/platforms/rocm.py", "line": 3, "function": "get_attn_backend_cls", "source": source}
    told = {"type": kind, "message": message, "raised_at": at, "raised_in": "vllm", "frames": [at]}
    return {"policy": policy, "selection": {"outcome": "error"} | told | rest}


def _policy(said: dict) -> tuple[dict, dict]:
    names = ("available", "available_by", "enabled")
    return {name: said[name] for name in names if name in said}, {n: v for n, v in said.items() if n not in names}
