# SPDX-License-Identifier: Apache-2.0
"""Processes forked from this one: started in a process group of their own, waited for, and ended whole."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from aiterlab import children

_CHECK_S = 0.05  # a process may be gone although something that it started still holds its pipe
_begun: int | None = None  # this process's end of the pipe to the one that forked it


@dataclass(frozen=True)
class Ending:
    """How a process ended, and what it cost."""

    exit_status: int
    timed_out: bool
    seconds: float
    peak_memory_bytes: int


@dataclass
class Fork:
    """A running child."""

    pid: int
    pipe: int
    started: float
    begun: bool = False

    def ended(self, limit_s: float | None = None) -> Ending | None:
        """The ending, if it has come; a child that has neither ended nor begun after `limit_s` is killed."""
        if not self.begun and select.select([self.pipe], [], [], 0)[0] and os.read(self.pipe, 1):
            self.begun = True
        elapsed = time.monotonic() - self.started
        reaped, status, usage = os.wait4(self.pid, os.WNOHANG)
        timed_out = reaped == 0 and not self.begun and limit_s is not None and elapsed > limit_s
        if timed_out:
            kill(self.pid)
            reaped, status, usage = os.wait4(self.pid, 0)
        if reaped == 0:
            return None
        kill(self.pid)  # what the child left behind in its process group
        os.close(self.pipe)
        return Ending(os.waitstatus_to_exitcode(status), timed_out, round(elapsed, 3), usage.ru_maxrss * 1024)

    def wait(self, limit_s: float) -> Ending:
        while (ending := self.ended(limit_s)) is None:
            select.select([self.pipe], [], [], _CHECK_S)
            time.sleep(0.0002)  # between closing its pipe and being reapable
        return ending


def fork(run: Callable[[], None], log: str | None = None, start: str | None = None) -> Fork:
    """Run `run` in a child, which never returns here and ends when this process does.

    Args:
        log: file that gets what the child writes to standard output and error.
        start: file whose content the log begins with.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        with contextlib.suppress(OSError):  # both sides make the group, so that neither has to wait for the other
            os.setpgid(pid, pid)
        return Fork(pid, read, time.monotonic())

    def child() -> None:
        _settle(parent, write, read)
        if log is not None:
            _log_to(log, start)
        run()

    children.run_to_end(child)


def _settle(parent: int, write: int, read: int) -> None:
    global _begun
    os.setpgid(0, 0)
    children.end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.close(read)
    if _begun is not None:
        os.close(_begun)
    _begun = write
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _log_to(path: str, start: str | None) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    if start is not None:
        with open(start, "rb") as before:
            os.write(log, before.read())
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(null)


def begun() -> None:
    """Tell the process that forked this one that its limit is no longer wanted."""
    os.write(_begun, b".")


def kill(pid: int) -> None:
    """End a process group that this process or one of its children started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def keep_pipe() -> None:
    """Stay connected to the process that forked this one through an `exec`."""
    os.set_inheritable(_begun, True)
