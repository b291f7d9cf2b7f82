# SPDX-License-Identifier: Apache-2.0
"""What a forked process does at its beginning and at its end, whatever it does between."""

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Get this signal when the parent ends, be it by `kill -9`."""
    _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def run_to_end(run: Callable[[], int | None]) -> NoReturn:
    """Run `run` and end this process with the exit code that it returns, 0 for None, and 1 if it raises.

    Nothing of the parent's is cleaned up: its exit handlers are not this process's, and libraries registered for a
    simulated device do not unload cleanly.
    """
    exit_code = 1
    try:
        exit_code = run() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(exit_code)
