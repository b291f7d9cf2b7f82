# SPDX-License-Identifier: Apache-2.0
"""Where does this process compute: a ROCm GPU, an NVIDIA GPU, or Triton's interpreter on a described machine?

`enter` decides it once, before vLLM, AITER or a kernel of ours is imported; imports decide the rest.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.resources import files
from importlib.util import find_spec
from typing import Literal

from aiterlab.machines import ARCHITECTURES, Machine, aiter_on_cuda, interpreter, ledger
from aiterlab.machines import native as rocm
from aiterlab.policy import Answer

_VLLM_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "aiterlab_simulated_rocm",  # the machine's platform, and no plugin that belongs to another vLLM
}
# What the libraries' loggers say of a machine that is described and not there. Records have it from the ledger.
_OF_THE_SIMULATION = {"aiter": "<simulated JIT build>", "vllm._aiter_ops": "Could not locate PyTorch's HIP runtime"}


@dataclass(frozen=True)
class Place:
    """Where tensors live and kernels run."""

    platform: Literal["rocm", "cuda", "simulated", "cpu"]  # simulated: a described ROCm machine; cpu: no machine at all
    architecture: str  # gfx942, sm_90, …; the processor's on "cpu"

    @property
    def device(self) -> str:
        """Torch's name of the device."""
        return "cuda" if self.platform in ("rocm", "cuda") else "cpu"

    @property
    def interpreted(self) -> bool:
        """Triton kernels run in Triton's interpreter here, if at all."""
        return self.device == "cpu"


_entered: Place | None = None


def enter(machine: Machine | None = None) -> Place:
    """Make this process ready for every provider of its machine; call it before any kernel is imported.

    Args:
        machine: the machine to be on; None: the native one where there is a GPU, else a simulated MI300X

    Raises:
        RuntimeError: too late in this process (Triton, vLLM or AITER is imported), or it is on another machine.
    """
    global _entered
    if machine is None:
        if _entered is not None:
            return _entered
        machine = Machine("native") if _has_gpu() else Machine()
    wanted = Place("simulated", machine.arch) if machine.simulated else native()
    if _entered not in (None, wanted):
        raise RuntimeError(f"this process already runs on {_entered}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # what it tells of plugins and platforms is in the table
    if machine.simulated:
        _simulate(machine)
    elif wanted.platform == "rocm":
        rocm.watch_compilation()
    elif wanted.platform == "cuda" and find_spec("aiter") is not None:
        aiter_on_cuda.install()
    elif wanted.platform == "cpu":
        _interpret()
    _entered = wanted
    return wanted


def current() -> Place:
    """The place that was entered, else the one that the process is in anyway."""
    return _entered or native()


def native() -> Place:
    """The place as torch sees it; a CPU is one without a described machine."""
    import platform

    import torch

    if not _has_gpu():
        return Place("cpu", platform.machine())
    if torch.version.hip is not None:
        return Place("rocm", torch.cuda.get_device_properties(0).gcnArchName.partition(":")[0])
    return Place("cuda", "sm_{}{}".format(*torch.cuda.get_device_capability()))


def triton_runs() -> Answer:
    """Can Triton kernels run in this process? On a CPU only in the interpreter, which Triton chooses at its import."""
    if find_spec("triton") is None:
        return Answer(False, "Triton is not installed")
    if not current().interpreted:
        return Answer(True, "compiled for the GPU")
    if (language := sys.modules.get("triton.language")) is not None:
        interpreted = type(language.sum).__name__ == "InterpretedFunction"
    else:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted:
        return _interpreter_works()
    return Answer(False, "there is no GPU, and Triton was imported before TRITON_INTERPRET=1 was set")


def _interpreter_works() -> Answer:
    """Triton 3.6 takes an array of one number for a number, which numpy refuses since 2.4 (triton-lang/triton#9171)."""
    triton, numpy = (_installed(name) for name in ("triton", "numpy"))
    if triton and numpy and _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
        return Answer(False, f"the interpreter of Triton {triton} fails with numpy {numpy}: pip install 'numpy<2.4'")
    return Answer(True, "in Triton's interpreter")


def _installed(name: str) -> str | None:
    """The version of a package; None where it has come under another name."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2])


def _simulate(machine: Machine) -> None:
    imported = [name for name in ("vllm", "aiter") if name in sys.modules]
    if imported:
        raise RuntimeError(f"a machine is entered before {' and '.join(imported)} is imported, in a new process")
    for name, value in (machine.environment() | _VLLM_ENVIRONMENT).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _interpret()
    from aiterlab.machines import simulation

    simulation.install(machine)
    os.environ.setdefault("ROCM_HOME", str(files("aiterlab.machines")))  # whose bin has the machine's tools
    for name, words in _OF_THE_SIMULATION.items():
        logging.getLogger(name).addFilter(partial(_is_about_something_else, words))
    if find_spec("vllm") is not None:
        from aiterlab.trees import tree

        # vLLM's CPU build switches Triton off by the name of its version; as a tree, it has no such name.
        sys.path.insert(0, str(tree.get("installed").folder))
    ledger.stood_in(f"{ARCHITECTURES[machine.arch].product} simulated: Triton kernels run in its interpreter")


def _is_about_something_else(words: str, record: logging.LogRecord) -> bool:
    return words not in record.getMessage()


def _interpret() -> None:
    interpreter.choose()
    if not (answer := triton_runs()):
        raise RuntimeError(f"{answer.reason}; start a new process")


def _has_gpu() -> bool:
    import torch

    # Not after a machine was simulated: then torch answers for that one.
    return torch.cuda.is_available()
