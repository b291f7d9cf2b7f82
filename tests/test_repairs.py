# SPDX-License-Identifier: Apache-2.0
"""Repairs do what vLLM's own code is meant to do."""

import torch

from aiterlab.spec_decode.repairs import expand


def test_every_token_gets_the_number_of_its_request():
    temperature, ends = torch.tensor([1.0, 0.0, 0.5, 2.0]), torch.tensor([2, 3, 3, 6], dtype=torch.int32)
    expanded = expand(temperature, ends, 6, replace_from=0, replace_to=1)
    assert expanded.tolist() == [1, 1, 1, 2, 2, 2] and expanded.dtype == torch.float32
    top_k = torch.tensor([5, 7], dtype=torch.int32)
    assert expand(top_k, torch.tensor([1, 3]), 3).tolist() == [5, 7, 7]
    assert expand(top_k, torch.tensor([1, 3]), 3).dtype == torch.int32
