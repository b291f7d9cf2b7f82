# SPDX-License-Identifier: Apache-2.0
"""What vLLM sees around it: a described ROCm machine, simulated at the driver boundary, or the real one."""

from aiterlab.machines.description import ARCHITECTURES, Architecture, Machine

__all__ = ["ARCHITECTURES", "Architecture", "Machine"]
