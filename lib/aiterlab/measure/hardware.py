# SPDX-License-Identifier: Apache-2.0
"""How fast could this device be? What its maker publishes, and what plain torch reaches on it in the same run."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from aiterlab import provenance
from aiterlab.measure import timing

GIB = 2**30


@dataclass(frozen=True)
class Peak:
    """A product's published limits: dense matrix products, not the sparse figures that are twice as large."""

    product: str
    matches: str  # a regular expression for the whole of torch's device name
    bf16_tflop_s: float
    fp16_tflop_s: float
    fp8_tflop_s: float
    memory_tb_s: float
    source: str


# SXM and OAM modules only: a PCIe or NVL card of the same name has other limits, so it matches nothing.
PEAKS = (
    Peak(
        "H100 SXM", r"NVIDIA H100 80GB HBM3", 989.4, 989.4, 1978.9, 3.35, "NVIDIA H100 data sheet, sparse figures / 2"
    ),
    Peak("H200", r"NVIDIA H200", 989.4, 989.4, 1978.9, 4.8, "NVIDIA H200 data sheet, sparse / 2"),
    Peak("MI300X", r"AMD Instinct MI300X.*", 1307.4, 1307.4, 2614.9, 5.3, "AMD Instinct MI300X data sheet"),
    Peak("MI325X", r"AMD Instinct MI325X.*", 1307.4, 1307.4, 2614.9, 6.0, "AMD Instinct MI325X data sheet"),
    Peak("MI355X", r"AMD Instinct MI355X.*", 2516.6, 2516.6, 5033.2, 8.0, "AMD Instinct MI355X data sheet"),
)


def peak(device_name: str) -> Peak | None:
    """The published limits of a device by torch's name for it; None for one that the table does not have."""
    return next((one for one in PEAKS if re.fullmatch(one.matches, device_name)), None)


def card(device: torch.device | str) -> dict:
    """What the device is, flat for a record; what cannot be known is None."""
    known = _gpu(torch.device(device)) if torch.device(device).type == "cuda" else _cpu()
    limits = peak(known["device_name"] or "")
    return known | {
        "torch_version": torch.__version__,
        "triton_version": _version("triton"),
        "peak_bf16_tflop_s": limits and limits.bf16_tflop_s,
        "peak_fp16_tflop_s": limits and limits.fp16_tflop_s,
        "peak_fp8_tflop_s": limits and limits.fp8_tflop_s,
        "peak_memory_tb_s": limits and limits.memory_tb_s,
        "peak_source": limits and limits.source,
    }


def _gpu(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    rocm = torch.version.hip is not None
    architecture = properties.gcnArchName.partition(":")[0] if rocm else f"sm_{properties.major}{properties.minor}"
    return {
        "device_name": properties.name,
        "device_kind": "gpu",
        "architecture": architecture,
        "compute_units": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None) or None,  # MI300X: of one XCD of eight
        "driver_version": _driver(rocm),
        "runtime_version": f"HIP {torch.version.hip}" if rocm else f"CUDA {torch.version.cuda}",
    }


def _cpu() -> dict:
    host = provenance.collect()
    return {
        "device_name": host["cpu_model"],
        "device_kind": "cpu",
        "architecture": platform.machine(),
        "compute_units": host["cpu_usable_count"],
        "memory_bytes": host["memory_bytes"],
        "l2_bytes": None,
        "driver_version": None,
        "runtime_version": None,
    }


def _driver(rocm: bool) -> str | None:
    """The kernel driver's version, from where it states it."""
    try:
        if rocm:
            return Path("/sys/module/amdgpu/version").read_text().strip()
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found.group(1) if found else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Ceiling:
    """A rate that plain torch reached here."""

    name: str  # copy | read | matmul_<dtype>
    unit: str  # TB/s | TFLOP/s
    work: float  # bytes moved or operations done in one sample
    samples_us: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Of the median sample, in `unit`."""
        return self.work / float(np.median(self.samples_us)) / 1e6

    def row(self) -> dict:
        """Flat, for a record or a table."""
        return {
            "name": self.name,
            "unit": self.unit,
            "rate": self.rate,
            "work": self.work,
            "samples_us": list(self.samples_us),
        }


def ceilings(device: torch.device | str, rounds: int | None = None) -> dict[str, Ceiling]:
    """Measure memory bandwidth and matrix products in this very run.

    `copy` counts what is read and what is written, by an elementwise kernel: the driver's own copy, as a node of a
    CUDA graph, reached only two thirds of that on an H200. `read` is a sum, which writes nothing. Both use buffers far
    beyond the caches (1 GiB on a GPU, 64 MiB on a CPU). Matrix products are 8192³ of random numbers in bf16 and fp16
    on a GPU, 1024³ in float32 on a CPU.

    Args:
        rounds: samples of each; None: 30 on a GPU, 5 on a CPU
    """
    device = torch.device(device)
    gpu = device.type == "cuda"
    buffer_bytes, size = (GIB, 8192) if gpu else (GIB // 16, 1024)
    source, target = torch.rand(2, buffer_bytes // 4, device=device)
    calls: dict[str, tuple[str, float, Callable[[], object]]] = {
        "copy": ("TB/s", 2 * buffer_bytes, lambda: torch.mul(source, 2.0, out=target)),
        "read": ("TB/s", buffer_bytes, lambda: source.sum()),
    }
    for dtype in (torch.bfloat16, torch.float16) if gpu else (torch.float32,):
        left, right, product = torch.randn(3, size, size, device=device).to(dtype)
        name = f"matmul_{str(dtype).removeprefix('torch.')}"
        calls[name] = ("TFLOP/s", 2 * size**3, _matmul(left, right, product))
    samples = timing.sample({name: call for name, (_, _, call) in calls.items()}, device, rounds or (30 if gpu else 5))
    return {name: Ceiling(name, unit, work, tuple(samples[name])) for name, (unit, work, _) in calls.items()}


def _matmul(left: torch.Tensor, right: torch.Tensor, product: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.mm(left, right, out=product)
