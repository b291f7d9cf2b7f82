# SPDX-License-Identifier: Apache-2.0
"""What can be said about time without a GPU: never less than this.

Two bounds. A GPU's: every byte moved once at the memory's peak, every product at the matrix units' peak, whichever
takes longer. And a loop's: matrix and vector instructions of different waves overlap at best, so the matrix units wait
wherever the vector instructions take longer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from aiterlab.attention.isa.assembly import Block
from aiterlab.attention.workloads import Workload
from aiterlab.measure.hardware import PEAKS

GPUS = ("MI300X", "MI325X", "MI355X")
_PEAKS = {peak.product: peak for peak in PEAKS}


def lower_bound_us(workload: Workload, gpu: str) -> float:
    """Shortest time in which `gpu` can do `workload` at its published peaks, in microseconds."""
    peak = _PEAKS[gpu]
    matrix_tflop_s = peak.fp16_tflop_s if workload.dtype == "float16" else peak.bf16_tflop_s
    return max(workload.bytes_moved() / peak.memory_tb_s, workload.flops() / matrix_tflop_s) / 1e6


@dataclass(frozen=True)
class Rate:
    """How fast one SIMD issues for one wave."""

    matrix_flops: int  # per cycle, bf16 and fp16; twice that for 8-bit numbers where the architecture has them
    vector_cycles: int  # of one vector instruction
    transcendental_cycles: int


# Peaks over compute units, SIMDs and clock; a wave of 64 takes a 16-lane SIMD four cycles, and a transcendental
# function four times as long (twice on CDNA 4, which doubled their rate).
RATES = {
    "gfx90a": Rate(256, 4, 16),
    "gfx942": Rate(512, 4, 16),
    "gfx950": Rate(1024, 4, 8),
    "gfx1100": Rate(256, 1, 4),
}


@dataclass(frozen=True)
class Cycles:
    """Cycles in which one wave keeps each unit of its SIMD busy, in one pass of a loop."""

    matrix: float
    vector: float

    @property
    def matrix_share(self) -> float | None:
        """The most that the matrix units can be busy, all overlap granted; None: the loop has no matrix instruction."""
        return self.matrix / max(self.matrix, self.vector) if self.matrix else None


def cycles(arch: str, block: Block) -> Cycles | None:
    """Cycles that the instructions of `block` take; None where the rates are not known here."""
    rate = RATES.get(arch)
    if rate is None or any(_speed(name) is None for name in block.matrix):
        return None
    matrix = sum(flops / (_speed(name) * rate.matrix_flops) for name, flops in block.flops_by_instruction().items())
    return Cycles(matrix, rate.vector_cycles * block.vector + rate.transcendental_cycles * block.transcendental)


def _speed(instruction: str) -> int | None:
    """Rate of a matrix instruction as a multiple of bf16's; None: other types, of which the suite has none."""
    types = re.search(r"_\d+x\d+x\d+(?:_\d+b)?_?(\w+)", instruction).group(1)
    if re.match(r"b?f16", types):
        return 1
    return 2 if re.match(r"(fp8|bf8|f8|i8|iu8)", types) else None
