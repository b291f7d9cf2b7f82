# SPDX-License-Identifier: Apache-2.0
"""Whether kernels may be forked from the runner."""

import subprocess
import sys

import pytest
import torch

CODE = """
import sys
if sys.argv[1] == "computed":
    import torch
    torch.set_num_threads(2)
    torch.ones(512, 512) @ torch.ones(512, 512)
from aiterlab.suite import warm
print(warm.preload(shared=sys.argv[1] == "broken"))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is forked beside a GPU")
@pytest.mark.parametrize(("before", "expected"), [("clean", "True"), ("computed", "False")])
def test_nothing_is_forked_from_a_process_with_threads_of_its_own(before, expected):
    made = subprocess.run([sys.executable, "-c", CODE, before], capture_output=True, text=True, check=True, timeout=120)
    assert made.stdout.split() == [expected]


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is forked beside a GPU")
def test_a_broken_package_is_for_the_notebook_that_needs_it(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}){CODE}"
    made = subprocess.run([sys.executable, "-c", code, "broken"], capture_output=True, text=True, timeout=120)
    assert (made.stdout.split(), made.stderr) == (["False"], "")
