# SPDX-License-Identifier: Apache-2.0
"""Read what the compiler made of a kernel: `amdgcn` text in, registers, memory and counted instructions out.

The numbers of registers and spills stand in the metadata that the driver reads before it launches; the rest is counted
in the text. CDNA's names (`global_load_dwordx4`, `ds_read_b128`, `v_mfma_…`) and RDNA3's (`global_load_b128`,
`ds_load_b128`, `v_wmma_…`) are both understood.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_NOTE = re.compile(r"^ {4}\.(\w+):\s+(\S+)$", re.MULTILINE)
# A block starts with a label, or with a comment where nothing jumps to it; the compiler says what loop it is in.
_BLOCK = re.compile(r"^(?:\.L(BB\w+):|; %bb\.\d+:)")
_IN_LOOP = re.compile(r"in Loop: Header=(BB\w+)")
_SHAPE = re.compile(r"_(\d+)x(\d+)x(\d+)_?(?:(\d+)b_)?")
_MEMORY = re.compile(r"(?:global|buffer|flat)_(load|store)_")
_LDS = re.compile(r"ds_(read|load|write|store)(_2addr|2)?")
_WIDTH = re.compile(r"_(dwordx[234]|dword|[usb]?short|[us]?byte|[bui](?:128|96|64|32|16|8))(?:_|$)")
_NAMED_WIDTHS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}
TRANSCENDENTAL = ("v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_", "v_sin_", "v_cos_")


@dataclass(frozen=True)
class Block:
    """Counted instructions of a stretch of code: a whole kernel or the body of one loop.

    Widths are those of one lane's access in bits; counts are of instructions in the text, not of executions.
    """

    instructions: int
    vector: int  # vector ALU instructions other than matrix and transcendental ones
    transcendental: int  # exp, log, reciprocal, root: they run at a fraction of the rate
    exponentials: int
    matrix: dict[str, int]  # matrix instructions by name
    global_loads: dict[int, int]  # bits -> instructions; from global memory, also straight to LDS
    global_stores: dict[int, int]
    lds_reads: dict[int, int]
    lds_writes: dict[int, int]
    scratch_accesses: int
    accumulator_moves: int  # between the two halves of the register file
    waits: int
    barriers: int

    def flops_by_instruction(self) -> dict[str, int]:
        """Operations of the matrix instructions of each name, of one wave."""
        return {name: _flops(name) * number for name, number in self.matrix.items()}

    def share_of_bytes(self, bits: int) -> float | None:
        """Of the bytes that the global loads bring, the share that comes in accesses of `bits`; None without loads."""
        total = sum(width * count for width, count in self.global_loads.items())
        return self.global_loads.get(bits, 0) * bits / total if total else None


@dataclass(frozen=True)
class Code:
    """What one kernel needs, and what is in it."""

    name: str
    arch: str
    wavefront: int  # lanes
    vgprs: int  # of one lane, AGPRs included where the register file is unified (gfx90a and later)
    agprs: int | None  # None: the architecture has none
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    static_lds_bytes: int  # without the part that the launch asks for
    scratch_bytes: int  # of one lane
    code_bytes: int | None
    whole: Block
    loop: Block | None  # the innermost loop that does the work; None: straight-line code


def parse(text: str) -> Code:
    """Read one kernel's `amdgcn` text.

    Raises:
        ValueError: the text has no kernel metadata, or more than one kernel.
    """
    metadata = text.partition("\t.amdgpu_metadata")[2].partition(".end_amdgpu_metadata")[0]
    names = re.findall(r"^ {4}\.name:\s+(\S+)$", metadata, re.MULTILINE)
    if len(names) != 1:
        raise ValueError(f"expected the metadata of one kernel, found {len(names)}: {', '.join(names)}")
    # The first field of a kernel follows a dash; `- .agpr_count:` is such a one.
    note = dict(_NOTE.findall(metadata.replace("\n  - .", "\n    .")))
    size = re.search(r"^; codeLenInByte = (\d+)", text, re.MULTILINE)
    loops = _loops(text)
    return Code(
        name=names[0],
        arch=re.search(r'\.amdgcn_target "\S*?--(\w+)', text).group(1),
        wavefront=int(note["wavefront_size"]),
        vgprs=int(note["vgpr_count"]),
        agprs=int(note["agpr_count"]) if "agpr_count" in note else None,
        sgprs=int(note["sgpr_count"]),
        vgpr_spills=int(note["vgpr_spill_count"]),
        sgpr_spills=int(note["sgpr_spill_count"]),
        static_lds_bytes=int(note["group_segment_fixed_size"]),
        scratch_bytes=int(note["private_segment_fixed_size"]),
        code_bytes=int(size.group(1)) if size else None,
        whole=_count([line for body in loops.values() for line in body]),
        loop=_main_loop(loops),
    )


def _loops(text: str) -> dict[str, list[str]]:
    """Instructions by the innermost loop that they are in, which the compiler's comments name; "" is outside of any."""
    loops: dict[str, list[str]] = {"": []}
    header = label = ""
    for line in text.partition("\t.section\t.rodata")[0].splitlines():
        if block := _BLOCK.match(line):
            inside = _IN_LOOP.search(line)
            header = block.group(1) if "Loop Header" in line else inside.group(1) if inside else ""
        elif re.match(r" +; +=> *This", line):  # the header of a nested loop names its parents first, a line each
            header = label
        if block and block.group(1):
            label = block.group(1)
        instruction = line.partition(";")[0].strip()
        if line.startswith("\t") and instruction and not instruction.startswith("."):
            loops.setdefault(header, []).append(instruction)
    return loops


def _main_loop(loops: dict[str, list[str]]) -> Block | None:
    """The loop that does most: by matrix work, else by global loads; the shorter one of equals.

    Of a masked and an unmasked loop over the same tiles the unmasked one is shorter, and it is the one that runs most.
    """

    def work(block: Block) -> tuple[int, int, int]:
        return sum(block.flops_by_instruction().values()), sum(block.global_loads.values()), -block.instructions

    return max((_count(body) for header, body in loops.items() if header), key=work, default=None)


def _count(lines: list[str]) -> Block:
    counts = Counter(line.split()[0] for line in lines)
    operations: dict[str, Counter] = {key: Counter() for key in ("load", "store", "read", "write")}
    for operation, number in counts.items():
        if memory := _MEMORY.match(operation):
            operations[memory.group(1)][_bits(operation)] += number
        elif lds := _LDS.match(operation):
            kind = {"load": "read", "store": "write"}.get(lds.group(1), lds.group(1))
            operations[kind][_bits(operation)] += number * (2 if lds.group(2) else 1)  # `read2` makes two accesses

    def total(*prefixes: str) -> int:
        return sum(number for name, number in counts.items() if name.startswith(prefixes))

    matrix = {name: number for name, number in counts.items() if name.startswith(("v_mfma_", "v_smfmac_", "v_wmma_"))}
    transcendental = total(*TRANSCENDENTAL)
    return Block(
        instructions=counts.total(),
        vector=total("v_") - sum(matrix.values()) - transcendental,
        transcendental=transcendental,
        exponentials=total("v_exp_"),
        matrix=matrix,
        global_loads=dict(operations["load"]),
        global_stores=dict(operations["store"]),
        lds_reads=dict(operations["read"]),
        lds_writes=dict(operations["write"]),
        scratch_accesses=total("scratch_"),
        accumulator_moves=total("v_accvgpr_"),
        waits=total("s_waitcnt", "s_wait_"),
        barriers=total("s_barrier"),
    )


def _flops(name: str) -> int:
    """Floating-point operations of one matrix instruction: two per product of an M x N x K block."""
    if (shape := _SHAPE.search(name)) is None:
        return 0
    m, n, k, blocks = shape.groups()
    return 2 * int(m) * int(n) * int(k) * int(blocks or 1)


def _bits(operation: str) -> int:
    """Width of one lane's access in bits."""
    if (width := _WIDTH.search(operation)) is None:
        raise ValueError(f"a memory access of unknown width: {operation}")
    name = width.group(1)
    if name in _NAMED_WIDTHS:
        return _NAMED_WIDTHS[name]
    return 16 if name.endswith("short") else 8 if name.endswith("byte") else int(name[1:])
