# SPDX-License-Identifier: Apache-2.0
"""Figures made from tables; each says its finding in its title and is saved beside the record."""

from aiterlab.plots.backends import VERDICTS, accuracy, truth_table
from aiterlab.plots.kernels import error, latency, throughput, two_step
from aiterlab.plots.occupancy import occupancy
from aiterlab.plots.style import save

__all__ = [
    "VERDICTS",
    "accuracy",
    "error",
    "latency",
    "occupancy",
    "save",
    "throughput",
    "truth_table",
    "two_step",
]
