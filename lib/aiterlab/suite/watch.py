# SPDX-License-Identifier: Apache-2.0
"""Watch a running notebook: say what it does, hold it to its budget, and leave no process behind.

nbclient has a timeout per cell and none per notebook, and a dead or stopped kernel leaves its children running. The
watch is one thread beside the run. To stop a notebook it first interrupts the kernel, so that the executed copy shows
the line that was running, and kills the kernel's whole process group when that does not help.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import nbformat
import psutil

from aiterlab.suite import status as words

GRACE_S = 5.0
_FAMILY_INTERVAL_S = 5.0
_INTERRUPT_INTERVAL_S = 1.0  # a kernel ignores an interrupt that comes between two cells


class Stopped(Exception):
    """The watch ended the run between two cells."""


class Watch:
    """Progress, heartbeat, time budget and interrupts of one notebook."""

    def __init__(self, status: words.NotebookStatus, budget_s: float, heartbeat_s: float, say: Callable[[str], None]):
        self.status = status
        self.budget_s = budget_s
        self.heartbeat_s = heartbeat_s
        self.say = say
        self.notebook: nbformat.NotebookNode | None = None  # as the engine runs it, parameters injected
        self.stop_status: str | None = None
        self._cell: words.CellStatus | None = None
        self._cell_began = 0.0
        self._next_beat = 0.0
        self._kernel: psutil.Process | None = None
        self._group: int | None = None
        self._family: set[psutil.Process] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch {status.stem}", daemon=True)

    def __enter__(self) -> "Watch":
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.kill()

    def attach(self, pid: int, group: int) -> None:
        """Take charge of a kernel's process and process group."""
        # psutil remembers the start time, so that a reused process id is never signalled.
        self._kernel, self._group = psutil.Process(pid), group

    def cell_started(self, cell: words.CellStatus) -> None:
        """Begin a cell, unless the run was stopped before it."""
        if self.stop_status:
            raise Stopped
        self._cell_began = time.monotonic()
        self._next_beat = self._cell_began + self.heartbeat_s
        self._cell = cell

    def cell_ended(self, cell: words.CellStatus, status: str) -> None:
        """Record how a cell ended, and print its line."""
        cell.status, cell.seconds = status, round(time.monotonic() - self._cell_began, 3)
        self._cell = None
        self.say(f"{self._label(cell)}  {cell.seconds:.1f} s  {status}")

    def stop(self, status: str) -> None:
        """Ask the notebook to end with this status; the first reason wins."""
        self.stop_status = self.stop_status or status

    def kill(self) -> None:
        """Kill whatever is left of the kernel's process group and of the processes it was seen to start."""
        self._find_family()
        if self._group not in (None, os.getpgrp()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._group, signal.SIGKILL)
        for process in self._family:
            with contextlib.suppress(psutil.Error):
                process.kill()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Turn Ctrl-C and SIGTERM into an orderly stop; a second one kills the kernel and raises KeyboardInterrupt.

        A KeyboardInterrupt inside nbclient's event loop would leave its tasks and its kernel in an unknown state.
        """

        def handle(_number: int, _frame: object) -> None:
            if self.stop_status == words.INTERRUPTED:
                self.kill()
                raise KeyboardInterrupt
            self.stop(words.INTERRUPTED)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self) -> None:
        next_family = 0.0
        next_interrupt = math.inf
        stopped_at = None
        while not self._done.wait(0.1):
            now = time.monotonic()
            if self.stop_status is None and now - self._began > self.budget_s:
                self.stop(words.TIMEOUT)
            if self.stop_status is not None and stopped_at is None:
                stopped_at = next_interrupt = now
                self.say(f"{self.status.stem}  {self.stop_status}; stopping the kernel")
            if stopped_at is not None and now - stopped_at > GRACE_S:
                self.kill()
                return
            if now >= next_interrupt:
                self._interrupt()
                next_interrupt = now + _INTERRUPT_INTERVAL_S
            if now >= next_family:
                self._find_family()
                next_family = now + _FAMILY_INTERVAL_S
            cell = self._cell
            if cell is not None and now >= self._next_beat:
                self._next_beat += self.heartbeat_s
                self.say(f"{self._label(cell)}  still running, {now - self._cell_began:.0f} s")

    def _interrupt(self) -> None:
        if self._kernel is not None:
            with contextlib.suppress(psutil.Error):
                self._kernel.send_signal(signal.SIGINT)

    def _find_family(self) -> None:
        if self._kernel is not None:
            with contextlib.suppress(psutil.Error):
                self._family |= set(self._kernel.children(recursive=True))

    def _label(self, cell: words.CellStatus) -> str:
        total = len(self.status.cells)
        return f"{self.status.stem}  [{cell.number:>{len(str(total))}}/{total}] {cell.title}"
