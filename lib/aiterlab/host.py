# SPDX-License-Identifier: Apache-2.0
"""What is the machine: its processor, its memory, what a container leaves of them, and its GPUs.

Nothing is initialized for an answer. A process in which CUDA or HIP was set up cannot be forked any more, and importing
torch takes seconds; so GPUs are asked through the kernel driver's own files and `nvidia-smi`, never through torch. The
files show the real GPUs, also to a process that runs on a simulated machine.
"""

import contextlib
import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import psutil

NO_GPU = "no GPU here"
_SYSTEM = Path("/")
_SMI_TIMEOUT_S = 10
_NO_CGROUP = "no cgroup sets a limit"


def processor(missing: dict[str, str]) -> dict[str, Any]:
    """Return processor, memory and a container's limits; what is not known is null, its reason in `missing`."""
    facts = {
        "cpu_model": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "cpu_usable_count": _affine_cores(),
        "cpu_limit_cores": _cpu_limit(),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_limit_bytes": _memory_limit(),
    }
    reasons = {
        "cpu_model": "neither /proc/cpuinfo nor the platform names it",
        "cpu_limit_cores": _NO_CGROUP,
        "memory_limit_bytes": _NO_CGROUP,
    }
    missing.update({name: reason for name, reason in reasons.items() if facts[name] is None})
    return facts


def usable_cores() -> int:
    """Return how many cores this process can keep busy: those that it may run on, or as many as cgroups give time."""
    return math.ceil(min(_affine_cores(), _cpu_limit() or math.inf))


def available_memory() -> int:
    """Return the bytes of memory that are left: of the machine, or of the cgroup around this process with the least."""
    left = [limit - _memory_used(folder) for folder, limit in _memory_limits()]
    return max(0, min([*left, psutil.virtual_memory().available]))


def gpus(missing: dict[str, str]) -> dict[str, Any]:
    """Return the GPUs of the machine, all of them, whatever `CUDA_VISIBLE_DEVICES` and its kin leave to this process.

    `accelerators` are their names; `gpu_memory_bytes` and `gpu_architectures` (sm_90, gfx942) go in the same order.
    Without a GPU all lists are empty. Where there is a driver that does not answer they are null.
    """
    facts, reasons = _gpus(_SYSTEM)
    missing.update(reasons)
    return {name: list(value) if isinstance(value, list) else value for name, value in facts.items()}


def gpu_memory_used(numbers: Collection[str]) -> int | None:
    """Return the bytes of memory that are taken, by whomever, on GPUs with these numbers (`suite.gpus.visible`).

    None where no driver tells. Nothing is initialised on a GPU, and no process is started.
    """
    used = []
    with contextlib.suppress(OSError, ValueError):
        used += [gpu["memory_used_bytes"] for number, gpu in enumerate(amd_gpus()) if str(number) in numbers]
    with contextlib.suppress(Exception):  # no NVIDIA package, no driver, or a driver that does not answer
        import pynvml

        pynvml.nvmlInit()
        devices = [pynvml.nvmlDeviceGetHandleByIndex(place) for place in range(pynvml.nvmlDeviceGetCount())]
        chosen = [device for device in devices if str(pynvml.nvmlDeviceGetMinorNumber(device)) in numbers]
        used += [pynvml.nvmlDeviceGetMemoryInfo(device).used for device in chosen]
    return None if not used or None in used else sum(used)


def process_seconds() -> float:
    """Return the age of this process, by a clock that nobody sets."""
    try:
        # Names may hold spaces and brackets; the start, in ticks since the machine's, is the 20th field after them.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError):
        return time.process_time()


@cache
def _gpus(system: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Ask once per process: the answer cannot change, and nvidia-smi takes a while."""
    names = ("accelerators", "gpu_count", "gpu_memory_bytes", "gpu_architectures", "gpu_driver")
    try:
        found = _nvidia(system) + amd_gpus(system)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        reason = f"the GPU driver does not answer: {type(error).__name__}: {error}".splitlines()[0]
        return dict.fromkeys(names), dict.fromkeys(names, reason)
    drivers = sorted({gpu["driver"] for gpu in found if gpu["driver"]})
    facts = {
        "accelerators": [gpu["name"] for gpu in found],
        "gpu_count": len(found),
        "gpu_memory_bytes": [gpu["memory_bytes"] for gpu in found],
        "gpu_architectures": [gpu["architecture"] for gpu in found],
        "gpu_driver": ", ".join(drivers) or None,
    }
    reason = "the driver does not state its version" if found else NO_GPU
    return facts, ({} if drivers else {"gpu_driver": reason})


def _nvidia(system: Path) -> list[dict[str, Any]]:
    # Without the kernel module there is nothing to ask, and no process is started.
    if not (system / "proc/driver/nvidia/version").exists():
        return []
    program = shutil.which("nvidia-smi")
    if program is None:
        raise FileNotFoundError("there is an NVIDIA driver, and no nvidia-smi")
    fields = "name,memory.total,compute_cap,driver_version"
    asked = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    told = subprocess.run(asked, check=True, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S).stdout
    rows = [[part.strip() for part in line.split(",")] for line in told.splitlines() if line.strip()]
    return [
        {
            "name": name,
            "memory_bytes": int(mebibytes) * 2**20 if mebibytes.isdecimal() else None,
            "architecture": f"sm_{capability.replace('.', '')}",
            "driver": f"NVIDIA {driver}",
        }
        for name, mebibytes, capability, driver in rows
    ]


def amd_gpus(system: Path = _SYSTEM) -> list[dict[str, Any]]:
    """Read the compute nodes that the amdgpu driver lists, in the order in which HIP counts them."""
    version = system / "sys/module/amdgpu/version"  # only the driver that comes with ROCm has one of its own
    driver = f"amdgpu {version.read_text().strip()}" if version.exists() else f"amdgpu of Linux {platform.release()}"
    found = []
    for node in sorted((system / "sys/class/kfd/kfd/topology/nodes").glob("*"), key=lambda path: int(path.name)):
        try:
            told = dict(line.split(maxsplit=1) for line in (node / "properties").read_text().splitlines() if line)
        except PermissionError:
            continue  # a GPU that this container was not given
        number = int(told.get("gfx_target_version", 0))
        if not number:
            continue  # a processor
        device = system / f"sys/class/drm/renderD{told.get('drm_render_minor', '')}/device"
        architecture = f"gfx{number // 10000}{number // 100 % 100:x}{number % 100:x}"
        memory, used = _read(device / "mem_info_vram_total"), _read(device / "mem_info_vram_used")
        found.append(
            {
                "name": _read(device / "product_name") or f"AMD {architecture}",
                "memory_bytes": int(memory) if memory else None,
                "memory_used_bytes": int(used) if used else None,
                "architecture": architecture,
                "driver": driver,
                "uuid": f"GPU-{int(told.get('unique_id', 0)):016x}",  # as HIP and ROCR take it
            }
        )
    return found


def _cpu_model() -> str | None:
    found = re.search(r"^model name\s*:\s*(.+)$", _read(_SYSTEM / "proc/cpuinfo") or "", flags=re.MULTILINE)
    return (found.group(1).strip() if found else platform.processor()) or None


def _affine_cores() -> int:
    """Return how many cores this process may run on: cpusets and taskset give fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_limit() -> int | None:
    """Return the smallest memory limit among this process's cgroup and those around it."""
    return min((limit for _, limit in _memory_limits()), default=None)


def _memory_limits() -> list[tuple[Path, int]]:
    """Return the folder of each such cgroup that has a limit, and the limit."""
    files = [folder / "memory.max" for folder in _cgroups("")]
    files += [folder / "memory.limit_in_bytes" for folder in _cgroups("memory")]
    read = [(file.parent, _read(file)) for file in files]
    # The first version of cgroups says "no limit" by a number close to 2**63.
    return [(folder, int(text)) for folder, text in read if text and text.isdecimal() and int(text) < 2**60]


def _memory_used(group: Path) -> int:
    """Return what a cgroup uses, 0 if it does not say; cached files that the kernel drops for whoever asks are free."""
    used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes") or 0
    # The last such line is the first version's total, with the cgroups within.
    dropped = re.findall(r"inactive_file (\d+)", _read(group / "memory.stat") or "") or [0]
    return int(used) - int(dropped[-1])


def _cpu_limit() -> float | None:
    """Return how many cores' time the cgroups allow."""
    pairs = [(_read(folder / "cpu.max") or "").split() for folder in _cgroups("")]
    pairs += [[_read(f / "cpu.cfs_quota_us") or "", _read(f / "cpu.cfs_period_us") or ""] for f in _cgroups("cpu")]
    shares = [int(p[0]) / int(p[1]) for p in pairs if len(p) == 2 and p[0].isdecimal() and p[1].isdecimal()]
    return min(shares, default=None)


def _cgroups(controller: str) -> list[Path]:
    """Return this process's folder and all around it, of one controller; of version 2, where it is empty."""
    for line in (_read(_SYSTEM / "proc/self/cgroup") or "").splitlines():
        _, controllers, place = line.split(":", 2)
        if controller in controllers.split(","):
            root = _SYSTEM / "sys/fs/cgroup" / controller
            inner = root / place.lstrip("/")
            return [root, *(folder for folder in (inner, *inner.parents) if root in folder.parents)]
    return []


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None
