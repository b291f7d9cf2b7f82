# SPDX-License-Identifier: Apache-2.0
"""One cell in one process: become the machine, take the tree, answer."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from aiterlab import paths
from aiterlab.machines import Machine

_VLLM_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "aiterlab_simulated_rocm,aiterlab_hotfix",  # other plugins belong to the installed vLLM
}


def answer(request: dict) -> dict:
    """Answer one cell in this process, which must not have imported vLLM or AITER.

    Args:
        request: `machine` (see Machine.to_json), `tree` with `folder`, `fingerprint` and `environment`, `explicit`,
            `draft_tokens`.
    """
    machine = Machine(**request["machine"])
    tree = request["tree"]
    for name, value in (machine.environment() | _VLLM_ENVIRONMENT | tree["environment"]).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    # vLLM inspects model classes in a process of its own and remembers the answer; both must happen on this tree.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [tree["folder"], os.environ.get("PYTHONPATH")]))
    os.environ["VLLM_CACHE_ROOT"] = str(paths.cache_dir() / "vllm" / tree["fingerprint"][:16])
    sys.path.insert(0, tree["folder"])
    # Compiled files are shared by all cells of a tree and never written into a user's checkout.
    sys.pycache_prefix, sys.dont_write_bytecode = str(paths.cache_dir() / "pycache"), False
    if machine.simulated:
        from aiterlab.machines import simulation

        simulation.install(machine)
    else:
        from aiterlab.machines import native

        native.watch_compilation()
    from aiterlab.probes.questions import Probe

    package = Path(tree["folder"]) / "vllm"
    return Probe(package, request["explicit"], request["draft_tokens"], simulated=machine.simulated).answer()
