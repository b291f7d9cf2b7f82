# SPDX-License-Identifier: Apache-2.0
"""Say how far a long loop is, seldom enough for a log that is kept."""


class Progress:
    """Prints how far the work is, at most twice a minute, with the time it may still take."""

    def __init__(self, interval_s: float = 30.0, what: str = "cells") -> None:
        self.interval_s, self.what, self.next_s, self.first = interval_s, what, 0.0, None

    def __call__(self, done: int, total: int, elapsed_s: float) -> None:
        self.first = done if self.first is None else self.first
        if elapsed_s < self.next_s and done < total:
            return
        self.next_s = elapsed_s + self.interval_s
        asked = done - self.first
        left = f", about {elapsed_s / asked * (total - done):.0f} s left" if asked and done < total else ""
        print(f"{done} of {total} {self.what}, {elapsed_s:.0f} s{left}", flush=True)
