# SPDX-License-Identifier: Apache-2.0
"""Work beside other work: its result, its failure, and that nobody has to wait for it."""

import subprocess
import sys
import threading

import pytest

from aiterlab import meanwhile


def test_the_result_is_there_when_it_is_asked_for():
    go = threading.Event()

    def work(one, *, other):
        assert go.wait(10)
        return one, other

    future = meanwhile.start(work, 1, other=2)
    assert not future.done()
    go.set()
    assert future.result(10) == (1, 2)


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_what_the_work_raises_is_raised_where_it_is_waited_for(error):
    def work():
        raise error

    with pytest.raises(type(error)):
        meanwhile.start(work).result(10)


def test_a_process_ends_without_waiting_for_it():
    code = "import threading; from aiterlab import meanwhile; meanwhile.start(threading.Event().wait)"
    assert subprocess.run([sys.executable, "-c", code], timeout=20).returncode == 0
