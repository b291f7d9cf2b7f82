# SPDX-License-Identifier: Apache-2.0
"""aiterlab.spec_decode.models: what fits, and one clear line for what does not."""

import json

import pytest
import torch
from safetensors.torch import save_file

from aiterlab import paths
from aiterlab.spec_decode import models
from aiterlab.spec_decode.models import ModelError, check_fit

HIDDEN, VOCABULARY, DRAFTED = 16, 32, 24


@pytest.fixture
def folder(tmp_path):
    """A target, an EAGLE draft and an EAGLE-3 draft that fit it, of a few numbers each."""
    config = {"hidden_size": HIDDEN, "vocab_size": VOCABULARY}
    write(
        tmp_path / "target", config | {"architectures": ["LlamaForCausalLM"]}, {"lm_head.weight": (VOCABULARY, HIDDEN)}
    )
    write(
        tmp_path / "eagle",
        config | {"architectures": ["EagleLlamaForCausalLM"]},
        {"fc.weight": (HIDDEN, 2 * HIDDEN)},
    )
    write(
        tmp_path / "eagle3",
        config | {"architectures": ["Eagle3LlamaForCausalLM"], "draft_vocab_size": DRAFTED},
        {"fc.weight": (HIDDEN, 3 * HIDDEN), "d2t": (DRAFTED,), "t2d": (VOCABULARY,)},
    )
    return tmp_path


def write(folder, config, shapes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "model.safetensors")


def change(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def refusal(folder, draft, method, target="target"):
    with pytest.raises(ModelError) as refused:
        check_fit(folder / target, draft and folder / draft, method)
    message = str(refused.value)
    assert "\n" not in message and ("; " in message)  # one line, with the mend
    return message


@pytest.mark.parametrize(
    ("draft", "method"), [(None, "vanilla"), (None, "ngram"), ("eagle", "eagle"), ("eagle3", "eagle3")]
)
def test_models_that_fit(folder, draft, method):
    check_fit(folder / "target", draft and folder / draft, method)


def test_a_hub_id_is_left_to_vllm(folder):
    check_fit("meta-llama/Llama-3.1-8B-Instruct", "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", "eagle3")
    check_fit(folder / "target", "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", "eagle3")


@pytest.mark.parametrize("path", ["nowhere", "/no/such/folder", "a/b/c"])
def test_a_path_that_does_not_exist(path):
    with pytest.raises(ModelError, match="no such folder"):
        check_fit(path, None, "vanilla")


def test_a_method_that_does_not_exist(folder):
    assert "eagle3" in refusal(folder, None, "medusa")


@pytest.mark.parametrize(("draft", "method"), [("eagle", "eagle3"), ("eagle3", "eagle")])
def test_the_draft_of_the_other_method(folder, draft, method):
    assert f"method {draft}" in refusal(folder, draft, method)


def test_a_draft_where_none_belongs_and_none_where_one_does(folder):
    assert "takes no draft" in refusal(folder, "eagle", "vanilla")
    assert "needs a draft" in refusal(folder, None, "eagle3")


def test_a_target_as_its_own_draft(folder):
    assert "fc.weight" in refusal(folder, "target", "eagle")


@pytest.mark.parametrize("draft", ["eagle", "eagle3"])
def test_sizes_of_another_target(folder, draft):
    change(folder / draft, vocab_size=VOCABULARY + 1)
    assert "vocabulary 33, the target's is 32" in refusal(folder, draft, draft)
    change(folder / draft, vocab_size=VOCABULARY, hidden_size=HIDDEN * 2)
    assert "hidden size 32, the target's is 16" in refusal(folder, draft, draft)


def test_weights_that_contradict_their_configuration(folder):
    config = json.loads((folder / "eagle3" / "config.json").read_text())
    write(folder / "eagle3", config, {"fc.weight": (HIDDEN, 3 * HIDDEN + 1), "d2t": (DRAFTED,)})
    assert "fc.weight" in refusal(folder, "eagle3", "eagle3")
    write(folder / "eagle3", config, {"fc.weight": (HIDDEN, 3 * HIDDEN), "d2t": (DRAFTED - 1,)})
    assert "d2t" in refusal(folder, "eagle3", "eagle3")
    write(folder / "eagle3", config, {"fc.weight": (HIDDEN, 3 * HIDDEN), "t2d": (VOCABULARY - 1,)})
    assert "t2d" in refusal(folder, "eagle3", "eagle3")
    change(folder / "eagle3", draft_vocab_size=VOCABULARY + 1)
    assert "draft vocabulary" in refusal(folder, "eagle3", "eagle3")


def test_files_that_are_missing_or_broken(folder):
    weights = folder / "eagle" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert "not a whole safetensors file" in refusal(folder, "eagle", "eagle")
    weights.write_bytes(b"PK\x03\x04 a zip archive that is called safetensors")
    assert "not a whole safetensors file" in refusal(folder, "eagle", "eagle")
    weights.unlink()
    assert "no model.safetensors" in refusal(folder, "eagle", "eagle")
    (folder / "eagle" / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights" in refusal(folder, "eagle", "eagle")
    (folder / "eagle" / "config.json").write_text("{")
    assert "not JSON" in refusal(folder, "eagle", "eagle")
    (folder / "eagle" / "config.json").unlink()
    assert "no config.json" in refusal(folder, "eagle", "eagle")


def test_shapes_of_an_8b_model_need_no_weights(tmp_path):
    target = models.llama_3_1_8b_shape(tmp_path / "target")
    eagle3 = models.eagle3_head_shape(tmp_path / "eagle3")
    eagle = models.eagle_head_shape(tmp_path / "eagle")
    check_fit(target, eagle3, "eagle3", weights=False)
    check_fit(target, eagle, "eagle", weights=False)
    config = json.loads((target / "config.json").read_text())
    of_attention = 4096 * (2 * 4096 + 2 * 8 * 128)
    of_layers = config["num_hidden_layers"] * (of_attention + 3 * 4096 * config["intermediate_size"] + 2 * 4096)
    assert (
        of_layers + 2 * config["vocab_size"] * 4096 + 4096 == 8_030_261_248
    )  # Llama-3.1-8B's parameters, as published
    # A draft that knows fewer positions than its target is not asked beyond them.
    assert json.loads((eagle3 / "config.json").read_text())["max_position_embeddings"] == 131072


def test_the_bundled_models_fit():
    pairs = models.bundled()
    assert set(pairs) == set(models.METHODS)
    assert pairs["eagle3"].target == paths.models_dir() / "target"
    assert pairs["eagle"].draft == paths.models_dir() / "eagle"
