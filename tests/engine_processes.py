# SPDX-License-Identifier: Apache-2.0
"""What is left of an engine: shared by the tests of engines and servers."""

import contextlib
import os

import psutil


def group(pid):
    """Processes of a group that still run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
