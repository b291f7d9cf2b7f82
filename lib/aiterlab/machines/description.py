# SPDX-License-Identifier: Apache-2.0
"""The machines a question can be asked on, as plain data that crosses process boundaries."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Literal

from aiterlab.policy import MAIN_SWITCH

ENVIRONMENT_VARIABLE = "AITERLAB_MACHINE"
SWITCH_POSITIONS = ("unset", "0", "1")


@dataclass(frozen=True)
class Architecture:
    """What a driver says about a GPU of this architecture; product data from AMD's data sheets."""

    gfx: str
    product: str
    device_id: str  # PCI device id, which vLLM maps to a product name
    compute_units: int
    wavefront: int  # lanes
    memory_bytes: int
    integrated: bool = False  # on the CPU's package, with a share of its memory

    @property
    def gcn_arch_name(self) -> str:
        """The name HIP reports, with the feature suffix of the CDNA GPUs."""
        return f"{self.gfx}:sramecc+:xnack-" if self.wavefront == 64 else self.gfx

    @property
    def capability(self) -> tuple[int, int]:
        """HIP's (major, minor), read off the name: gfx942 is (9, 4), gfx1100 is (11, 0)."""
        digits = self.gfx.removeprefix("gfx")
        return int(digits[:-2]), int(digits[-2], 16)


GIB = 1024**3
ARCHITECTURES = {
    a.gfx: a
    for a in (
        Architecture("gfx90a", "AMD Instinct MI210", "0x740f", 104, 64, 64 * GIB),
        Architecture("gfx942", "AMD Instinct MI300X", "0x74a1", 304, 64, 192 * GIB),
        Architecture("gfx950", "AMD Instinct MI355X", "0x75a3", 256, 64, 288 * GIB),
        Architecture("gfx1100", "AMD Radeon RX 7900 XTX", "0x744c", 96, 32, 24 * GIB),
        # Strix Halo (Ryzen AI Max+ 395); the largest share of its 128 GiB that its firmware gives the GPU.
        Architecture("gfx1151", "AMD Radeon 8060S", "0x1586", 40, 32, 96 * GIB, integrated=True),
        Architecture("gfx1201", "AMD Radeon RX 9070 XT", "0x7550", 64, 32, 16 * GIB),
    )
}


@dataclass(frozen=True)
class Machine:
    """One machine: its GPU, what is installed beside vLLM, and the environment variables the user has set.

    `kind="native"` is the machine the process runs on; then `arch`, `aiter` and `flash_attn` are None, because the
    machine itself answers.
    """

    kind: Literal["simulated", "native"] = "simulated"
    arch: str | None = "gfx942"
    aiter: bool | None = True
    flash_attn: bool | None = True  # the ROCm images bring it
    switches: dict[str, str] = field(default_factory=dict)  # environment variables that are set; others are unset

    def __post_init__(self) -> None:
        if self.kind == "native":
            object.__setattr__(self, "arch", None)
            object.__setattr__(self, "aiter", None)
            object.__setattr__(self, "flash_attn", None)
        elif self.arch not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {self.arch!r}; known: {', '.join(ARCHITECTURES)}")

    @property
    def simulated(self) -> bool:
        return self.kind == "simulated"

    @property
    def switch(self) -> str:
        """Position of the main switch: `unset`, `0` or `1`."""
        return self.switches.get(MAIN_SWITCH, "unset")

    def environment(self) -> dict[str, str | None]:
        """Environment variables of a process on this machine; None means that the variable must not be set."""
        # A native machine keeps its own settings, such as the folder of prebuilt kernels; its switches are asked anew.
        cleared = ("VLLM_ROCM_", "AITERLAB_HOTFIX", *(("VLLM_", "AITER_", "GPU_ARCHS") if self.simulated else ()))
        variables: dict[str, str | None] = dict.fromkeys(name for name in os.environ if name.startswith(cleared))
        variables |= self.switches
        if self.simulated:
            variables[ENVIRONMENT_VARIABLE] = self.to_json()
        return variables

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Machine:
        return cls(**json.loads(text))


def with_switch(machine: Machine, position: str) -> Machine:
    """The same machine with `VLLM_ROCM_USE_AITER` in the given position: `unset`, `0` or `1`."""
    if position not in SWITCH_POSITIONS:
        raise ValueError(f"unknown switch position {position!r}; known: {', '.join(SWITCH_POSITIONS)}")
    switches = {name: value for name, value in machine.switches.items() if name != MAIN_SWITCH}
    if position != "unset":
        switches[MAIN_SWITCH] = position
    return Machine(machine.kind, machine.arch, machine.aiter, machine.flash_attn, switches)
