# SPDX-License-Identifier: Apache-2.0
"""Run each notebook in a process of its own, of which the runner hears lines and, at the end, reads the status.

`fork` makes one from a runner that has preloaded what notebooks need; `spawn` starts a new interpreter, run as
`python -m aiterlab.suite.worker` with the job on standard input.

It is two processes: a keeper that waits, and its child that runs the notebook. Whichever of runner, keeper and child is
killed, another one is there to end what it had started and to write down how the notebook ended.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from aiterlab import children
from aiterlab.suite import family, hold
from aiterlab.suite.job import Job
from aiterlab.suite.signals import TO_END

_AFTER_KILL_S = 0.5  # in which a runner that was killed as well is gone


@dataclass
class Worker:
    """A running notebook: its process, the pipe that it says its lines to, and the folder for temporary files."""

    job: Job
    pid: int
    pipe: int
    folder: str
    _heard: bytes = b""
    _exit_code: int | None = None

    def lines(self) -> list[str]:
        """Return the whole lines that were said since the last call."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.pipe, 1 << 16):
                self._heard += chunk
        *whole, self._heard = self._heard.split(b"\n")
        return [line.decode("utf-8", errors="replace") for line in whole]

    def ended(self) -> int | None:
        """Return the exit code, negative for a signal, or None while it runs."""
        if self._exit_code is None:
            pid, ending = os.waitpid(self.pid, os.WNOHANG)
            self._exit_code = os.waitstatus_to_exitcode(ending) if pid else None
        return self._exit_code

    def signal(self, number: int) -> None:
        """Send a signal, if it is still there."""
        if self._exit_code is None:  # not asked again: this is called between any two steps of `ended`
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def close(self) -> None:
        """Let go of the pipe, and of temporary files that nobody was left to delete."""
        os.close(self.pipe)
        shutil.rmtree(self.folder, ignore_errors=True)


def fork(job: Job) -> Worker:
    """Start a notebook in a child of this process, which must have no threads and no GPU."""
    parent = os.getpid()

    def start(folder: str, output: int) -> int:
        with contextlib.suppress(OSError, AttributeError):  # or the child would write what is buffered once more
            sys.stdout.flush()
            sys.stderr.flush()
        with _signals_blocked():
            pid = os.fork()
            if pid == 0:
                children.run_to_end(lambda: _keep(job, parent, folder, output))
        return pid

    return _begin(job, start)


def spawn(job: Job) -> Worker:
    """Start a notebook in a new interpreter."""

    def start(folder: str, output: int) -> int:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "aiterlab.suite.worker", str(os.getpid()), folder],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        with process.stdin as stdin:
            stdin.write(json.dumps(asdict(job), default=str).encode())
        process.returncode = 0  # waited for by its number; Popen must not wait as well
        return process.pid

    return _begin(job, start)


def _begin(job: Job, start: Callable[[str, int], int]) -> Worker:
    """Make what a worker needs, and start its process.

    It gets one folder for all temporary files: what is killed, or forked, deletes none of its own. The folder's name is
    short, as the path of a socket, such as vLLM's, has at most 107 bytes.
    """
    folder = tempfile.mkdtemp(prefix="nb-")
    read, write = os.pipe()
    try:
        pid = start(folder, write)
    except BaseException:
        os.close(read)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(write)
    os.set_blocking(read, False)
    return Worker(job, pid, read, folder)


def main() -> None:
    """Run the job that standard input describes."""
    described = json.load(sys.stdin)
    job = Job(**{**described, "notebook": Path(described["notebook"]), "run_dir": Path(described["run_dir"])})
    hold.share(job.run_dir)
    with _signals_blocked():
        children.run_to_end(lambda: _keep(job, int(sys.argv[1]), sys.argv[2], None))


def _keep(job: Job, parent: int, folder: str, output: int | None) -> int:
    """Run the notebook in a child; when that is killed, end what it has left and write down how it ended.

    Signals must be blocked. A fork of the runner gives the pipe that replaces the runner's `output`. Keeper, child and
    runner delete the folder at their end, whichever of them are left.
    """
    if output is not None:
        os.setsid()  # Ctrl-C reaches the runner alone, which ends its workers in order
        for number in (1, 2):
            os.dup2(output, number)
    os.set_blocking(1, False)  # a runner that does not listen must not hold up its notebooks
    family.adopt_orphans()
    oom_kills = family.oom_kills()
    keeper = os.getpid()
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    try:
        child = os.fork()
        if child == 0:
            return _run(job, keeper, forked=output is not None)
        ended, asked = _wait(child, parent)
        if ended:
            family.end(set())
            _account(job, ended, asked, family.oom_kills() != oom_kills)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _wait(child: int, parent: int) -> tuple[int, bool]:
    """Wait for the child, passing signals on; returns its exit code and whether it was asked to end."""
    asked = []

    def pass_on(*_: object) -> None:
        asked.append(True)
        os.kill(child, signal.SIGTERM)

    for number in TO_END:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_END)
    children.end_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        pass_on()
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    for number in TO_END:
        signal.signal(number, signal.SIG_IGN)  # from here on its number may be another process's
    exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # Whoever kills a run kills its processes one after another, and a runner takes longer to go than its notebook.
    deadline = time.monotonic() + _AFTER_KILL_S
    while exit_code < 0 and not asked and os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.01)
    return exit_code, bool(asked) or os.getppid() != parent


def _run(job: Job, keeper: int, *, forked: bool) -> int:
    for number in TO_END:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_END)
    children.end_with_parent(signal.SIGTERM)
    if os.getppid() != keeper:
        return 1
    from aiterlab.suite import warm
    from aiterlab.suite.execution import run_notebook

    kernel = warm.Kernel() if forked else None
    run_notebook(job, say=_say, kernel=kernel, own_process=True)
    return 0


def _say(line: str) -> None:
    # Not through sys.stdout, which a fork may have inherited from whoever redirected it.
    with contextlib.suppress(OSError):  # the runner is gone, or has not listened for long
        os.write(1, f"{line}\n".encode(errors="backslashreplace"))


def _account(job: Job, exit_code: int, asked: bool, out_of_memory: bool) -> None:
    from aiterlab.suite import execution, status  # seconds, and hardly ever needed here

    word = status.INTERRUPTED if asked else status.OUT_OF_MEMORY if out_of_memory else status.FAILED
    status.settle(job, exit_code, word, execution.settle_unrun)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Keep signals waiting while a child still has its parent's handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TO_END)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


if __name__ == "__main__":
    main()
