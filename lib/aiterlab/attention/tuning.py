# SPDX-License-Identifier: Apache-2.0
"""Which tile sizes the kernels use where: looked up in a table per architecture, never tried out at run time.

A table is read from the top, and the first entry that is large enough holds: `rows` are query rows of one sequence and
one key head (query tokens x group), `pairs` are sequences x key heads, `head` is the head size, `keys` the longest
sequence, `bytes` the size of a cached number. The page size decides nothing: any tile walks pages of any size.
The NVIDIA entries were measured on an H200, the AMD entries come from the code that they compile to (`attention.isa`):
registers, spills, LDS.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver


@dataclass(frozen=True)
class Config:
    """How one kernel is cut into programs, and what the compiler is told."""

    block_m: int  # query rows of a program: tokens x heads of a group; `gather` has none
    tile: int  # keys of one step
    resident: int = 1  # programs that a compute unit should have at once; decides how often the keys are split
    descriptor: bool = False  # load keys through tensor descriptors (the copy engine of sm_90)
    options: dict[str, Any] = field(default_factory=dict)  # num_warps, num_stages and the like


@dataclass(frozen=True)
class Entry:
    """One line of a table: the largest case it is for, and its configuration."""

    config: Config
    rows: float = float("inf")
    pairs: float = float("inf")
    head: int = 256
    bytes: int = 4
    keys: float = float("inf")
    layout: str | None = None  # for this layout of the cache alone

    def fits(self, layout: str, **case: int) -> bool:
        """Tell whether the entry is for this layout and large enough for the case."""
        return self.layout in (None, layout) and all(getattr(self, name) >= size for name, size in case.items())


def _config(block_m: int, tile: int, warps: int, stages: int, resident: int = 1, descriptor: bool = False, **more):
    return Config(block_m, tile, resident, descriptor, {"num_warps": warps, "num_stages": stages, **more})


_SM_90 = (
    # fp8 and int8: converted in registers; one warp a program, and many programs, hide the conversion.
    Entry(_config(16, 32, 1, 3, resident=8), rows=16, head=128, bytes=1),
    Entry(_config(32, 32, 1, 3, resident=8), rows=32, head=128, bytes=1),
    # A shuffled tile reaches wgmma's shared memory through registers, which takes 2.5 times as long as mma.sync.
    Entry(_config(16, 32, 1, 3, resident=3), rows=16, head=128, bytes=2, layout="SHUFFLE"),
    Entry(_config(32, 32, 2, 3, resident=3), rows=32, head=128, bytes=2, layout="SHUFFLE"),
    # Decode and verify of up to 4 tokens with groups of 4: mma.sync on 16 rows; about 3 programs fill the memory.
    Entry(_config(16, 32, 1, 3, resident=3), rows=16, pairs=256, head=128, bytes=2),
    # Where the keys are split, smaller tiles leave room for three programs.
    Entry(_config(64, 32, 4, 3, resident=3), rows=64, pairs=256, head=128, bytes=2),
    # wgmma has 64 rows; most of them empty is still as fast as mma.sync on 16, and the larger tile reads better.
    Entry(_config(64, 64, 4, 3, resident=2), rows=64, head=128, bytes=2),
    Entry(_config(128, 64, 8, 3), rows=255, head=128, bytes=2),
    # 256 rows halve what is read from L2: with 128 that is the limit. 16 warps, as 8 spill.
    Entry(_config(256, 64, 16, 3), head=128, bytes=2),
    Entry(_config(16, 32, 2, 3, resident=2), rows=16, bytes=2),
    Entry(_config(64, 32, 4, 3, resident=1), rows=64, bytes=2),
    Entry(_config(128, 32, 8, 3), bytes=2),
    # float32 is for checks: no matrix unit computes it exactly.
    Entry(_config(16, 16, 4, 2)),
    Entry(_config(64, 16, 4, 2)),  # for groups of more than 16
)
_CUDA = (  # any other NVIDIA GPU: 99 KB of shared memory are everywhere
    Entry(_config(16, 32, 2, 3, resident=2), rows=16, bytes=2),
    Entry(_config(64, 32, 4, 2), bytes=2),
    Entry(_config(16, 16, 4, 2)),
)
# AMD: with `waves_per_eu` 2 the compiler keeps to 256 VGPRs, so that two waves share a SIMD; without it the kernels
# take up to 370. Instructions of 16 rows (`matrix_instr_nonkdim`) let each of 4 waves own 16 of 64 rows.
_TWO_WAVES = {"waves_per_eu": 2}
_BY_16 = {"waves_per_eu": 2, "matrix_instr_nonkdim": 16}
_CDNA = (
    # fp8 and int8: every wave converts the keys that it multiplies, so few waves to a row save work.
    Entry(_config(16, 32, 2, 2, resident=4, **_BY_16), rows=16, head=128, bytes=1),
    # From 32 rows on the registers that a tile under way needs (2 stages) are those of the conversion.
    Entry(_config(32, 32, 2, 1, resident=4, **_BY_16), rows=32, head=128, bytes=1),
    Entry(_config(64, 32, 4, 1, resident=2, **_BY_16), head=128, bytes=1),
    Entry(_config(16, 16, 2, 1, resident=4, **_BY_16), rows=16, bytes=1),
    Entry(_config(32, 16, 2, 1, resident=4, **_BY_16), rows=32, bytes=1),
    Entry(_config(64, 16, 4, 1, resident=2, **_BY_16), bytes=1),
    # Two waves would do for 16 rows, but of 16.5 KiB a program (32 keys under way) 64 KiB of LDS hold three.
    Entry(_config(16, 32, 4, 2, resident=3, **_BY_16), rows=16, head=128, bytes=2),
    Entry(_config(32, 32, 4, 2, resident=3, **_BY_16), rows=32, head=128, bytes=2),
    Entry(_config(64, 32, 4, 2, resident=2, **_BY_16), rows=64, head=128, bytes=2),
    # Instructions of 32 rows would read half as much LDS for the same products, but spill two SGPRs.
    Entry(_config(128, 32, 4, 1, resident=2, **_BY_16), head=128, bytes=2),
    # Heads of 256: 16 rows are 64 VGPRs a wave, which leaves no room for a tile under way.
    Entry(_config(16, 32, 2, 1, resident=4, **_BY_16), rows=16, bytes=2),
    Entry(_config(32, 16, 2, 1, resident=4, **_BY_16), rows=32, bytes=2),
    Entry(_config(64, 16, 4, 1, resident=2, **_BY_16), rows=64, bytes=2),
    Entry(_config(64, 32, 4, 1, resident=2, **_BY_16), bytes=2),
    Entry(_config(16, 16, 4, 1)),
    Entry(_config(64, 16, 4, 1)),
)
# RDNA 3: waves of 32 lanes with 256 VGPRs at most. Compiled, and no more: no card was at hand.
_RDNA = (
    Entry(_config(16, 16, 2, 1, resident=4), rows=16, head=128, bytes=2),
    Entry(_config(64, 16, 4, 1, resident=2), head=128, bytes=2),
    Entry(_config(16, 16, 4, 1)),
)
PAGED = {"sm_90": _SM_90, "cuda": _CUDA, "gfx1100": _RDNA, "hip": _CDNA}

VARLEN = {
    "sm_90": (
        # Two programs of 128 registers a thread: one's softmax hides behind the other's matrices. For short prompts.
        Entry(_config(128, 64, 8, 2, descriptor=True, maxnreg=128), head=128, bytes=2, keys=4096),
        Entry(_config(128, 128, 8, 3, descriptor=True), head=128, bytes=2),
        Entry(_config(128, 64, 8, 2, descriptor=True), bytes=2),
        Entry(_config(16, 16, 4, 2)),
    ),
    "cuda": (Entry(_config(64, 32, 4, 2), bytes=2), Entry(_config(16, 16, 4, 2))),
    "gfx1100": _RDNA,
    "hip": (
        Entry(_config(128, 32, 4, 2, **_TWO_WAVES), head=128, bytes=2),
        Entry(_config(64, 32, 4, 1, **_BY_16), bytes=2),
        Entry(_config(16, 16, 4, 1)),
    ),
}
GATHER = {"cuda": Config(0, 16, options={"num_warps": 4}), "hip": Config(0, 16, options={"num_warps": 4})}

# Compute units where no device is there to be asked: the code is compiled for the architecture alone.
UNITS = {"gfx90a": 104, "gfx942": 304, "gfx950": 256, "gfx1100": 96}
_INTERPRETED_UNITS = 8


def architecture() -> str:
    """Name of the architecture that kernels are made for: sm_90, gfx942, …; "interpreter" where none is compiled."""
    if knobs.runtime.interpret:
        return "interpreter"
    target = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch.split(":")[0]


def paged(*, rows: int, pairs: int, group: int, head_size: int, kv_bytes: int, layout: str) -> Config:
    """Look up how `paged.attend` is cut: `rows` are those of the longest sequence."""
    return _find(PAGED, layout=layout, rows=rows, pairs=pairs, group=group, head=head_size, bytes=kv_bytes)


def varlen(*, rows: int, keys: int, group: int, head_size: int, bytes_each: int) -> Config:
    """Look up how `varlen.attend` is cut."""
    return _find(VARLEN, layout="contiguous", rows=rows, group=group, head=head_size, bytes=bytes_each, keys=keys)


def gather() -> Config:
    """Look up how `gather.gather` is cut."""
    return Config(0, 16) if knobs.runtime.interpret else GATHER[_backend()]


def splits(device: torch.device, config: Config, *, programs: int, keys: int) -> int:
    """Say over how many programs the keys of a sequence are split.

    Enough to give every compute unit its `resident` programs, then one or two more where that evens out the last round;
    never so many that a program has fewer than four tiles, or that `merge` has more than 64 parts in its registers.
    """
    most = min(keys // (4 * config.tile), 64)
    wanted = max(1, config.resident * _units(device) // programs)
    even = [programs * count / _units(device) for count in (wanted, wanted + 1, wanted + 2)]
    evenness = [rounds / -(-rounds // 1) for rounds in even]
    choice = next((i for i, value in enumerate(evenness) if value >= 0.9), evenness.index(max(evenness)))
    return max(1, min(wanted + choice, most))


def chained() -> bool:
    """Tell whether a kernel may start while the one before it ends (programmatic dependent launch, from sm_90 on)."""
    return architecture().startswith("sm_") and int(architecture()[3:]) >= 90


def _backend() -> str:
    return "cuda" if architecture().startswith("sm_") else "hip"


def _find(tables: dict[str, Sequence[Entry]], *, layout: str, group: int, **case: int) -> Config:
    if knobs.runtime.interpret:
        return Config(max(16, 1 << (group - 1).bit_length()), 32)
    table = tables.get(architecture()) or tables[_backend()]
    # A program holds at least one token with its whole group.
    config = next(
        (entry.config for entry in table if entry.fits(layout, **case) and entry.config.block_m >= group), None
    )
    if config is None:
        raise ValueError(f"no configuration for {group} query heads on one key head and head size {case['head']}")
    return config


@functools.cache
def _units(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return UNITS.get(architecture(), _INTERPRETED_UNITS)
