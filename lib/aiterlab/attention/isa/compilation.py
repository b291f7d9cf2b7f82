# SPDX-License-Identifier: Apache-2.0
"""Have launchers compile for GPUs that are not there: one process for each architecture, answers as they come.

A process has one architecture, because imports ask the driver once. A compiler that aborts takes its process with it;
the launch that did it is answered with the reason, and the rest goes on in a new process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from aiterlab import host
from aiterlab.attention.isa.assembly import Block, Code
from aiterlab.attention.isa.launches import Launch
from aiterlab.machines.description import Machine


@dataclass(frozen=True)
class Kernel:
    """One kernel that a launch compiled."""

    code: Code
    dynamic_lds_bytes: int
    options: dict  # num_warps, num_stages, waves_per_eu, matrix_instr_nonkdim, kpack, schedule_hint
    programs: int  # workgroups of the launch
    hash: str  # names the folder of Triton's cache that holds every stage of the compilation

    @property
    def lds_bytes(self) -> int:
        return self.code.static_lds_bytes + self.dynamic_lds_bytes


@dataclass(frozen=True)
class Compiled:
    """What one launch compiled for one architecture."""

    arch: str
    launch: Launch
    kernels: tuple[Kernel, ...]
    error: str | None  # why there is no kernel, or not all of them
    seconds: float | None


def compile_launches(
    launches: Sequence[Launch],
    architectures: Sequence[str] = ("gfx942", "gfx950", "gfx90a", "gfx1100"),
    *,
    workers: int | None = None,
    progress: Callable[[int, int, Compiled], None] | None = None,
) -> list[Compiled]:
    """Compile every launch for every architecture; architecture by architecture, in the order of `launches`.

    Triton keeps what it has compiled on disk, so asking again takes little more than the imports (about 10 s with
    vLLM's and AITER's, 4 s for this suite's kernels alone).

    Args:
        workers: processes at a time; the number of usable cores by default
        progress: called with (launches done, launches in all, the answer) after each
    """
    done = itertools.count(1)

    def compile_for(arch: str) -> list[Compiled]:
        found = []
        for answer in _answers(arch, launches):
            found.append(answer)
            if progress:
                progress(next(done), len(launches) * len(architectures), answer)
        return found

    with ThreadPoolExecutor(workers or host.usable_cores()) as pool:
        return [answer for answers in pool.map(compile_for, architectures) for answer in answers]


def _answers(arch: str, launches: Sequence[Launch]) -> Iterator[Compiled]:
    # Where AITER is not installed, the others' kernels can be compiled none the less.
    machine = Machine(arch=arch, aiter=importlib.util.find_spec("aiter") is not None, flash_attn=False)
    left = list(launches)
    while left:
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "aiterlab.attention.isa.child"],
                env=_environment(machine),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            request = {"machine": machine.to_json(), "launches": [dataclasses.asdict(launch) for launch in left]}
            with contextlib.suppress(BrokenPipeError), child.stdin:  # a child that died already is noticed below
                child.stdin.write(json.dumps(request))
            for line in child.stdout:
                yield _compiled(arch, left.pop(0), json.loads(line))
            if child.wait() and left:
                log.seek(0)
                last = next((line.strip() for line in reversed(log.readlines()) if line.strip()), "no message")
                yield Compiled(arch, left.pop(0), (), f"the process ended with status {child.returncode}: {last}", None)


def _environment(machine: Machine) -> dict[str, str]:
    changes = machine.environment()
    changes |= {"TRITON_INTERPRET": None, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": None}
    environment = os.environ | {name: value for name, value in changes.items() if value is not None}
    return {name: value for name, value in environment.items() if changes.get(name, value) is not None}


def _compiled(arch: str, launch: Launch, answer: dict) -> Compiled:
    return Compiled(arch, launch, tuple(map(_kernel, answer["kernels"])), answer["error"], answer["seconds"])


def _kernel(fields: dict) -> Kernel:
    code = fields["code"]
    blocks = {part: code[part] and _block(code[part]) for part in ("whole", "loop")}
    return Kernel(**fields | {"code": Code(**code | blocks)})


def _block(fields: dict) -> Block:
    """JSON has text for keys where a block counts by width."""
    widths = ("global_loads", "global_stores", "lds_reads", "lds_writes")
    return Block(**fields | {name: {int(bits): n for bits, n in fields[name].items()} for name in widths})
