# SPDX-License-Identifier: Apache-2.0
"""Send the notebooks of a run to a Ray cluster that is there already, and bring back what they leave.

Ray decides where and when: a notebook asks for resources, and waits until a node has them free. Code, notebooks and the
folders that these read travel with the run; the environment does not, every node needs one made from the same lock.
"""

import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiterlab
from aiterlab import paths, provenance, security
from aiterlab.suite import status
from aiterlab.suite.environment import STACKS
from aiterlab.suite.job import Job
from aiterlab.suite.parameters import ParameterError, unknown
from aiterlab.suite.runs import Plan
from aiterlab.suite.task import Task, Wants

_DEFAULT = {"cpu": 2}  # what the minutes of the list of runs are counted for
_TRACE = 0.001  # of a custom resource: the node must have it, and others may share it
_PROBE_S = 10.0
_TRAVELS = ("environments",)  # beside the package, the notebooks and what they read; provenance hashes the lock
_IGNORED = shutil.ignore_patterns("__pycache__", ".*")


@contextlib.contextmanager
def connect(address: str, plans: Sequence[Plan], *, profile: str, stack: str | None = None) -> Iterator["Cluster"]:
    """Connect to a cluster and hand it the code; at the end nothing of ours is left running there.

    Args:
        address: `ray` for the cluster that RAY_ADDRESS names or that runs on this machine, or `ray://HOST:PORT`.
        plans: what will be run.
        profile: decides what each notebook asks for.
        stack: run on nodes of this stack alone: `cuda` and `rocm` are custom resources that such nodes declare, `cpu`
            asks for no GPU.

    Raises:
        ParameterError: no ray here, no cluster there, or one of another version; one line.
    """
    if address != "ray" and not address.startswith("ray://"):
        raise ParameterError(f"--on {address!r}: write it as ray, or as ray://HOST:PORT")
    if stack is not None and stack not in STACKS:
        raise ParameterError(unknown("unknown environment", stack, STACKS))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError:
        raise ParameterError("--on: ray is not installed here; pip install 'aiterlab[ray]'") from None
    _look_for(address)
    with tempfile.TemporaryDirectory(prefix="aiterlab-") as stage:
        _lay_out(plans, Path(stage))
        try:
            ray.init(
                address="auto" if address == "ray" else address,
                runtime_env={"working_dir": stage, "env_vars": _environment()},
                log_to_driver=False,
                logging_level="ERROR",
            )
        except Exception as error:  # Ray raises what it likes, from ConnectionError to RuntimeError
            with contextlib.suppress(Exception):  # half a connection would be in the way of the next one
                ray.shutdown()
            why = status.first_line(str(error)) or type(error).__name__
            mend = "start one with `ray start --head`, or name it in RAY_ADDRESS" if address == "ray" else "is it up?"
            raise ParameterError(f"--on {address}: no Ray cluster to work with ({why}); {mend}") from None
    try:
        yield Cluster({plan.row.stem: _wants(plan, profile, stack) for plan in plans})
    finally:
        ray.shutdown()


def _look_for(address: str) -> None:
    """Raise ParameterError where nobody listens; Ray itself tries for minutes."""
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    where = os.environ.get("RAY_ADDRESS", "auto") if address == "ray" else address
    host, colon, port = where.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal() and int(port) < 2**16:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
        except OSError as error:
            reason = f"nobody listens at {where} ({error.strerror or error})"
            raise ParameterError(f"--on {address}: {reason}; is the cluster up, and its head reachable?") from None


def _lay_out(plans: Sequence[Plan], stage: Path) -> None:
    """Copy what travels: by name, so that nothing travels that merely lies in the checkout."""
    root = paths.project_root()
    shutil.copytree(Path(aiterlab.__file__).parent, stage / "aiterlab", ignore=_IGNORED)
    for name in {*_TRAVELS, *(name for plan in plans for name in plan.row.reads)}:
        if (root / name).is_dir():
            shutil.copytree(root / name, stage / name, ignore=_IGNORED, dirs_exist_ok=True)
    (stage / "run_all.py").touch()  # makes it the project's root, see `paths.project_root`
    (stage / "notebooks").mkdir(exist_ok=True)
    for plan in plans:
        shutil.copy(plan.notebook, stage / "notebooks")
    facts = {name: value for name, value in provenance.collect().items() if name.startswith("git_")}
    (stage / paths.SOURCE_NAME).write_text(json.dumps(facts), encoding="utf-8")


def _environment() -> dict[str, str]:
    """Return the variables that the notebooks get: our switches, but no secret, no path and no choice of GPUs."""
    switches = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(provenance.ENVIRONMENT_PREFIXES)
        and not name.endswith("_VISIBLE_DEVICES")
        and not security.is_secret_name(name)
        and not value.startswith(("/", "~", "."))
    }
    # A notebook that asks for no GPU sees none, or two would share one that neither has asked for.
    return {**switches, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}


def _wants(plan: Plan, profile: str, stack: str | None) -> Wants:
    row = plan.row
    resources = {**_DEFAULT, "memory": row.memory_gb * 1e9, **row.resources.get(profile, {})}
    if stack == "cpu":
        resources.pop("gpu", None)
    elif stack is not None:
        resources[stack] = _TRACE
    measures = row.measures_time == "always" or (row.measures_time == "on a GPU" and "gpu" in resources)
    return Wants(resources, measures, row.after)


@dataclass(frozen=True)
class Cluster:
    """The cluster that we are connected to, and what each notebook asks of it."""

    wants: Mapping[str, Wants]

    def start(self, job: Job) -> "Task":
        """Send a notebook there; `schedule.Graph` calls it."""
        return Task(job, self.wants[job.stem])
