# SPDX-License-Identifier: Apache-2.0
"""Run a graph of notebooks, as many at a time as the machine can bear, and never let one go unaccounted for.

A notebook starts when those before it have ended, whatever their ending: one that reads records says itself which are
missing. One that measures time runs alone.
"""

import contextlib
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import psutil

from aiterlab import host, shared_memory
from aiterlab.suite import family, gpus, signals, status
from aiterlab.suite.job import Job

_TICK_S = 0.2
_FAREWELL_S = 1.0


class Running(Protocol):
    """A notebook at work somewhere: `worker.Worker` on this machine, `task.Task` on another one."""

    job: Job
    pipe: int

    def lines(self) -> list[str]:
        """Return what it has said since the last call."""

    def ended(self) -> int | None:
        """Return its exit code, or None while it runs."""

    def signal(self, number: int) -> None:
        """Pass a signal on."""

    def close(self) -> None:
        """Let go of what connects to it."""


@dataclass(frozen=True)
class Node:
    """A notebook in the graph.

    Args:
        job: what to run.
        after: stems of those that must have ended before it.
        memory_bytes: what it needs.
        alone: nothing else may run at the same time, because it measures time.
        prepare: called right before it starts, with the endings so far; returns the job to run, or an ending that
            makes running needless.
    """

    job: Job
    after: tuple[str, ...] = ()
    memory_bytes: int = 0
    alone: bool = False
    prepare: Callable[[Job, dict[str, status.NotebookStatus]], Job | status.NotebookStatus] = lambda job, _: job


@dataclass
class Graph:
    """The notebooks of one run, and where each of them stands.

    Args:
        nodes: in the order in which they are preferred.
        start: starts one of them.
        at_once: how many may run at the same time.
        say: gets each line of progress.
        account: writes the folder of a notebook that cannot do it itself.
        fail_fast: skip what has not begun when one has failed.
    """

    nodes: Sequence[Node]
    start: Callable[[Job], Running]
    at_once: int
    say: Callable[[str], None]
    account: Callable[[Job, status.NotebookStatus], None]
    fail_fast: bool = False
    ended: dict[str, status.NotebookStatus] = field(default_factory=dict)
    _running: dict[str, Running] = field(default_factory=dict)
    _interrupts: int = 0
    _gpus: contextlib.ExitStack | None = None
    _told: bool = False

    def run(self) -> Iterator[status.NotebookStatus]:
        """Yield the ending of each notebook as it comes; after an interrupt, of those that had begun."""
        family.adopt_orphans()
        memory = host.available_memory()
        waiting = list(self.nodes)
        with self._signals():
            while self._running or (waiting and not self._interrupts):
                for node in [] if self._interrupts else list(waiting):
                    ending = self._skip(node)
                    if ending or self._may_start(node, memory):
                        ending = ending or self._begin(node, memory)
                        waiting.remove(node)
                        if ending:
                            yield self._end(ending)
                for worker in self._wait():
                    yield self._end(self._settle(worker))

    def _may_start(self, node: Node, memory: int) -> bool:
        if not all(stem in self.ended for stem in node.after if any(one.job.stem == stem for one in self.nodes)):
            return False
        busy = [one for one in self.nodes if one.job.stem in self._running]
        if any(one.alone for one in busy) or (node.alone and busy):
            return False
        used = sum(one.memory_bytes for one in busy)
        if busy and (len(busy) >= self.at_once or used + node.memory_bytes > memory):
            return False
        return not node.alone or self._has_gpus()

    def _has_gpus(self) -> bool:
        """Hold the GPUs, if there are any, from the first notebook that measures on them to the end of the run."""
        if self._gpus is None:
            self._gpus = gpus.lock()
            if self._gpus is None and not self._told:
                self._told = True
                self.say("another run uses the GPU; waiting for its end")
        if self._gpus is None:
            time.sleep(_TICK_S)
        return self._gpus is not None

    def _skip(self, node: Node) -> status.NotebookStatus | None:
        """Return the ending of a notebook that will not even be looked at."""
        failed = [stem for stem, one in self.ended.items() if one.status not in (status.OK, status.SKIPPED)]
        if not (self.fail_fast and failed):
            return None
        return self._unrun(node, status.SKIPPED, f"{failed[0]} did not end well, and --fail-fast was given")

    def _unrun(self, node: Node, word: str, reason: str) -> status.NotebookStatus:
        # What an earlier run has left is no result of this one.
        shutil.rmtree(node.job.folder, ignore_errors=True)
        return status.end_unrun(node.job, word, reason, self.account)

    def _begin(self, node: Node, memory: int) -> status.NotebookStatus | None:
        try:
            prepared = node.prepare(node.job, self.ended)
            if isinstance(prepared, status.NotebookStatus):
                return prepared
            if node.memory_bytes > memory:
                needed = f"it needs {node.memory_bytes / 1e9:.0f} GB of memory"
                return self._unrun(node, status.SKIPPED, f"{needed}, and {memory / 1e9:.1f} GB are free here")
            shutil.rmtree(node.job.folder, ignore_errors=True)
            worker = self.start(prepared)
        except Exception as error:  # such as a notebook that somebody has half saved meanwhile; the others go on
            return self._unrun(node, status.SETUP_FAILED, f"{type(error).__name__}: {error}")
        self._running[node.job.stem] = worker
        if self._interrupts:  # the signal came before it could be passed on
            worker.signal(signal.SIGTERM)
        return None

    def _wait(self) -> list[Running]:
        """Pass on what is said for a moment; returns who has ended meanwhile."""
        if not self._running:
            return []
        select.select([worker.pipe for worker in self._running.values()], [], [], _TICK_S)
        over = []
        for stem, worker in list(self._running.items()):
            ended = worker.ended() is not None  # before its last lines are read
            for line in worker.lines():
                self.say(line)
            if ended:
                del self._running[stem]
                over.append(worker)
        if not over:
            time.sleep(0.002)  # a pipe that is closed is always readable; its process is gone a moment later
        return over

    def _settle(self, worker: Running) -> status.NotebookStatus:
        """Return how it ended, which its own status does not know if its process was killed."""
        self._end_orphans()
        worker.close()
        word = status.INTERRUPTED if self._interrupts else status.FAILED
        return status.settle(worker.job, worker.ended(), word, self.account)

    def _end(self, ending: status.NotebookStatus) -> status.NotebookStatus:
        self.ended[ending.stem] = ending
        return ending

    def _end_orphans(self) -> None:
        """Kill what a killed worker has left; as its next ancestor that adopts, this process is the parent now."""
        workers = {getattr(worker, "pid", None) for worker in self._running.values()}
        for child in psutil.Process().children():
            left: list[psutil.Process] = []
            with contextlib.suppress(psutil.Error):
                if child.pid not in workers and child.status() != psutil.STATUS_ZOMBIE and child not in self._before:
                    left = [*child.children(recursive=True), child]
            shared_memory.delete(shared_memory.mapped(process.pid for process in left))
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=_FAREWELL_S)  # what still runs could write a file once more

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass Ctrl-C and SIGTERM on to every notebook, which ends in order; a second one ends it at once."""
        self._before = set(psutil.Process().children())

        def handle(_number: int, _frame: object) -> None:
            self._interrupts += 1
            for worker in self._running.values():
                worker.signal(signal.SIGTERM)

        try:
            with signals.handled(handle):
                yield
        finally:
            if self._gpus:
                self._gpus.close()
