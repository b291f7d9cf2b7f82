# SPDX-License-Identifier: Apache-2.0
"""Ask many cells at once, each in a process of its own, and keep every answer as soon as it is there."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from aiterlab import paths, records
from aiterlab.probes.cells import Cell, Verdict, verdict, why_unanswered

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
}
# Triton looks at the first while its own library is imported, so it is set before anything is. The second keeps a real
# GPU out of a simulated machine.
_SIMULATION = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


class ServerError(RuntimeError):
    """The process that forks the probes could not be started."""


def ask(
    cells: Sequence[Cell],
    *,
    workers: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    timeout_s: float | None = None,
) -> list[dict]:
    """Answer every cell; returns rows in the order of `cells`: coordinates, `verdict`, `facts`, `reused`, `seconds`.

    An answer that this run has already is read back instead of asked again; a different tree, machine, switch,
    version of a package or of this code is a different question. A probe that crashes or hangs is a row with
    the verdict "no answer" and its reason; the other cells go on.

    Args:
        workers: processes at a time; the number of usable cores by default.
        progress: called with (cells done, cells in all, seconds since the start) after each answer.
        timeout_s: seconds after which one cell is killed; 240, and an hour on a native machine, by default.
    """
    workers = workers or len(os.sched_getaffinity(0))
    folder = paths.cells_dir()
    context = _context()
    files = [folder / f"{cell.key(context)}.json" for cell in cells]
    # Another GPU would be another question, and an answer does not know its GPU: native cells are always asked anew.
    rows: list[dict | None] = [
        _read(cell, file, reused=True) if cell.machine.simulated else None
        for cell, file in zip(cells, files, strict=True)
    ]
    for i, cell in enumerate(cells):
        if not cell.machine.simulated and not cell.tree.compiled:
            rows[i] = _unasked(cell, "this tree has no compiled extensions for this GPU; ask the tree `installed`")
    start = time.monotonic()

    def finish(index: int, row: dict) -> None:
        for i, file in enumerate(files):
            if file == files[index]:  # a question that was put twice is asked once
                rows[i] = row
        if progress:
            progress(sum(row is not None for row in rows), len(rows), time.monotonic() - start)

    todo = {i: (cell, file) for i, (cell, file, row) in enumerate(zip(cells, files, rows, strict=True)) if row is None}
    todo = {i: asked for i, asked in todo.items() if files.index(asked[1]) == i}
    if simulated := {i: asked for i, asked in todo.items() if asked[0].machine.simulated}:
        limit_s = timeout_s or TIMEOUT_S
        preload = _Preload()
        with _Server(preload.names or preload.scout(next(iter(simulated.values()))[0], limit_s), _SIMULATION) as server:
            server.answer(simulated, workers, limit_s, finish)
        preload.extend(name for i in simulated for name in rows[i]["loaded_modules"])
    if native := {i: asked for i, asked in todo.items() if i not in simulated}:
        # A process that forks must not have touched a GPU, so nothing is preloaded; and one GPU means one at a time.
        with _Server([], {}) as server:
            server.answer(native, 1, timeout_s or NATIVE_TIMEOUT_S, finish)
    return rows


def _read(
    cell: Cell, file: Path, *, reused: bool, seconds: float | None = None, peak_memory_bytes: int | None = None
) -> dict | None:
    """The row of one cell from its answer's file; None if there is no answer yet."""
    if not file.exists():
        return None
    facts = json.loads(file.read_text())
    return cell.coordinates() | {
        "verdict": str(verdict(facts)),
        "facts": facts,
        "reused": reused,
        "seconds": seconds,
        "loaded_modules": facts.pop("loaded_modules", []),
        "peak_memory_bytes": peak_memory_bytes,
        "no_answer_reason": why_unanswered(facts),
        "aiter_log": _aiter_log(file.with_suffix(".log")),
    }


def _aiter_log(log: Path) -> list[str]:
    """What AITER printed while the cell was asked, without the paths of this machine."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [re.sub(r"\S*/(?=[^/\s])", "", line) for line in lines if line.startswith("[aiter]")]


def _unanswered(cell: Cell, ending: dict, log: Path) -> dict:
    tail = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    why = "timed out" if ending["timed_out"] else f"ended with status {ending['exit_status']}"
    row = _unasked(cell, f"{why}: {tail[-1]}" if tail else why)
    return row | {
        "seconds": ending["seconds"],
        "peak_memory_bytes": ending["peak_memory_bytes"],
        "aiter_log": _aiter_log(log),
    }


def _unasked(cell: Cell, reason: str) -> dict:
    return cell.coordinates() | {
        "verdict": str(Verdict.UNANSWERED),
        "facts": {},
        "reused": False,
        "seconds": None,
        "loaded_modules": [],
        "peak_memory_bytes": None,
        "no_answer_reason": reason,
        "aiter_log": [],
    }


class _Server:
    """The forking process, spoken to through its standard input and output."""

    def __init__(self, preload: list[str], environment: dict[str, str]) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "aiterlab.probes.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | _SERVER_ENVIRONMENT | environment,
            start_new_session=True,  # Ctrl-C reaches us, and we end it in order
        )
        try:
            self._send({"preload": preload})
            if self._receive() != {"ready": True}:
                raise ServerError("the probe server sent no greeting")
        except BaseException:  # Ctrl-C while it imports: nobody else would end it
            self.close()
            raise

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """End the server and, with it, every child."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def answer(self, todo: dict[int, tuple[Cell, Path]], workers: int, timeout_s: float, finish) -> None:
        waiting = list(todo.items())[::-1]
        running: set[int] = set()
        while waiting or running:
            while waiting and len(running) < workers:
                index, (cell, file) = waiting.pop()
                running.add(index)
                request = {"id": index, "cell": cell.request(), "answer": str(file), "timeout_s": timeout_s}
                self._send(request | {"log": str(file.with_suffix(".log"))})
            ending = self._receive()
            index = ending["id"]
            running.remove(index)
            cell, file = todo[index]
            row = None
            if ending["exit_status"] == 0:
                measured = {"seconds": ending["seconds"], "peak_memory_bytes": ending["peak_memory_bytes"]}
                row = _read(cell, file, reused=False, **measured)
            finish(index, row or _unanswered(cell, ending, file.with_suffix(".log")))

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


class _Preload:
    """Names of the modules that a server imports before it forks: what cells were seen to load."""

    def __init__(self) -> None:
        key = hashlib.sha256(_versions().encode()).hexdigest()[:16]
        self.file = paths.cache_dir() / f"preload-{key}.json"
        self.names: list[str] = json.loads(self.file.read_text()) if self.file.exists() else []

    def scout(self, cell: Cell, timeout_s: float) -> list[str]:
        """Learn the names from one cell in a process that starts with nothing imported."""
        rows: dict[int, dict] = {}
        with tempfile.TemporaryDirectory() as folder, _Server([], _SIMULATION) as server:
            server.answer({0: (cell, Path(folder) / "scout.json")}, 1, timeout_s, rows.__setitem__)
        self.extend(rows[0]["loaded_modules"])
        return self.names

    def extend(self, names: Iterable[str]) -> None:
        """Remember modules that cells had to load themselves, so that the next server brings them along."""
        if new := [name for name in dict.fromkeys(names) if name not in set(self.names)]:
            self.names = self.names + new
            self.file.parent.mkdir(parents=True, exist_ok=True)
            records.atomic_write_text(self.file, json.dumps(self.names))


def _context() -> str:
    """All that an answer depends on besides the cell: this code, the packages, the interpreter."""
    digest = hashlib.sha256(f"{sys.version}\n{_versions()}".encode())
    package = Path(__file__).parents[1]
    for part in ("machines", "probes", "trees", "attention", "hotfix.py", "policy.py", "importing.py"):
        path = package / part
        for source in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if source.suffix == ".py" or source.parent.name == "bin":
                digest.update(source.read_bytes())
    return digest.hexdigest()


def _versions() -> str:
    return "\n".join(sorted(f"{d.name}=={d.version}" for d in importlib.metadata.distributions()))
