# SPDX-License-Identifier: Apache-2.0
"""Sabotage breaks what it names and nothing else: a draft's matrices, or what vLLM's own rejection sampler is shown."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from aiterlab.spec_decode import sabotage


@pytest.fixture
def draft(tmp_path):
    folder = tmp_path / "draft"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(40, 8, generator=generator),
        "model.layers.0.mlp.up_proj.weight": 0.02 * torch.randn(64, 32, generator=generator),
        "model.fc.weight": 3.0 * torch.randn(32, 96, generator=generator),
        "model.norm.weight": torch.rand(32, generator=generator),
    }
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()} | {"d2t": torch.arange(40)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"architectures": ["Eagle3LlamaForCausalLM"]}))
    return folder


def test_a_corrupted_draft_has_the_same_layout_and_scale_but_noise_for_matrices(draft, tmp_path):
    copy = sabotage.corrupt_draft(draft, tmp_path / "corrupted")
    assert {file.name for file in copy.iterdir()} == {"config.json", "model.safetensors"}
    assert (copy / "config.json").read_bytes() == (draft / "config.json").read_bytes()
    before, after = load_file(draft / "model.safetensors"), load_file(copy / "model.safetensors")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert (after[name].shape, after[name].dtype) == (tensor.shape, tensor.dtype)
        if name in ("model.layers.0.mlp.up_proj.weight", "model.fc.weight"):
            mine, noise = tensor.float(), after[name].float()
            assert noise.std().item() == pytest.approx(mine.std().item(), rel=0.1)
            assert abs(torch.corrcoef(torch.stack([mine.flatten(), noise.flatten()]))[0, 1]) < 0.1
        else:
            assert torch.equal(after[name], tensor), name


def test_a_seed_gives_the_same_noise_again(draft, tmp_path):
    def written(name, seed):
        return (sabotage.corrupt_draft(draft, tmp_path / name, seed=seed) / "model.safetensors").read_bytes()

    assert written("a", 1) == written("b", 1) != written("c", 2)


def test_what_cannot_be_corrupted_is_refused(draft, tmp_path):
    with pytest.raises(sabotage.SabotageError, match="is the draft itself"):
        sabotage.corrupt_draft(draft, draft)
    (tmp_path / "empty").mkdir()
    with pytest.raises(sabotage.SabotageError, match=r"holds no \*\.safetensors"):
        sabotage.corrupt_draft(tmp_path / "empty", tmp_path / "copy")


def test_favour_makes_the_draft_certain_where_it_is_chosen():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    shown = sabotage.favour(logits, torch.tensor([3, -1, 5, 7]), torch.tensor([True, True, True, False]))
    assert torch.equal(logits, before)
    assert shown[0].argmax() == 3 and shown[2].argmax() == 5
    assert shown[[0, 2]].softmax(-1).amax(-1).tolist() == [1, 1]
    assert torch.equal(shown[[1, 3]], logits[[1, 3]])


@pytest.fixture
def sampler(monkeypatch):
    """A verifier with the arguments of vLLM's, which accepts the rows whose draft token is the likeliest."""

    def rejection_sample(draft, counts, most, cu, draft_probs, logits, bonus, sampling, synthetic_mode=False):
        return logits.argmax(-1) == draft

    module = SimpleNamespace(rejection_sample=rejection_sample)
    monkeypatch.setitem(sys.modules, sabotage.SAMPLER, module)
    return module


def verified(sampler, temperature):
    """Three requests with 2, 0 and 1 draft tokens, none of them the target's choice."""
    draft, logits = torch.tensor([4, 2, 6]), torch.zeros(3, 8)
    logits[:, 0] = 1.0
    sampling = SimpleNamespace(temperature=temperature)
    arguments = (draft, [2, 0, 1], 2, torch.tensor([2, 2, 3]), None, logits, torch.zeros(3, 1), sampling)
    return sampler.rejection_sample(*arguments, synthetic_mode=False).tolist()


def test_a_broken_verifier_accepts_everything(sampler):
    assert verified(sampler, None) == [False, False, False]
    sabotage.break_verifier()
    assert verified(sampler, None) == [True, True, True]
    assert verified(sampler, torch.tensor([1.0, 0.0, 0.0])) == [True, True, True]


def test_a_biased_verifier_leaves_greedy_requests_alone(sampler):
    sabotage.bias_verifier()
    assert verified(sampler, None) == [False, False, False]
    assert verified(sampler, torch.tensor([1.0, 1.0, 0.0])) == [True, True, False]
    assert verified(sampler, torch.tensor([0.0, 1.0, 1.0])) == [False, False, True]


def test_another_vllm_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(sabotage, "SAMPLER", "aiterlab.nowhere")
    with pytest.raises(sabotage.SabotageError, match=r"this vLLM has no aiterlab\.nowhere\.rejection_sample"):
        sabotage.break_verifier()
