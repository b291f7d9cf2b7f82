# SPDX-License-Identifier: Apache-2.0
"""Handle signals for a while, where a process may: in its main thread."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

TO_END = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def handled(
    handler: Callable[[int, FrameType | None], object] | signal.Handlers, numbers: tuple[int, ...] = TO_END
) -> Iterator[None]:
    """Let `handler` have these signals until the block is left; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds; outside the main thread it may take as long as it does."""

    def over(_number: int, _frame: object) -> None:
        raise TimeoutError(f"it took longer than {seconds:.0f} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with handled(over, (signal.SIGALRM,)):
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again, should something have caught the first
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
