# SPDX-License-Identifier: Apache-2.0
"""What a killed process had in shared memory goes with it, and nothing else does."""

import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest

from aiterlab import shared_memory
from aiterlab.spec_decode import processes
from aiterlab.suite import family

HOLDS = """
import mmap, os, sys, time
files = [os.open(name, os.O_CREAT | os.O_RDWR) for name in sys.argv[1:]]
maps = [os.truncate(file, 4096) or mmap.mmap(file, 4096) for file in files]
print("up", flush=True)
time.sleep(60)
"""


@pytest.fixture
def segments():
    """Segments and semaphores of Python and vLLM's ranks and, last, a file of somebody's who wants it kept."""
    mark = uuid.uuid4().hex
    names = ("psm_{}", "vllm_dist_{}-tp:0-[0-1]-cpushm_0", "sem.mp-{}", "sem.loky-12-{}", "kept_{}")
    found = [Path("/dev/shm", name.format(mark)) for name in names]
    yield found
    for path in found:
        path.unlink(missing_ok=True)


def left(paths):
    return [path for path in paths if path.exists()]


def held(paths):
    """A process in a group of its own that has mapped these files."""
    command = [sys.executable, "-c", HOLDS, *map(str, paths)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "up\n"
    return process


def test_only_segments_that_are_made_for_one_life_are_found_and_deleted(segments):
    process = held(segments)
    assert shared_memory.mapped([process.pid, 2**22 + 1]) == set(segments[:-1])
    process.kill()
    process.wait()
    assert all(path.exists() for path in segments), "the system has deleted them itself"
    assert shared_memory.mapped([process.pid]) == set()
    shared_memory.delete(segments[:-1])
    shared_memory.delete(segments[:-1])  # gone already
    assert left(segments) == segments[-1:]


def test_a_family_that_is_killed_leaves_none(segments):
    before = family.descendants()
    process = held(segments)
    assert [line.split()[0] for line in family.end(before)] == [str(process.pid)]
    process.wait()
    assert left(segments) == segments[-1:]


def test_a_killing_that_is_interrupted_leaves_none(segments, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    before = family.descendants()
    process = held(segments)
    monkeypatch.setattr(family.psutil, "wait_procs", interrupt)
    with pytest.raises(KeyboardInterrupt):
        family.end(before)
    assert process.wait() == -9
    assert left(segments) == segments[-1:]


@pytest.mark.parametrize("end", ["end", "kill_group"])
def test_a_group_that_is_killed_leaves_none(segments, tmp_path, end):
    process = held(segments)
    group = processes.Process(process.pid, tmp_path / "folder", tmp_path / "log", process)
    group.end(0) if end == "end" else processes.kill_group(process.pid)
    process.wait()
    assert not psutil.pid_exists(process.pid)
    assert left(segments) == segments[-1:]
