# SPDX-License-Identifier: Apache-2.0
"""How many waves of a kernel fit on one SIMD at a time, and what limits them?

The rules are LLVM's (AMDGPUBaseInfo.cpp and GCNSubtarget.cpp), which compilers and drivers share. Hardware counts whole
workgroups: what is left over for less than one stays empty.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What the SIMDs that one workgroup is spread over have, and in which portions it is given out."""

    simds: int  # that share an LDS: of a compute unit, on RDNA3 of a work group processor (two compute units)
    waves: int  # per SIMD at most
    vgprs: int  # per lane of a SIMD
    vgpr_granule: int
    lds_bytes: int  # shared by those SIMDs
    lds_granule: int
    lds_largest: int  # of one workgroup
    sgprs_for_all_waves: int | None  # a wave with more SGPRs costs one wave; None: SGPRs never limit


_CDNA = Limits(4, 8, 512, 8, 64 * 1024, 512, 64 * 1024, 100)
LIMITS = {
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
    "gfx950": Limits(4, 8, 512, 8, 160 * 1024, 1280, 160 * 1024, 100),
    # Wave 32 in work group processor mode, Triton's choice. Navi 31 has the larger register file: 1536 VGPRs in
    # portions of 24 (FeatureGFX11FullVGPRs), and 128 KiB of LDS, of which one workgroup can have half.
    "gfx1100": Limits(4, 16, 1536, 24, 128 * 1024, 512, 64 * 1024, None),
}


@dataclass(frozen=True)
class Occupancy:
    """Waves per SIMD, averaged over the SIMDs that a workgroup is spread over."""

    waves: float  # 0: no workgroup fits, the launch would fail
    limited_by: str  # VGPRs, SGPRs, LDS or the hardware's own maximum ("waves")


def occupancy(arch: str, *, vgprs: int, sgprs: int, lds_bytes: int, num_warps: int) -> Occupancy | None:
    """Waves per SIMD of a kernel; None on an architecture whose rules are not known here.

    Args:
        vgprs: of one lane, AGPRs included
        lds_bytes: of one workgroup, static and dynamic
        num_warps: waves of one workgroup
    """
    if (limits := LIMITS.get(arch)) is None:
        return None
    slots = {"waves": limits.waves, "VGPRs": limits.vgprs // _round_up(max(vgprs, 1), limits.vgpr_granule)}
    if limits.sgprs_for_all_waves is not None and sgprs > limits.sgprs_for_all_waves:
        slots["SGPRs"] = limits.waves - 1
    workgroups = {reason: limits.simds * min(waves, limits.waves) // num_warps for reason, waves in slots.items()}
    if lds_bytes > limits.lds_largest:
        workgroups["LDS"] = 0
    elif lds_bytes:
        workgroups["LDS"] = limits.lds_bytes // _round_up(lds_bytes, limits.lds_granule)
    reason = min(workgroups, key=workgroups.__getitem__)
    return Occupancy(workgroups[reason] * num_warps / limits.simds, reason)


def _round_up(number: int, granule: int) -> int:
    return -(-number // granule) * granule
