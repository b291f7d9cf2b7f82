# SPDX-License-Identifier: Apache-2.0
"""One cell in one process: become the machine, take the tree, answer.

Run as `python -m aiterlab.probes.child FILE` with a request on standard input, it is a cold probe: a new interpreter
with nothing preloaded, which leaves its answer in FILE.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from aiterlab import importing, paths, records
from aiterlab.machines import Machine
from aiterlab.machines.description import ENVIRONMENT_VARIABLE
from aiterlab.probes import ahead, preload

_VLLM_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "aiterlab_simulated_rocm,aiterlab_hotfix",  # other plugins belong to the installed vLLM
}
_answered = 0  # cells that this process has finished; a cell must begin in one that has finished none


def answer(request: dict) -> dict:
    """Answer one cell in this process, which must not have imported vLLM or AITER.

    Args:
        request: `machine` (see Machine.to_json), `tree` with `folder`, `fingerprint` and `environment`, and what is
            asked: `explicit`, `draft_tokens`, `layer`, `drive`.
    """
    take_place(request)
    settle_aiter(request)
    remember_apart(request, "cold")
    probe = make_probe(request)
    probe.begin(request["drive"])
    return finish(probe, request)


def take_place(request: dict) -> None:
    """Make this process one of the machine, with the tree on its import path; nothing of the tree is imported.

    Whether AITER is installed there stays open until `settle_aiter`.
    """
    machine = Machine(**request["machine"])
    tree = request["tree"]
    for name, value in (machine.environment() | _VLLM_ENVIRONMENT | tree["environment"]).items():
        _set(name, value)
    # vLLM inspects model classes in a process of its own, which must be on this tree too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [tree["folder"], os.environ.get("PYTHONPATH")]))
    os.environ["VLLM_CACHE_ROOT"] = str(paths.cache_dir() / "vllm" / tree["fingerprint"][:16])
    sys.path.insert(0, tree["folder"])
    sys.pycache_prefix, sys.dont_write_bytecode = compiled_files(), False
    ahead.compile_once(paths.cache_dir() / "compiled")
    ahead.share_compiled_files([Path(tree["folder"]), *ahead.folders_of("aiter")])
    if machine.simulated:
        from aiterlab.machines import simulation

        simulation.install_gpu(machine)
    else:
        from aiterlab.machines import native

        native.watch_compilation()


def compiled_files() -> str:
    """Where compiled files are: shared by all cells of a tree, and never in a user's checkout."""
    return str(paths.cache_dir() / "pycache")


def settle_aiter(request: dict) -> None:
    """Have AITER present or absent, as on the machine of the request."""
    machine = Machine(**request["machine"])
    if machine.simulated:
        from aiterlab.machines import simulation

        simulation.install_aiter(machine.aiter)


def remember_apart(request: dict, kind: str) -> None:
    """Give vLLM a folder of this tree on this machine for what it keeps between processes.

    It keeps what it saw when it looked at a model's class, and takes that for the truth on any machine. Where the class
    cannot be imported, as without AITER or on a GPU that AITER does not know, that would depend on who asked before.

    Args:
        kind: apart from all others too: a new interpreter that is to confirm an answer must not have read it there.
    """
    machine = Machine(**request["machine"])
    key = _digest([request["tree"]["fingerprint"], machine.to_json(), kind])
    os.environ["VLLM_CACHE_ROOT"] = str(paths.cache_dir() / "vllm" / key)


def set_switches(request: dict, moved: Iterable[str]) -> None:
    """Turn the switches of a machine that this process is on already.

    Args:
        moved: every variable in which the machines differ that this process has served or will serve.
    """
    machine = Machine(**request["machine"])
    for name in moved:
        _set(name, machine.switches.get(name))
    _set(ENVIRONMENT_VARIABLE, machine.to_json())


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def make_probe(request: dict):
    """The questions to the tree of the request."""
    from aiterlab.probes.questions import Probe

    return Probe(Path(request["tree"]["folder"]) / "vllm", simulated=Machine(**request["machine"]).simulated)


def finish(probe, request: dict) -> dict:
    """Answer the cell with a probe that has begun."""
    global _answered
    from aiterlab.probes.layer import Layer

    _answered += 1
    return probe.finish(request["explicit"], request["draft_tokens"], Layer(**request["layer"]), request["drive"])


def state(since: str | None = None) -> dict:
    """What of this process a cell that begins in it could notice.

    Args:
        since: a module; what was imported up to it is counted and not read, so that it stays shared memory.
    """
    return {
        "modules": _digest([str(len(sys.modules)), *sorted(preload.imported_after(since))]),
        "environment": _digest(sorted(f"{name}={value}" for name, value in os.environ.items())),
    }


def answered() -> int:
    return _answered


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def keep(facts: dict, began_with: dict, file: str) -> None:
    """Leave an answer where the pool looks for it."""
    about = {"began_with": began_with, "answered_utc": datetime.now(UTC).isoformat(timespec="seconds")}
    records.atomic_write_text(Path(file), json.dumps(facts | about))


def main() -> None:
    began_with = state() | {"answered": answered()}
    gc.disable()  # as in the pool: what is imported stays
    importing.skip_address_grammars()
    request = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    keep(answer(request), began_with, sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no clean-up: libraries registered for a simulated device do not unload cleanly


if __name__ == "__main__":
    main()
