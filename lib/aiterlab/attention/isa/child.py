# SPDX-License-Identifier: Apache-2.0
"""The process in which launchers compile for another GPU: `python -m aiterlab.attention.isa.child`.

It reads one JSON request from standard input, {"machine": …, "launches": […]}, and writes one JSON answer a line for
each launch, in order. The driver answers for the requested architecture (machines/driver.py), and a launch stops after
the compiler, so launchers run unchanged and no kernel does.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path


def main() -> None:
    request = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    _become(request["machine"])
    for launch in request["launches"]:
        print(json.dumps(_answer(launch)), file=answers, flush=True)
    os._exit(0)  # torch 2.13 prints a harmless error when AITER's operators are taken down


def _become(machine: str) -> None:
    """Make this process one on the described machine, with the platforms of vLLM and AITER that belong to it."""
    from aiterlab import importing
    from aiterlab.machines import simulation
    from aiterlab.machines.description import Machine

    simulation.install(Machine.from_json(machine), interpret=False)
    # vLLM's wheel for the CPU switches Triton off by its own version's name; this process compiles for a GPU.
    importing.after_import(
        "vllm.platforms", lambda platforms: setattr(platforms, "vllm_version_matches_substr", lambda part: False)
    )


def _answer(launch: dict) -> dict:
    from aiterlab.attention.isa.launches import Launch
    from aiterlab.attention.workloads import Workload

    started, kernels, error = time.monotonic(), [], None
    fields = launch["workload"]
    workload = Workload(**fields | {"sequences": tuple(map(tuple, fields["sequences"]))})
    try:
        with _compiling_only(kernels):
            Launch(launch["provider"], launch["name"], workload).call()
    except Exception as exception:  # of code under study: the reason is the answer
        error = _reason(exception)
    return {"kernels": kernels, "error": error, "seconds": time.monotonic() - started}


def _reason(exception: Exception) -> str:
    """Say what went wrong, and in which function: `KeyError: 'gfx90a'` alone explains little."""
    frame = traceback.extract_tb(exception.__traceback__)[-1]
    first = next(iter(str(exception).strip().splitlines()), "")
    return f"{type(exception).__name__}: {first} ({Path(frame.filename).stem}.{frame.name})"


class _compiling_only:
    """A context in which launching a Triton kernel compiles it, notes it in `kernels`, and does not run it."""

    def __init__(self, kernels: list[dict]) -> None:
        self.kernels = kernels

    def __enter__(self) -> None:
        from triton.runtime.jit import JITFunction

        self.run = run = JITFunction.run

        def compile_only(function, *args, grid, warmup, **kwargs):
            kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
            named = dict(zip(function.arg_names, args, strict=False)) | kwargs
            self.kernels.append(_describe(kernel, grid(named) if callable(grid) else grid))
            return kernel

        JITFunction.run = compile_only

    def __exit__(self, *exception) -> None:
        from triton.runtime.jit import JITFunction

        JITFunction.run = self.run


OPTIONS = ("num_warps", "num_stages", "waves_per_eu", "matrix_instr_nonkdim", "kpack", "schedule_hint")


def _describe(kernel, grid) -> dict:
    from aiterlab.attention.isa import assembly

    metadata = kernel.metadata
    return {
        "code": dataclasses.asdict(assembly.parse(kernel.asm["amdgcn"])),
        "dynamic_lds_bytes": metadata.shared,
        "options": {name: getattr(metadata, name) for name in OPTIONS},
        "programs": math.prod(grid),
        "hash": metadata.hash,
    }


if __name__ == "__main__":
    main()
