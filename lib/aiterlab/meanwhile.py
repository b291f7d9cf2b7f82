# SPDX-License-Identifier: Apache-2.0
"""Work that waits for other processes, beside whatever a notebook does next."""

import threading
from collections.abc import Callable
from concurrent.futures import Future


def start(work: Callable, *arguments, **options) -> Future:
    """Begin `work(*arguments, **options)`; the future's `result()` waits for its end, and raises what it raised.

    Its thread keeps no process alive: a notebook that fails first does not wait for it.
    """
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
