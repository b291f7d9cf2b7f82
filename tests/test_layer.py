# SPDX-License-Identifier: Apache-2.0
"""What a model asks of attention, and the configurations that ask for it."""

import json
from pathlib import Path

import pytest

from aiterlab.machines import Machine
from aiterlab.probes import Cell, models
from aiterlab.probes.layer import Layer
from aiterlab.trees import Tree

TREE = Tree("t", Path("/cache/a"), Path("/cache/a/vllm"), "f" * 64, "a test")


@pytest.mark.parametrize(("asked", "head_size"), [({}, 64), ({"kind": "mla"}, 576), ({"head_size": 128}, 128)])
def test_a_kind_has_its_usual_head_size(asked, head_size):
    assert Layer(**asked).head_size == head_size


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"kind": "cross"}, "unknown kind 'cross'; known: decoder, encoder, mla"),
        ({"role": "both"}, "unknown role 'both'"),
        ({"kind": "mla", "head_size": 64}, "caches more than 64 values"),
        ({"kind": "mla", "role": "draft"}, "a draft's layer is a decoder's"),
    ],
)
def test_an_impossible_layer_is_an_error(asked, message):
    with pytest.raises(ValueError, match=message):
        Layer(**asked)


@pytest.mark.parametrize(
    ("layer", "architecture"),
    [
        (Layer(), "LlamaForCausalLM"),
        (Layer(kind="encoder"), "BertModel"),
        (Layer(kind="mla"), "DeepseekV2ForCausalLM"),
    ],
)
def test_the_model_written_for_a_layer_has_its_shape(tmp_path, layer, architecture):
    target, draft = (json.loads((Path(path) / "config.json").read_text()) for path in models.write(tmp_path, layer))
    assert target["architectures"] == [architecture]
    assert draft["architectures"] == ["EagleLlamaForCausalLM"]
    if layer.kind == "mla":
        assert target["kv_lora_rank"] + target["qk_rope_head_dim"] == layer.head_size
    else:
        assert target["hidden_size"] == target["num_attention_heads"] * layer.head_size


def test_other_sizes_are_other_models_and_equal_ones_are_written_once(tmp_path):
    first = models.write(tmp_path, Layer())
    assert models.write(tmp_path, Layer(dtype="bfloat16")) == first
    assert not set(models.write(tmp_path, Layer(head_size=128))) & set(first)


def test_a_layer_is_part_of_the_question_and_of_its_place_but_not_of_its_group():
    usual, other = Cell(TREE, Machine(), None), Cell(TREE, Machine(), None, layer=Layer(kind="encoder"))
    assert usual.key("") != other.key("")
    assert usual.group == other.group
    assert other.coordinates()["kind"] == "encoder"
    assert other.request()["layer"]["block_size"] == 16


@pytest.mark.parametrize("other", [Cell(TREE, Machine(arch="gfx950"), None), Cell(TREE, Machine(), None, drive=False)])
def test_another_machine_and_another_beginning_are_other_groups(other):
    assert Cell(TREE, Machine(), None).group != other.group
