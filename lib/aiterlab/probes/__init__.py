# SPDX-License-Identifier: Apache-2.0
"""Questions put to one tree on one machine, each in a process of its own, answered with JSON facts."""

from aiterlab.probes.cells import EXPLICIT, TRAP, Cell, Verdict, ablation, grid, verdict
from aiterlab.probes.pool import ask
from aiterlab.progress import Progress

__all__ = ["EXPLICIT", "TRAP", "Cell", "Progress", "Verdict", "ablation", "ask", "grid", "verdict"]
