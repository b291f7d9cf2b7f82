# SPDX-License-Identifier: Apache-2.0
"""What do the kernels become on AMD GPUs? Compiled for them with no GPU, and read."""

from aiterlab.attention.isa.compilation import Compiled, compile_launches
from aiterlab.attention.isa.launches import Launch, launches_of
from aiterlab.attention.isa.table import table

__all__ = ["Compiled", "Launch", "compile_launches", "launches_of", "table"]
