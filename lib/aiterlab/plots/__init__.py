# SPDX-License-Identifier: Apache-2.0
"""Figures made from tables; each says its finding in its title and is saved beside the record."""

from aiterlab.plots.answer import answer_page
from aiterlab.plots.audit import choices, verdicts
from aiterlab.plots.backends import VERDICTS, accuracy, truth_table
from aiterlab.plots.kernels import error, latency, throughput, two_step
from aiterlab.plots.occupancy import occupancy
from aiterlab.plots.page import publish
from aiterlab.plots.spec_decode import (
    acceptance_by_position,
    backend_throughput,
    speedup_by_draft_tokens,
    speedup_map,
    step_components,
    tokens_per_step,
)
from aiterlab.plots.style import save

__all__ = [
    "VERDICTS",
    "acceptance_by_position",
    "accuracy",
    "answer_page",
    "backend_throughput",
    "choices",
    "error",
    "latency",
    "occupancy",
    "publish",
    "save",
    "speedup_by_draft_tokens",
    "speedup_map",
    "step_components",
    "throughput",
    "tokens_per_step",
    "truth_table",
    "two_step",
    "verdicts",
]
