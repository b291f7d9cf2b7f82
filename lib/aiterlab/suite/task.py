# SPDX-License-Identifier: Apache-2.0
"""Follow one notebook on a Ray cluster: send it there, pass on what it says, bring back what it leaves.

A node or a process that is lost costs an attempt, and Ray finds the next place. However it goes, the notebook's folder
here says how it ended.
"""

import collections
import contextlib
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from time import monotonic, sleep
from typing import Any

from aiterlab import paths, records
from aiterlab.suite import status
from aiterlab.suite.job import Job
from aiterlab.suite.remote import Remote

ATTEMPTS = 3
_TICK_S = 1.0
_FAREWELL_S = 60.0  # after an interrupt; a notebook that is stopped needs seconds, half a minute if it is stuck
_VERDICT_S = 60.0  # Ray by its defaults takes that long to call a silent node dead
_RAY_NAMES = {"cpu": "CPU", "gpu": "GPU"}


@dataclass(frozen=True)
class Wants:
    """What a notebook asks of the cluster.

    Args:
        resources: amounts by name: `cpu`, `gpu`, `memory` in bytes, or any that the cluster's nodes declare.
        whole_node: every core of its node, because it measures time: nothing else runs beside it then.
        after: stems of those whose records it reads.
    """

    resources: Mapping[str, float]
    whole_node: bool = False
    after: tuple[str, ...] = ()


class _Ended(Exception):
    """What ends the notebook from here: a word for its status, and the reason."""


class _Lost(Exception):
    """The node, or the process there, is gone."""


@dataclass
class Task:
    """A notebook on the cluster, as `schedule.Running` sees it; one thread here follows it."""

    job: Job
    wants: Wants
    pipe: int = field(init=False)

    def __post_init__(self) -> None:
        self.pipe, self._bell = os.pipe()  # for those who select; the lines themselves are in the deque
        os.set_blocking(self.pipe, False)
        os.set_blocking(self._bell, False)
        self._lines: collections.deque[str] = collections.deque()
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._stop_by: float | None = None
        self._exit_code: int | None = None
        self._begun = False
        threading.Thread(target=self._run, name=f"cluster {self.job.stem}", daemon=True).start()

    def lines(self) -> list[str]:
        """Return what it has said since the last call."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.pipe, 1 << 16)
        return [self._lines.popleft() for _ in range(len(self._lines))]

    def ended(self) -> int | None:
        """Return the exit code of its process, 0 where it never had one, or None while it runs."""
        return self._exit_code

    def signal(self, number: int) -> None:
        """Pass a signal on, wherever it is; callable from a signal handler."""
        self._signals.put(number)

    def close(self) -> None:
        """Let go of the pipe."""
        os.close(self.pipe)
        os.close(self._bell)

    def _say(self, line: str) -> None:
        self._lines.append(line)
        with contextlib.suppress(BlockingIOError):
            os.write(self._bell, b"\n")

    def _interrupted(self) -> bool:
        return self._stop_by is not None or not self._signals.empty()

    def _run(self) -> None:
        code = 0
        try:
            status.of(self.job).save(self.job.folder)  # interrupted, should this runner be killed
            code = self._attempts()
        except _Ended as error:
            self._settle(*error.args)
        except Exception as error:  # the notebook must be accounted for, whatever Ray or the disk did
            # Ray's own words hold addresses of machines.
            said = "" if type(error).__module__.startswith("ray") else f": {status.first_line(str(error))}"
            self._settle(status.FAILED, f"{type(error).__name__}{said}")
        finally:
            self._exit_code = code  # last: the pipe is closed then

    def _attempts(self) -> int:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._attempt(attempt)
            except _Lost as error:
                if self._interrupted():
                    raise _Ended(status.INTERRUPTED, f"stopped by Ctrl-C or SIGTERM; {error}") from None
                lost = str(error)
                if attempt < ATTEMPTS:
                    self._say(f"{self.job.stem}  {lost}; attempt {attempt + 1} of {ATTEMPTS}")
        raise _Ended(status.FAILED, f"lost {ATTEMPTS} times; last, {lost}")

    def _attempt(self, attempt: int) -> int:
        import ray

        asked = self._asked()
        own = {name: value for name, value in asked.items() if name not in ("cpu", "gpu", "memory")}
        options = {"num_cpus": asked["cpu"], "num_gpus": asked.get("gpu", 0), "memory": int(asked["memory"])}
        # Attempts are counted here, because a status has to tell of them.
        remote = ray.remote(Remote).options(**options, resources=own, max_restarts=0, max_task_retries=0).remote()
        node = None
        try:
            node = self._place(remote, asked)
            self._begun = True
            self._say(f"{self.job.stem}  on node {node[:8]} ({_worded(asked)})")
            place = {"id": node, "asked": asked, "attempts": attempt}
            job = replace(self.job, notebook=Path(self.job.notebook.name), run_dir=Path(self.job.run_dir.name))
            self._answer(remote.start.remote(replace(job, provenance={}), self._given(), place))
            code = self._hear(remote)
            self._keep(*self._answer(remote.collect.remote()))
            self._answer(remote.close.remote())
            return code
        except ray.exceptions.RayTaskError as error:
            raise _Ended(status.FAILED, f"on its node: {status.first_line(str(error.cause))}") from None
        except ray.exceptions.RuntimeEnvSetupError:
            raise _Ended(status.FAILED, "a node could not lay out the code; the cluster's log says why") from None
        except ray.exceptions.RayError as error:  # whose text holds addresses of machines
            kind = type(error).__name__
            if node is None:
                raise _Lost(f"the process that was to run it died before it had begun ({kind})") from None
            out_of_touch = isinstance(error, ray.exceptions.ActorUnavailableError)
            raise _Lost(f"{self._verdict(node, out_of_touch)} ({kind})") from None
        finally:
            with contextlib.suppress(Exception):
                ray.kill(remote)

    def _verdict(self, node: str, out_of_touch: bool) -> str:
        """Say whether a node died or only our process there; waits for Ray to know where it has only lost touch."""
        import ray

        name, deadline = node[:8], monotonic() + (_VERDICT_S if out_of_touch else 0)
        if out_of_touch:
            self._say(f"{self.job.stem}  lost touch with node {name}; Ray has {_VERDICT_S:.0f} s to say why")
        while any(one["Alive"] and one["NodeID"] == node for one in ray.nodes()):
            if monotonic() >= deadline or self._interrupted():
                return f"its process on node {name} {'does not answer' if out_of_touch else 'died'}"
            sleep(_TICK_S)
        return f"node {name} died"

    def _asked(self) -> dict[str, float]:
        """Return what to ask Ray for; raises _Ended unless some node has it, busy or not."""
        import ray

        asked = dict(self.wants.resources)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        held = [{name: node.get(_RAY_NAMES.get(name, name), 0) for name in asked} for node in nodes]
        fitting = [has for has in held if all(has[name] >= amount for name, amount in asked.items())]
        if not fitting:
            there = "; ".join(sorted(map(_worded, held))) or "nothing"
            reason = f"no node of the cluster has {_worded(asked)}; its nodes have: {there}"
            raise _Ended(status.FAILED if self._begun else status.SKIPPED, reason)
        if self.wants.whole_node:
            asked["cpu"] = max(has["cpu"] for has in fitting)
        return asked

    def _place(self, remote: Any, asked: Mapping[str, float]) -> str:
        """Wait until Ray has found a node, and return its id; an interrupt, or the end of all such nodes, gives up."""
        import ray

        here = remote.where.remote()
        told = False
        while not ray.wait([here], timeout=_TICK_S)[0]:
            if not self._signals.empty():
                raise _Ended(status.INTERRUPTED, "stopped by Ctrl-C or SIGTERM before it had begun")
            self._asked()
            if not told:
                told = True
                self._say(f"{self.job.stem}  waits for a node with {_worded(asked)}")
        return ray.get(here)

    def _hear(self, remote: Any) -> int:
        """Pass on what is said there, and signals to there, until the end; returns the exit code."""
        code = None
        while code is None:
            with contextlib.suppress(queue.Empty):
                while True:
                    remote.signal.remote(self._signals.get_nowait())
                    self._stop_by = self._stop_by or monotonic() + _FAREWELL_S
            lines, code = self._answer(remote.hear.remote())
            for line in lines:
                self._say(line)
        return code

    def _answer(self, call: Any) -> Any:
        """Return the answer to a call; only an interrupt sets a limit to the wait."""
        import ray

        while not ray.wait([call], timeout=_TICK_S)[0]:
            if self._stop_by is not None and monotonic() > self._stop_by:
                reason = f"stopped by Ctrl-C or SIGTERM; its node did not answer within {_FAREWELL_S:.0f} s"
                raise _Ended(status.INTERRUPTED, reason)
        return ray.get(call)

    def _given(self) -> dict[str, bytes]:
        """Return the records and endings that the notebook reads, and the answers that its run has already."""
        run_dir = self.job.run_dir
        names = [f"{stem}/{name}" for stem in self.wants.after for name in (records.RECORD_NAME, status.STATUS_NAME)]
        found = [run_dir / name for name in names]
        if self.wants.after:
            found += sorted((run_dir / paths.CELLS_NAME).glob("*.json"))
        return {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in found if path.is_file()}

    def _keep(self, files: Mapping[str, bytes], left_out: Sequence[str]) -> None:
        """Write what came back; the status last, because it vouches for the others."""
        own = (self.job.stem, paths.CELLS_NAME)
        for name in sorted(files, key=lambda name: PurePosixPath(name).name == status.STATUS_NAME):
            records.atomic_write_bytes(inside(self.job.run_dir, name, own), files[name])
        for name in left_out:
            self._say(f"{self.job.stem}  {name} is too large to come back and stays behind")

    def _settle(self, word: str, reason: str) -> None:
        """End a notebook that could not write its own account, or whose account did not come back."""
        from aiterlab.suite import execution  # seconds, and hardly ever needed here

        ending = status.of(self.job)
        ending.end(word, reason)
        execution.settle_unrun(self.job, ending)


def inside(run_dir: Path, name: str, folders: Sequence[str]) -> Path:
    """Return where a file that another machine has named may be written; ValueError unless in one of `folders`."""
    parts = PurePosixPath(name).parts
    target = run_dir.joinpath(*parts)
    allowed = len(parts) > 1 and parts[0] in folders and ".." not in parts and "\\" not in name and "\0" not in name
    if not allowed or not target.resolve().is_relative_to(run_dir.resolve() / parts[0]):
        raise ValueError(f"a node sent a file named {name!r}, which is none of the notebook's own")
    return target


def _worded(resources: Mapping[str, float]) -> str:
    return ", ".join(
        f"{value / 1e9:.1f} GB of memory" if name == "memory" else f"{name} {value:g}"
        for name, value in resources.items()
    )
