# SPDX-License-Identifier: Apache-2.0
"""One line for each kernel on each architecture: what it needs, what fits, and how fast it could be at best."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import pandas as pd

from aiterlab.attention.isa.bounds import GPUS, cycles, lower_bound_us
from aiterlab.attention.isa.compilation import Compiled, Kernel
from aiterlab.attention.isa.occupancy import occupancy

_TEXT = ("kernel", "limited_by", "matrix_instructions", "reason")


@dataclass(frozen=True, kw_only=True)
class _Line:
    """The columns of one kernel's code; what is None is not known."""

    kernel: str
    num_warps: int
    num_stages: int
    programs: int
    vgprs: int
    agprs: int | None
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch_bytes: int
    lds_bytes: int
    code_bytes: int
    waves_per_simd: int | None
    limited_by: str | None
    in_loop: bool
    matrix_instructions: str | None
    matrix_cycles: float | None
    vector_cycles: float | None
    matrix_share: float | None
    exponentials: int
    load_128bit_share: float | None
    narrowest_lds_read_bits: int | None
    waits: int


def table(compiled: Iterable[Compiled]) -> pd.DataFrame:
    """Tabulate what launches compiled.

    A launch that could not be compiled has one line with its `reason`, and nothing in the columns of the code. What an
    architecture does not have, or what is not known of it, is missing too.

    The columns from `in_loop` on count one wave and one pass of the loop that does the work (of the whole kernel where
    there is no loop), except for the loads: `load_128bit_share` is the share of
    the loaded bytes that come in the widest accesses, `matrix_share` the most that the matrix units can be busy.
    """
    lines = []
    for answer in compiled:
        workload = answer.launch.workload
        launch = {
            "arch": answer.arch,
            "provider": answer.launch.provider,
            "launcher": answer.launch.name,
            "workload": workload.name,
            "operation": workload.operation,
        }
        bounds = {f"bound_{gpu.lower()}_us": lower_bound_us(workload, gpu) for gpu in GPUS}
        lines += [launch | asdict(_line(answer.arch, kernel)) | bounds for kernel in answer.kernels]
        if answer.error:
            lines.append(launch | {"reason": answer.error})
    columns = ["arch", "provider", "launcher", "workload", "operation", *(column.name for column in fields(_Line))]
    columns += [*(f"bound_{gpu.lower()}_us" for gpu in GPUS), "reason"]
    frame = pd.DataFrame(lines, columns=columns).convert_dtypes()
    for name in frame.columns[frame.isna().all()]:  # a column of nothing has a type all the same
        frame[name] = frame[name].astype("string" if name in _TEXT else "Float64")
    return frame


def _line(arch: str, kernel: Kernel) -> _Line:
    code, options = kernel.code, kernel.options
    fits = occupancy(
        arch, vgprs=code.vgprs, sgprs=code.sgprs, lds_bytes=kernel.lds_bytes, num_warps=options["num_warps"]
    )
    work = code.loop or code.whole
    spent = cycles(arch, work)
    return _Line(
        kernel=code.name,
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        programs=kernel.programs,
        vgprs=code.vgprs,
        agprs=code.agprs,
        sgprs=code.sgprs,
        vgpr_spills=code.vgpr_spills,
        sgpr_spills=code.sgpr_spills,
        scratch_bytes=code.scratch_bytes,
        lds_bytes=kernel.lds_bytes,
        code_bytes=code.code_bytes,
        waves_per_simd=fits and fits.waves,
        limited_by=fits and fits.limited_by,
        in_loop=code.loop is not None,
        matrix_instructions=", ".join(f"{count} × {name}" for name, count in work.matrix.items()) or None,
        matrix_cycles=spent and spent.matrix,
        vector_cycles=spent and spent.vector,
        matrix_share=spent and spent.matrix_share,
        exponentials=work.exponentials,
        load_128bit_share=code.whole.share_of_bytes(128),
        narrowest_lds_read_bits=min(work.lds_reads, default=None),
        waits=work.waits,
    )
