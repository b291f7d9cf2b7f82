# SPDX-License-Identifier: Apache-2.0
"""What the GPU's driver answers: amdsmi, the ROCm command line tools, torch's device queries, Triton's target.

Nothing above the driver is touched. The memory of the simulated device is the host's memory, so a kernel registered
for the device also runs on CPU tensors, and pinned memory is ordinary memory.
"""

from __future__ import annotations

import enum
import os
from importlib import resources
from types import ModuleType, SimpleNamespace

from aiterlab import importing
from aiterlab.machines import ledger
from aiterlab.machines.description import Architecture

HIP_VERSION = "6.4.43484-123eb5128"  # ROCm 6.4


def install(gpu: Architecture) -> None:
    """Make this process see one GPU of the given architecture."""
    command_line_tools(gpu)
    importing.serve(lambda name: name == "amdsmi", lambda module: _fill_amdsmi(module, gpu), "simulated driver")
    _torch_device(gpu)
    _triton_target(gpu)


def command_line_tools(gpu: Architecture) -> None:
    tools = str(resources.files("aiterlab.machines") / "bin")
    os.environ["PATH"] = tools + os.pathsep + os.environ.get("PATH", "")
    os.environ["AITERLAB_ARCH"] = gpu.gfx
    os.environ["AITERLAB_COMPUTE_UNITS"] = str(gpu.compute_units)
    os.environ["AITERLAB_HIP_VERSION"] = HIP_VERSION


def _fill_amdsmi(module: ModuleType, gpu: Architecture) -> None:
    """The calls that vLLM makes into AMD's system management library, for one GPU."""
    handle = object()

    class AmdSmiException(Exception):
        """Base class of amdsmi's errors."""

    class AmdSmiMemoryType(enum.IntEnum):
        VRAM, VIS_VRAM, GTT = range(3)

    module.AmdSmiException = AmdSmiException
    module.AmdSmiMemoryType = AmdSmiMemoryType
    module.amdsmi_init = lambda *args, **kwargs: None
    module.amdsmi_shut_down = lambda: None
    module.amdsmi_get_processor_handles = lambda: [handle]
    module.amdsmi_get_gpu_asic_info = lambda processor: {
        "market_name": gpu.product,
        "device_id": gpu.device_id,
        "target_graphics_version": gpu.gfx,
        "num_compute_units": gpu.compute_units,
    }
    module.amdsmi_get_gpu_device_uuid = lambda processor: f"simulated-{gpu.gfx}"
    module.amdsmi_get_gpu_memory_total = lambda processor, kind: gpu.memory_bytes
    module.amdsmi_topo_get_link_type = lambda first, second: {"hops": 0, "type": 0}
    module.amdsmi_topo_get_numa_node_number = lambda processor: 0


def _torch_device(gpu: Architecture) -> None:
    import torch
    from torch.library import Library

    major, minor = gpu.capability
    properties = SimpleNamespace(
        name=gpu.product,
        gcnArchName=gpu.gcn_arch_name,
        major=major,
        minor=minor,
        multi_processor_count=gpu.compute_units,
        warp_size=gpu.wavefront,
        total_memory=gpu.memory_bytes,
        is_integrated=gpu.integrated,
    )
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.get_device_capability = lambda device=None: gpu.capability
    torch.cuda.get_device_name = lambda device=None: gpu.product
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = lambda device: None
    torch.cuda.mem_get_info = lambda device=None: (gpu.memory_bytes, gpu.memory_bytes)

    class Stream:
        """The one stream of the simulated device: everything on it has finished already."""

        cuda_stream = 0

        def synchronize(self) -> None:
            pass

        wait_stream = record_event = wait_event = lambda self, *args: None

    torch.cuda.Stream = Stream
    torch.cuda.current_stream = lambda device=None: Stream()
    torch.cuda.synchronize = lambda device=None: None

    implement = Library.impl

    ours = set()  # registered below; what a library registers itself takes their place

    def implement_on_host_too(self, op_name, fn, dispatch_key="", *args, **kwargs):
        if dispatch_key == "CPU" and _qualified(self, op_name) in ours:
            kwargs["allow_override"] = True
        implement(self, op_name, fn, dispatch_key, *args, **kwargs)
        if dispatch_key == "CUDA" and not torch._C._dispatch_has_kernel_for_dispatch_key(
            _qualified(self, op_name), "CPU"
        ):
            ledger.stood_in("operators registered for the GPU also run on host memory")
            implement(self, op_name, fn, "CPU", *args, **kwargs)
            ours.add(_qualified(self, op_name))

    Library.impl = implement_on_host_too


def _qualified(library, op_name) -> str:
    name = op_name if isinstance(op_name, str) else op_name._schema.name
    return name if "::" in name else f"{library.ns}::{name}"


def _triton_target(gpu: Architecture) -> None:
    """Triton's AMD backend with a driver that answers which GPU there is; kernels run in Triton's interpreter."""
    import torch
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class SimulatedHIPDriver(backends["amd"].driver):
        def __init__(self) -> None:
            """Load no HIP runtime: there is none."""

        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=None: 0)
        get_current_target = staticmethod(lambda: GPUTarget("hip", gpu.gfx, gpu.wavefront))
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
        is_active = staticmethod(lambda: True)

    backends["amd"].driver.is_active = staticmethod(lambda: True)
    for name, backend in backends.items():
        if name != "amd" and backend.driver is not None:
            backend.driver.is_active = staticmethod(lambda: False)
    driver.set_active(SimulatedHIPDriver())


def pageable_memory():
    """A context in which pinned host memory is ordinary memory, as there is no device to pin it for."""
    from torch.overrides import TorchFunctionMode

    class PageableMemory(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            kwargs.pop("pin_memory", None)
            if getattr(func, "__name__", "") == "pin_memory":
                return args[0]
            return func(*args, **kwargs)

    ledger.stood_in("pinned host memory -> ordinary memory")
    return PageableMemory()
