# SPDX-License-Identifier: Apache-2.0
"""Say how far a long loop is, seldom enough for a log that is kept."""

import sys
from typing import TextIO


class Progress:
    """Prints how far the work is, at most twice a minute, with the time it may still take.

    Args:
        stream: where to; standard output by default.
    """

    def __init__(self, interval_s: float = 30.0, what: str = "cells", stream: TextIO | None = None) -> None:
        self.interval_s, self.what, self.stream = interval_s, what, stream
        self.next_s, self.first = 0.0, None

    def __call__(self, done: int, total: int, elapsed_s: float) -> None:
        self.first = self.first or (done, elapsed_s)  # what came before includes getting ready, and says no pace
        if elapsed_s < self.next_s and done < total:
            return
        self.next_s = elapsed_s + self.interval_s
        since, since_s = self.first
        left = ""
        if since < done < total:
            left = f", about {(elapsed_s - since_s) / (done - since) * (total - done):.0f} s left"
        print(f"{done} of {total} {self.what}, {elapsed_s:.0f} s{left}", flush=True, file=self.stream or sys.stdout)
