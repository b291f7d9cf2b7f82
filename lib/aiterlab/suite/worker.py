# SPDX-License-Identifier: Apache-2.0
"""Run each notebook in a process of its own, of which the runner hears lines and, at the end, reads the status.

`fork` makes one from a runner that has preloaded what notebooks need; `spawn` starts a new interpreter, run as
`python -m aiterlab.suite.worker` with the job on standard input.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from aiterlab.suite import family
from aiterlab.suite.job import Job


@dataclass
class Worker:
    """A running notebook: its process, and the pipe that it says its lines to."""

    job: Job
    pid: int
    pipe: int
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
        if self.ended() is None:
            os.kill(self.pid, number)

    def close(self) -> None:
        """Let go of the pipe."""
        os.close(self.pipe)


def fork(job: Job) -> Worker:
    """Start a notebook in a child of this process, which must have no threads and no GPU."""
    read, write = os.pipe()
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(write)
        os.set_blocking(read, False)
        return Worker(job, pid, read)
    exit_code = 1
    try:
        os.close(read)
        os.setsid()  # Ctrl-C reaches the runner alone, which ends its workers in order
        for number in (1, 2):
            os.dup2(write, number)
        _run(job, parent, forked=True)
        exit_code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)


def spawn(job: Job) -> Worker:
    """Start a notebook in a new interpreter."""
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "aiterlab.suite.worker", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=write,
        stderr=write,
        start_new_session=True,
    )
    os.close(write)
    os.set_blocking(read, False)
    with process.stdin as stdin:
        stdin.write(json.dumps(asdict(job), default=str).encode())
    process.returncode = 0  # waited for by its number; Popen must not wait as well
    return Worker(job, process.pid, read)


def main() -> None:
    """Run the job that standard input describes."""
    described = json.load(sys.stdin)
    job = Job(**{**described, "notebook": Path(described["notebook"]), "run_dir": Path(described["run_dir"])})
    _run(job, int(sys.argv[1]), forked=False)


def _run(job: Job, parent: int, *, forked: bool) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    family.end_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        return
    from aiterlab.suite import warm
    from aiterlab.suite.execution import run_notebook

    kernel = warm.Kernel() if forked else None
    # Not through sys.stdout, which a fork may have inherited from whoever redirected it.
    run_notebook(job, say=lambda line: os.write(1, f"{line}\n".encode()), kernel=kernel, own_process=True)


if __name__ == "__main__":
    main()
