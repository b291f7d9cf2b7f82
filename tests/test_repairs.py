# SPDX-License-Identifier: Apache-2.0
"""Repairs mend what is broken and nothing else; on the real engine: test_engine.py, test_lossless.py."""

import sys
from types import SimpleNamespace

import pytest
import torch

from aiterlab.spec_decode import repairs


def rightly(x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):
    return torch.tensor([3.0, 5.0, 5.0])


def as_released(x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):
    return x.new_full((num_tokens,), 1e38)


@pytest.fixture
def vllm(monkeypatch):
    """What repairs look at: a platform, and the sampler's function that copies temperatures to positions."""
    sampler = SimpleNamespace(expand_batch_to_tokens=as_released)
    platform = SimpleNamespace(is_cpu=lambda: True)
    monkeypatch.setitem(sys.modules, "vllm.v1.sample", SimpleNamespace(rejection_sampler=sampler))
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    return SimpleNamespace(sampler=sampler, platform=platform)


def test_a_fault_is_mended_once_and_told(vllm):
    assert repairs.expanded() != [3, 5, 5]
    assert repairs.apply() == (repairs.EXPAND,)
    assert repairs.expanded() == [3, 5, 5]
    assert repairs.apply() == ()


def test_what_is_right_is_left_alone(vllm):
    vllm.sampler.expand_batch_to_tokens = rightly
    assert repairs.apply() == () and vllm.sampler.expand_batch_to_tokens is rightly


def test_a_gpu_has_its_own_kernel(vllm):
    vllm.platform.is_cpu = lambda: False
    assert repairs.apply() == () and vllm.sampler.expand_batch_to_tokens is as_released


def test_every_position_gets_the_number_of_its_request(vllm):
    repairs.apply()
    expand = vllm.sampler.expand_batch_to_tokens
    temperature, ends = torch.tensor([1.0, 0.0, 0.5, 2.0]), torch.tensor([2, 3, 3, 6], dtype=torch.int32)
    found = expand(temperature, ends, 6, replace_from=0, replace_to=1)  # a greedy one is divided by 1
    assert found.tolist() == [1, 1, 1, 2, 2, 2] and found.dtype == torch.float32
    found = expand(torch.tensor([5, 7], dtype=torch.int32), torch.tensor([1, 3]), 3)  # top-k
    assert found.tolist() == [5, 7, 7] and found.dtype == torch.int32
