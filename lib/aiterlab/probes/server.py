# SPDX-License-Identifier: Apache-2.0
"""A process that holds the imports which no answer depends on, and forks one child per cell.

Run as `python -m aiterlab.probes.server`. It reads one JSON request per line from standard input and writes one JSON
line per finished child to standard output; it ends, with its children, when standard input closes. It imports neither
vLLM nor AITER and never touches a GPU, so every child starts as clean as a new interpreter.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import selectors
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

from aiterlab import records
from aiterlab.probes import child

# Packages whose import is the very thing that a cell observes.
OBSERVED = ("aiter", "aiter_meta", "aiterlab", "amdsmi", "csrc", "flash_attn", "torchvision", "vllm")


def main() -> None:
    """Preload what the first request line names, then serve until standard input closes."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library that prints while it is imported must not speak on the channel
    for name in json.loads(sys.stdin.readline())["preload"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                importlib.import_module(name)
            except Exception:  # a module that cannot be imported on its own is left to the child that needs it
                sys.modules.pop(name, None)
    gc.collect()
    gc.freeze()  # children share these pages; a collection in a child would copy them
    channel.write(json.dumps({"ready": True}) + "\n")
    _serve(channel)


def _serve(channel) -> None:
    running: dict[int, dict] = {}  # pid -> request
    os.set_blocking(0, False)
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    pending = b""
    try:
        while True:
            if selector.select(timeout=0.02):
                chunk = os.read(0, 1 << 20)
                if not chunk:
                    return
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    request = json.loads(line)
                    running[_fork(request)] = request | {"started": time.monotonic()}
            for pid, request in list(running.items()):
                if (done := _finished(pid, request)) is not None:
                    del running[pid]
                    channel.write(json.dumps(done) + "\n")
    finally:
        for pid in running:
            _kill(pid)


def _finished(pid: int, request: dict) -> dict | None:
    elapsed = time.monotonic() - request["started"]
    reaped, status, usage = os.wait4(pid, os.WNOHANG)
    timed_out = reaped == 0 and elapsed > request["timeout_s"]
    if timed_out:
        _kill(pid)
        reaped, status, usage = os.wait4(pid, 0)
    if reaped == 0:
        return None
    _kill(pid)  # what the child left behind in its process group
    return {
        "id": request["id"],
        "exit_status": os.waitstatus_to_exitcode(status),
        "timed_out": timed_out,
        "seconds": round(elapsed, 3),
        "peak_memory_bytes": usage.ru_maxrss * 1024,
    }


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _fork(request: dict) -> int:
    """Start the child of one request; it answers into a file and never returns here."""
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # both sides make the group, so that neither has to wait for the other
            os.setpgid(pid, pid)
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        before = set(sys.modules)
        facts = child.answer(request["cell"])
        facts["loaded_modules"] = loadable_modules(before)
        records.atomic_write_text(Path(request["answer"]), json.dumps(facts))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # no clean-up: libraries registered for a simulated device do not unload cleanly


def loadable_modules(before: set[str]) -> list[str]:
    """Names of third-party and standard modules imported since `before`, in import order.

    Left out is what a cell observes, and every file in the folders of those packages: AITER also imports parts of
    itself as top-level modules.
    """
    observed = [f"{folder}{os.sep}" for name in OBSERVED for folder in getattr(sys.modules.get(name), "__path__", ())]
    names = []
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        origin = getattr(spec, "origin", None)
        if name in before or origin is None or spec.name != name or name.partition(".")[0] in OBSERVED:
            continue
        file_of_others = Path(origin).is_file() and not any(origin.startswith(folder) for folder in observed)
        if origin in ("built-in", "frozen") or file_of_others:
            names.append(name)
    return names


if __name__ == "__main__":
    main()
