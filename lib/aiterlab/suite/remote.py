# SPDX-License-Identifier: Apache-2.0
"""Run one notebook on this machine for a runner on another one: what `task.Task` calls, through Ray.

The notebook runs as it does at home: `worker.spawn` in a process of its own. The actor that holds this object only
passes on what the runner wants to hear, so that it answers at any moment. When Ray ends the actor, because the runner
was killed or its network failed, the notebook's process gets SIGTERM and ends in order.
"""

import select
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from aiterlab import provenance, records
from aiterlab.suite import worker
from aiterlab.suite.job import Job

LIMIT_BYTES = 256_000_000  # of a notebook's folder; what is larger stays behind
_LISTEN_S = 0.5  # how long a call may last; a signal is passed on between two calls


class Remote:
    """One notebook, its process and its temporary run folder."""

    def where(self) -> str:
        """Return the id of this node in its cluster."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def start(self, job: Job, given: Mapping[str, bytes], node: Mapping[str, object]) -> None:
        """Lay the files that the notebook reads, and start it.

        Args:
            job: its notebook and run folder are names, to be completed here.
            given: content of each file that it reads, by the file's path in the run folder.
            node: what the status says about this place.
        """
        # Beside the code that travelled: should this process be killed, Ray deletes both together one day.
        self._scratch = Path(tempfile.mkdtemp(prefix="run-", dir=Path.cwd()))
        if job.profile == records.FULL and (missing := provenance.missing_for_full(provenance.collect())):
            raise RuntimeError(f"profile full: a number without its origin is none; missing: {'; '.join(missing)}")
        run_dir = self._scratch / job.run_dir
        self._given = set(given)
        for name, data in given.items():
            records.atomic_write_bytes(run_dir / name, data)
        notebook = Path("notebooks", job.notebook).absolute()
        self._job = replace(job, notebook=notebook, run_dir=run_dir, provenance=provenance.collect(), node=node)
        self._worker = worker.spawn(self._job)

    def hear(self) -> tuple[list[str], int | None]:
        """Return the lines that were said since the last call, after waiting a moment for one, and the exit code."""
        code = self._worker.ended()  # before its last lines are read
        if code is None:
            select.select([self._worker.pipe], [], [], _LISTEN_S)
        return self._worker.lines(), code

    def signal(self, number: int) -> None:
        """Pass a signal on."""
        self._worker.signal(number)

    def collect(self) -> tuple[dict[str, bytes], list[str]]:
        """Return the content of each file that the notebook left, by path in the run folder, and what is too large."""
        found, left_out, total = {}, [], 0
        files = [path for path in self._job.run_dir.rglob("*") if path.is_file() and not path.is_symlink()]
        for path in sorted(files, key=lambda path: path.stat().st_size):
            name = path.relative_to(self._job.run_dir).as_posix()
            if name in self._given or path.name.startswith("."):
                continue
            total += path.stat().st_size
            if total <= LIMIT_BYTES:
                found[name] = path.read_bytes()
            else:
                left_out.append(name)
        return found, left_out

    def close(self) -> None:
        """Delete the temporary folder."""
        self._worker.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
