# SPDX-License-Identifier: Apache-2.0
"""Start a process that leaves nothing behind: a group of its own, a log, a temporary folder, and a sure end.

An engine is a new interpreter, or on a CPU a fork of one preloaded process (see `preload`), which this process keeps
until it ends. Either way it holds one end of a socket; when the other end is gone, however this process ended, it
kills its whole group (see `worker`).
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from aiterlab import paths, shared_memory

_FOLDER_PREFIX = "e-"  # short: the path of a socket, such as vLLM's, has at most 107 bytes
_FOLDER_NAME = re.compile(rf"{_FOLDER_PREFIX}[a-z0-9_]{{8}}")  # as tempfile makes it
GRACE_S = 10  # between the request to end and the end by force
PRELOAD_TIMEOUT_S = 300
# Places, and what an installation without DeepGEMM has to say.
_KEPT = ("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "VLLM_LOGGING_LEVEL", "VLLM_USE_DEEP_GEMM")
# Somebody else's machine, hotfix or switches; what an engine shall have of these, its specification names.
_DROPPED = ("VLLM_", "AITER_", "AITERLAB_MACHINE", "AITERLAB_HOTFIX", "GPU_ARCHS", "TRITON_INTERPRET")
# Models of a few million parameters gain nothing from a second thread, and lose a lot where cores are shared; beside a
# GPU, engines that start together would fight for the cores.
_THREADS = {"OMP_NUM_THREADS": "1"}
_CPU = {
    "NUMBA_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # The few functions that vLLM compiles without being asked take longer to compile than they ever save.
    "TORCHDYNAMO_DISABLE": "1",
}
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MEND_DISK = "make space there, or point AITERLAB_CACHE and TMPDIR elsewhere"


class StartError(RuntimeError):
    """A process could not be started, in one line."""


def base_environment() -> dict[str, str]:
    """Return the environment of every child: this one's, without other people's switches."""
    kept = {k: v for k, v in os.environ.items() if k in _KEPT or not k.startswith(_DROPPED)}
    # A child runs in a folder of its own, and on this very code.
    searched = [str(Path(__file__).parents[2]), *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))]
    return kept | {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(os.path.abspath(folder) for folder in searched)),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "agg",  # the one of a notebook's kernel cannot be imported outside it
    }


class Process:
    """A child with its group, log and temporary folder."""

    def __init__(self, pid: int, folder: Path, log: Path, popen: subprocess.Popen | None) -> None:
        self.pid, self.folder, self.log = pid, folder, log
        self._popen = popen
        self._status: int | None = None

    def end(self, grace_s: float = GRACE_S, number: int | None = None) -> int | None:
        """Wait for the whole group to end, by force after `grace_s`; return the child's exit status.

        Args:
            number: a signal to ask with; None where it was asked in another way.
        """
        if self._status is None:
            named = segments(self.pid)
            if number is not None:
                self._signal(number)
            self._wait(grace_s)
            named |= segments(self.pid)
            self._signal(signal.SIGKILL)
            self._wait(GRACE_S)
            shared_memory.delete(named)
            self._status = self._popen.wait() if self._popen else _Preloaded.status_of(self.pid)
            shutil.rmtree(self.folder, ignore_errors=True)
        return self._status

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := members(self.pid)) and (rest := deadline - time.monotonic()) > 0:
            psutil.wait_procs(left, timeout=min(0.05, rest))

    def is_running(self) -> bool:
        """Tell whether the child itself, not only others of its group, still runs."""
        with contextlib.suppress(psutil.Error):
            return self._status is None and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        return False

    def tail(self, lines: int = 20) -> str:
        """The last lines of the log."""
        with contextlib.suppress(OSError):
            text = self.log.read_text(encoding="utf-8", errors="replace")
            return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
        return ""

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


def members(group: int) -> list[psutil.Process]:
    """Every process of a group that is still there."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_group(group: int = 0) -> None:
    """Kill a whole group, by default this process's own, and leave none of its shared memory."""
    try:
        shared_memory.delete(segments(group or os.getpgrp()))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def segments(group: int) -> set[Path]:
    """The shared memory of a group that an orderly end would delete."""
    return shared_memory.mapped(process.pid for process in members(group))


def has_gpu() -> bool:
    """Tell whether engines run on a GPU here."""
    import torch

    return torch.cuda.is_available()


def engine_environment() -> dict[str, str]:
    """Return the environment of an engine, in which its scheduler, its model and our clock share one process."""
    return (
        base_environment()
        | _THREADS
        | ({} if has_gpu() else _CPU)
        | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_V2_MODEL_RUNNER": "0",  # the newer runner has no seams to time (see `steps`)
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_HOST_IP": "127.0.0.1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT") or str(paths.cache_dir() / "vllm" / "engine"),
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(paths.cache_dir() / "inductor"),
        }
    )


def end_with(channel: socket.socket) -> None:
    """In a child: kill its whole group as soon as the other end of `channel` is gone, whatever it is doing."""

    def watch() -> None:
        poll = select.poll()
        poll.register(channel, select.POLLRDHUP)
        while not poll.poll():
            pass
        # The temporary folder of this child alone: TMPDIR was made for it (see `launch` and `fork`).
        if _FOLDER_NAME.fullmatch(Path(folder := os.environ.get("TMPDIR", "")).name):
            shutil.rmtree(folder, ignore_errors=True)
        kill_group()

    threading.Thread(target=watch, name="end_with", daemon=True).start()


def launch(
    command: Sequence[str], log: Path | None, environment: Mapping[str, str], descriptors: Sequence[int] = ()
) -> Process:
    """Start a command as a group of its own.

    Args:
        log: where it writes; None: into its temporary folder.

    Raises:
        StartError: there is no place for its log or its temporary files.
    """
    folder, log, stream = _prepare(log)
    with stream:
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={**environment, "TMPDIR": str(folder)},
            cwd=folder,
            pass_fds=descriptors,
            start_new_session=True,
        )
    return Process(popen.pid, folder, log, popen)


def fork(log: Path, channel: socket.socket, environment: Mapping[str, str]) -> Process:
    """Fork an engine from the preloaded process.

    Args:
        environment: variables that nothing reads while it is imported.

    Raises:
        StartError: that process cannot be started, or there is no place for log or temporary files.
    """
    folder, log, stream = _prepare(log)
    with stream:
        answer = _Preloaded.ask(
            {"environment": {**environment, "TMPDIR": str(folder)}}, [channel.fileno(), stream.fileno()]
        )
    return Process(answer["pid"], folder, log, None)


def preload() -> None:
    """Start the preloaded process, if it does not run yet, and wait until it can fork.

    Raises:
        StartError: it cannot be started.
    """
    _Preloaded.start()


def stop_preloaded() -> None:
    """End the preloaded process; the next fork starts another."""
    _Preloaded.stop()


def describe(error: OSError) -> str:
    """Say in one line what an operating system refused, and the mend."""
    mend = MEND_DISK if error.errno in _FULL_DISK else "choose a folder that can be written"
    return f"{error.strerror} ({error.filename or 'a file'}); {mend}"


def _prepare(log: Path | None):
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX))
        log = log or folder / "log"
        log.parent.mkdir(parents=True, exist_ok=True)
        return folder, log, log.open("wb")
    except OSError as error:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        raise StartError(describe(error)) from None


class _Preloaded:
    """The one preloaded process of this process."""

    process: Process | None = None
    control: socket.socket | None = None
    lock = threading.RLock()

    @classmethod
    def ask(cls, request: dict, descriptors: Sequence[int] = ()) -> dict:
        with cls.lock:
            cls.start()
            try:
                socket.send_fds(cls.control, [json.dumps(request).encode()], list(descriptors))
                if answer := cls.control.recv(1 << 16):
                    return json.loads(answer)
            except OSError:
                pass
            raise cls._ended()

    @classmethod
    def status_of(cls, pid: int) -> int | None:
        with cls.lock, contextlib.suppress(StartError):
            return cls.ask({"status_of": pid})["status"] if cls.process else None

    @classmethod
    def start(cls) -> None:
        with cls.lock:
            if cls.process is None:
                cls._start()

    @classmethod
    def _start(cls) -> None:
        cls.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "aiterlab.spec_decode.preload", str(theirs.fileno())]
            cls.process = launch(command, None, engine_environment(), [theirs.fileno()])
        cls.control.settimeout(PRELOAD_TIMEOUT_S)
        try:
            if not cls.control.recv(1 << 16):
                raise cls._ended()
        except TimeoutError:
            raise cls._ended() from None
        except BaseException:
            cls.stop()
            raise
        cls.control.settimeout(None)

    @classmethod
    def _ended(cls) -> StartError:
        tail = cls.process.tail(1)
        cls.stop()
        return StartError(f"the process that holds vLLM's imports ended: {tail or 'it said nothing'}")

    @classmethod
    def stop(cls) -> None:
        with cls.lock:
            process, cls.process = cls.process, None
            if process:
                cls.control.close()
                process.end(grace_s=2)


atexit.register(stop_preloaded)
