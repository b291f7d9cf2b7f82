# SPDX-License-Identifier: Apache-2.0
"""Who can compute an attention operation here, and who does: one module per provider, chosen by `policy`'s rule."""

from aiterlab.attention.providers.place import Place, current, enter, triton_runs
from aiterlab.attention.providers.provider import Implementation, Limits, Provider
from aiterlab.attention.providers.selection import PROVIDERS, choose, implementations, refusals, table

__all__ = [
    "PROVIDERS",
    "Implementation",
    "Limits",
    "Place",
    "Provider",
    "choose",
    "current",
    "enter",
    "implementations",
    "refusals",
    "table",
    "triton_runs",
]
