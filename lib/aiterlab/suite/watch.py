# SPDX-License-Identifier: Apache-2.0
"""Watch a running notebook: say what it does, hold it to its budgets, and leave no process behind.

nbclient has a timeout per cell and none per notebook, and a dead or stopped kernel leaves its children running. The
watch is one thread beside the run. To stop a notebook it first interrupts the kernel, so that the executed copy shows
the line that was running, and kills all that it started when that does not help.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator

import nbformat
import psutil

from aiterlab import host
from aiterlab.suite import family, gpus, signals
from aiterlab.suite import status as words

GRACE_S = 5.0
_STUCK_S = 30.0
_STARTUP_S = 120.0
_FAREWELL_S = 1.0  # for processes that are ending by themselves, as multiprocessing's tracker does
_MEMORY_INTERVAL_S, _MEMORY_SHARE = 5.0, 0.005  # at most this share of a core: the system walks all pages for it
_FIRST_MEMORY_INTERVAL_S = 0.5  # until the kernel answers: before, there is little to see
# A driver takes a moment to free what a killed process had, and keeps a little for itself.
_GPU_FREED_S, _GPU_KEPT_BYTES = 10.0, 256 * 2**20
_INTERRUPT_INTERVAL_S = 1.0  # a kernel ignores an interrupt that comes between two cells


class Stopped(Exception):
    """The watch ended the run between two cells."""


class Watch:
    """Progress, heartbeat, budgets, memory and interrupts of one notebook.

    Args:
        budget_s: wall clock of the notebook.
        cell_budget_s: wall clock of each of its cells.
        heartbeat_s: a cell that takes longer says so this often.
        say: gets each line of progress.
    """

    def __init__(
        self,
        status: words.NotebookStatus,
        budget_s: float,
        heartbeat_s: float,
        say: Callable[[str], None],
        cell_budget_s: float = math.inf,
    ) -> None:
        self.status = status
        self.budget_s, self.cell_budget_s, self.heartbeat_s = budget_s, cell_budget_s, heartbeat_s
        self.say = say
        self.notebook: nbformat.NotebookNode | None = None  # as the engine runs it, parameters injected
        self.stuck: Callable[[], None] | None = None  # called where the run does not end although all is killed
        self.stop_status: str | None = None
        self.stop_reason: str | None = None
        self._cell: words.CellStatus | None = None
        self._cell_began = 0.0
        self._next_beat = 0.0
        self._kernel: psutil.Process | None = None
        self._kernel_answers = False
        self._spared: set[psutil.Process] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch {status.stem}", daemon=True)

    def __enter__(self) -> "Watch":
        family.adopt_orphans()
        self._spared = family.descendants()
        self._oom_kills = family.oom_kills()
        self._gpus = gpus.visible()
        self._gpu_bytes_before = self._gpu_bytes()
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + (0 if self.stop_status else _FAREWELL_S)
        while family.descendants() - self._spared and time.monotonic() < deadline:
            time.sleep(0.02)
        self._done.set()
        self._thread.join()
        self.status.left_over += self.kill()
        deadline = time.monotonic() + _GPU_FREED_S
        while (kept := self._gpu_bytes_taken()) > _GPU_KEPT_BYTES and time.monotonic() < deadline:
            time.sleep(0.1)
        if kept > _GPU_KEPT_BYTES:
            self.status.left_over.append(f"{kept / 2**30:.1f} GiB of GPU memory that nothing has freed")

    def attach(self, pid: int) -> None:
        """Take charge of a kernel's process."""
        # psutil remembers the start time, so that a reused process id is never signalled.
        self._kernel = psutil.Process(pid)
        self._spared.discard(self._kernel)  # one that was forked to become the kernel was there before the watch

    def kernel_ready(self) -> None:
        """Note that the kernel has answered."""
        self._kernel_answers = True

    def cell_started(self, cell: words.CellStatus) -> None:
        """Begin a cell, unless the run was stopped before it."""
        if self.stop_status:
            raise Stopped
        self._cell_began = time.monotonic()
        self._next_beat = self._cell_began + self.heartbeat_s
        cell.status = words.INTERRUPTED  # like the notebook: true, should nobody be left to correct it
        self._cell = cell

    def cell_ended(self, cell: words.CellStatus, status: str) -> None:
        """Record how a cell ended, and print its line."""
        cell.status, cell.seconds = status, round(time.monotonic() - self._cell_began, 3)
        self._cell = None
        self.say(f"{self._label(cell)}  {cell.seconds:.1f} s  {status}")

    def stop(self, status: str, reason: str) -> None:
        """Ask the notebook to end with this status; the first one wins."""
        if self.stop_status is None:
            self.stop_status, self.stop_reason = status, reason

    def out_of_memory(self) -> bool:
        """Tell whether the system has killed a process for want of memory since the notebook began."""
        return self._oom_kills is not None and (family.oom_kills() or 0) > self._oom_kills

    def kill(self) -> list[str]:
        """Kill whatever the notebook has started and is still there; returns what that was."""
        return family.end(self._spared)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Turn Ctrl-C and SIGTERM into an orderly stop; a second one kills the kernel and raises KeyboardInterrupt.

        A KeyboardInterrupt inside nbclient's event loop would leave its tasks and its kernel in an unknown state.
        """

        def handle(_number: int, _frame: object) -> None:
            if self.stop_status == words.INTERRUPTED:
                self.kill()
                raise KeyboardInterrupt
            self.stop(words.INTERRUPTED, "stopped by Ctrl-C or SIGTERM")

        with signals.handled(handle):
            yield

    def _run(self) -> None:
        next_look = 0.0
        next_interrupt = math.inf
        stopped_at = None
        while not self._done.wait(0.1):
            now = time.monotonic()
            self._hold_to_budgets(now)
            if self.stop_status is not None and stopped_at is None:
                stopped_at = next_interrupt = now
                self.say(f"{self.status.stem}  {self.stop_status}; stopping the kernel")
            if stopped_at is not None and now - stopped_at > GRACE_S:
                self.status.left_over += self.kill()
                if self.stuck and not self._done.wait(_STUCK_S):
                    self.stuck()
                return
            if now >= next_interrupt:
                self._interrupt()
                next_interrupt = now + _INTERRUPT_INTERVAL_S
            if now >= next_look:
                began = time.thread_time()  # waiting for a driver costs nobody anything
                self._look_at_memory()
                interval = _MEMORY_INTERVAL_S if self._kernel_answers else _FIRST_MEMORY_INTERVAL_S
                next_look = now + max(interval, (time.thread_time() - began) / _MEMORY_SHARE)
            cell = self._cell
            if cell is not None and now >= self._next_beat:
                self._next_beat += self.heartbeat_s
                self.say(f"{self._label(cell)}  still running, {now - self._cell_began:.0f} s")

    def _hold_to_budgets(self, now: float) -> None:
        if not self._kernel_answers and now - self._began > _STARTUP_S:
            self.stop(words.SETUP_FAILED, f"the kernel did not answer within {_STARTUP_S:.0f} s")
        if now - self._began > self.budget_s:
            self.stop(words.TIMEOUT, f"stopped after its budget of {self.budget_s:.0f} s")
        cell = self._cell
        if cell is not None and now - self._cell_began > self.cell_budget_s:
            self.stop(
                words.TIMEOUT, f"cell {cell.number} was stopped after a cell's budget of {self.cell_budget_s:.0f} s"
            )

    def _interrupt(self) -> None:
        if self._kernel is not None:
            with contextlib.suppress(psutil.Error):
                self._kernel.send_signal(signal.SIGINT)

    def _look_at_memory(self) -> None:
        seen = family.memory_bytes(family.descendants() - self._spared)
        if seen:
            self.status.peak_memory_bytes = max(seen, self.status.peak_memory_bytes or 0)
        if self._gpu_bytes_before is not None:
            self.status.peak_gpu_memory_bytes = max(self._gpu_bytes_taken(), self.status.peak_gpu_memory_bytes or 0)

    def _gpu_bytes(self) -> int | None:
        return host.gpu_memory_used(self._gpus) if self._gpus else None

    def _gpu_bytes_taken(self) -> int:
        if self._gpu_bytes_before is None:  # whose it is that is taken later nobody can tell
            return 0
        return (self._gpu_bytes() or 0) - self._gpu_bytes_before

    def _label(self, cell: words.CellStatus) -> str:
        total = len(self.status.cells)
        return f"{self.status.stem}  [{cell.number:>{len(str(total))}}/{total}] {cell.title}"
