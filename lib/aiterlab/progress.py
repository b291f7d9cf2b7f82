# SPDX-License-Identifier: Apache-2.0
"""Say how far a long loop is: plain lines in a log, one line that changes in place where someone is looking.

A line in place is an updated display of plain text. It is no widget, so that nothing of it stays in the notebook but
its last words.
"""

import os
import sys
from collections.abc import Callable
from typing import TextIO

from aiterlab.paths import RUN_DIR_VARIABLE

PLAIN_INTERVAL_S = 30.0  # seldom enough for a log that is kept
LIVE_INTERVAL_S = 0.5


class Progress:
    """Tells how far the work is and the time it may still take; what a pool or a study calls after each answer.

    Args:
        interval_s: seconds between two lines; None for what suits the place.
        what: what is counted.
        stream: where to; None for standard output, or for a line in place in an interactive notebook.
    """

    def __init__(self, interval_s: float | None = None, what: str = "cells", stream: TextIO | None = None) -> None:
        self.what, self.stream = what, stream
        self.live = stream is None and is_live()
        self.interval_s = interval_s or (LIVE_INTERVAL_S if self.live else PLAIN_INTERVAL_S)
        self.next_s, self.first = 0.0, None
        self._update: Callable[[str], None] | None = None

    def __call__(self, done: int, total: int, elapsed_s: float) -> None:
        """Tell that `done` of `total` are done after `elapsed_s` seconds, unless something was told just now."""
        self.first = self.first or (done, elapsed_s)  # what came before includes getting ready, and says no pace
        if elapsed_s < self.next_s and done < total:
            return
        self.next_s = elapsed_s + self.interval_s
        since, since_s = self.first
        left = ""
        if since < done < total:
            left = f", about {(elapsed_s - since_s) / (done - since) * (total - done):.0f} s left"
        self._tell(f"{done} of {total} {self.what}, {elapsed_s:.0f} s{left}")

    def _tell(self, line: str) -> None:
        if not self.live:
            print(line, flush=True, file=self.stream or sys.stdout)
        elif self._update is None:
            self._update = _display(line)
        else:
            self._update(line)


def is_live() -> bool:
    """Tell whether this process is the kernel of a notebook that someone has open.

    Jupyter's servers and VS Code say so to their kernels. papermill, nbconvert and the runner do not, nor does the
    runner where it was itself started from an open notebook.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None or not hasattr(shell, "kernel") or os.environ.get(RUN_DIR_VARIABLE):
        return False
    return "JPY_SESSION_NAME" in os.environ or "__vsc_ipynb_file__" in shell.user_ns


def _display(line: str) -> Callable[[str], None]:
    """Show a line, and return what puts another one in its place."""
    from IPython.display import display

    handle = display({"text/plain": line}, raw=True, display_id=True)
    return lambda text: handle.update({"text/plain": text}, raw=True)
