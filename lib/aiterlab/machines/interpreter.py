# SPDX-License-Identifier: Apache-2.0
"""Have Triton kernels run in Triton's interpreter, without what it computes and throws away."""

from __future__ import annotations

import os
from dataclasses import replace
from types import ModuleType

from aiterlab import importing


def choose() -> None:
    """Let this process interpret kernels; before Triton is imported, which decides then."""
    os.environ["TRITON_INTERPRET"] = "1"
    importing.after_import("triton.runtime.interpreter", _leave_overflow_unchecked)


def _leave_overflow_unchecked(interpreter: ModuleType) -> None:
    """Triton repeats each product and sum of integers in 64 bits for an assertion that it makes in debug mode alone.

    Without debug mode the interpreter does all of that but the assertion, which takes a fifth of its time.
    """
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
