# SPDX-License-Identifier: Apache-2.0
"""Ask many cells at once, each in a process of its own, and keep every answer as soon as it is there."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from math import ceil
from pathlib import Path

from aiterlab import host, paths
from aiterlab.probes import answers, preload
from aiterlab.probes.cells import Cell
from aiterlab.probes.plan import Plan

TIMEOUT_S, NATIVE_TIMEOUT_S = 240, 3600  # on a real machine AITER compiles its modules, for minutes each
_SERVER_ENVIRONMENT = {
    # A child must not inherit threads that fork cannot carry over, and two cores are best used by two cells.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Questions are about code on this disk; nothing may be fetched, and nothing may phone home.
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "MPLBACKEND": "agg",  # the one of a notebook's kernel cannot be imported outside it
    "PYTHONHASHSEED": "0",  # what prints a set prints it in one order, in every process
}
# Triton looks at the first while its own library is imported, so it is set before anything is. The second keeps a real
# GPU out of a simulated machine.
_SIMULATION = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
# What differs between two askings of one question without being an answer.
_NO_ANSWER = ("seconds",)


class ServerError(RuntimeError):
    """The process that forks the probes could not be started."""


def ask(
    cells: Sequence[Cell],
    *,
    workers: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    timeout_s: float | None = None,
    cold: bool = False,
    fresh: bool = False,
    root: Server | None = None,
) -> list[dict]:
    """Answer every cell; returns rows in the order of `cells`: coordinates, `verdict`, `facts`, `reused`, `seconds`.

    An answer that this run has already is read back instead of asked again, and its row says since when it is there
    (`answered_utc`); a different tree, machine, switch, layer, version of a package or of this code is a different
    question. A probe that crashes or hangs is a row with the verdict "no answer" and its reason; the other cells go on.

    Args:
        workers: processes at a time; the number of usable cores by default.
        progress: called with (cells done, cells in all, seconds since the start) after each answer.
        timeout_s: seconds after which one cell is killed; 240, and an hour on a native machine, by default.
        cold: answer each cell in a new interpreter with nothing preloaded; such answers are kept apart.
        fresh: ask again what this run has an answer to.
        root: the process that cells on simulated machines are forked from, if one was `started`.
    """
    workers = workers or host.usable_cores()
    folder = paths.cells_dir()
    context = answers.context() + (" cold" if cold else "")
    files = [folder / f"{cell.key(context)}.json" for cell in cells]
    # Another GPU would be another question, and an answer does not know its GPU: native cells are always asked anew.
    rows: list[dict | None] = [
        answers.read(cell, file) if cell.machine.simulated and not fresh else None
        for cell, file in zip(cells, files, strict=True)
    ]
    for i, cell in enumerate(cells):
        if not cell.machine.simulated and not cell.tree.compiled:
            rows[i] = answers.unasked(
                cell, "this tree has no compiled extensions for this GPU; ask the tree `installed`"
            )
    start, done = time.monotonic(), sum(row is not None for row in rows)
    places: dict[Path, list[int]] = {}
    for i, file in enumerate(files):  # a question that was put twice is asked once
        places.setdefault(file, []).append(i)

    def finish(index: int, row: dict) -> None:
        nonlocal done
        for i in places[files[index]]:
            rows[i] = row
        done += len(places[files[index]])
        if progress:
            progress(done, len(rows), time.monotonic() - start)

    todo = {i: (cells[i], file) for file, (i, *_) in places.items() if rows[i] is None}
    for file in (file for _, file in todo.values()):
        file.unlink(missing_ok=True)
    if simulated := {i: asked for i, asked in todo.items() if asked[0].machine.simulated}:
        plan = Plan(simulated, workers, timeout_s or TIMEOUT_S, finish, cold=cold)
        _carry_out(plan, () if cold else preload.MODULES, _SIMULATION, None if cold else root)
    if native := {i: asked for i, asked in todo.items() if not asked[0].machine.simulated}:
        # A process that forks must not have touched a GPU, so none is forked; and one GPU means one at a time.
        _carry_out(Plan(native, 1, timeout_s or NATIVE_TIMEOUT_S, finish, cold=True), (), {})
    return rows


@contextlib.contextmanager
def started() -> Iterator[Server]:
    """A `root` for `ask` that imports what cells have in common while its caller still finds out what to ask."""
    with Server(preload.MODULES, _SIMULATION) as root:
        yield root


def _carry_out(plan: Plan, modules: Sequence[str], environment: dict[str, str], root: Server | None = None) -> None:
    while True:
        with root or Server(modules, environment) as server:
            if server.leave_out is None:
                server.carry_out(plan)
                return
        modules, root = [name for name in modules if name != server.leave_out], None


def compare_cold(
    cells: Sequence[Cell],
    rows: Sequence[dict],
    *,
    share: float = 0.05,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[dict]:
    """Ask a random share of the cells again, each in a new interpreter; returns what it answered differently.

    Args:
        rows: the answers of `cells`, in their order.
        share: of the cells, rounded up.
        seed: chooses the cells.

    Returns:
        One entry per fact that differs: the cell's coordinates, the fact's path, and both answers.
    """
    chosen = sorted(random.Random(seed).sample(range(len(cells)), min(len(cells), ceil(share * len(cells)))))
    again = ask([cells[i] for i in chosen], workers=workers, progress=progress, cold=True)
    return [
        cells[i].coordinates() | {"fact": path, "pooled": pooled, "cold": cold}
        for i, row in zip(chosen, again, strict=True)
        for path, pooled, cold in _differences(_answer(rows[i]), _answer(row))
    ]


def _answer(row: dict) -> dict:
    return {"facts": row["facts"], "no_answer_reason": row["no_answer_reason"]}


def _differences(one, other, path: str = ""):
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted({*one, *other} - set(_NO_ANSWER)):
            yield from _differences(one.get(name), other.get(name), f"{path}.{name}" if path else name)
    elif one != other:
        yield path, one, other


class Server:
    """The root of all probe processes, spoken to through its standard input and output."""

    def __init__(self, modules: Sequence[str], environment: dict[str, str]) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "aiterlab.probes.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | _SERVER_ENVIRONMENT | environment,
            start_new_session=True,  # Ctrl-C reaches us, and we end it in order
        )
        self._send({"modules": list(modules)})

    @cached_property
    def leave_out(self) -> str | None:
        """The module that must not be preloaded, once all are imported; None: it is ready."""
        return self._receive().get("leave_out")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """End the server and, with it, every process of its own."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=5 if "leave_out" in vars(self) else 0)  # while it imports it has started nothing
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def carry_out(self, plan: Plan) -> None:
        """Keep the workers busy until the plan has nothing left to do."""
        running = 0
        while True:
            while running < plan.workers and (unit := plan.next_unit()):
                self._send(unit)
                running += 1
            if not running:
                return
            running -= plan.hear(self._receive())

    def _send(self, message: dict) -> None:
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _receive(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise self._ended()
        return json.loads(line)

    def _ended(self) -> ServerError:
        self.errors.seek(0)
        return ServerError(f"the probe server ended (status {self.process.wait()}): {self.errors.read()[-2000:]}")
