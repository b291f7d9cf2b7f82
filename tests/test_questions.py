# SPDX-License-Identifier: Apache-2.0
"""What a probe says of real trees is what their engines do: checked against what is known of them by reading.

The cells are asked through the pool; answers that depend on one another are asked of the tree's own functions.
"""

import json
import os
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import pytest

from aiterlab import paths, trees
from aiterlab.machines import Machine
from aiterlab.policy import MAIN_SWITCH
from aiterlab.probes import Cell, ask, inspection
from aiterlab.probes.layer import Layer

ON, OFF = {MAIN_SWITCH: "1"}, {MAIN_SWITCH: "0"}
MLA = Layer(kind="mla", block_size=None)
DRAFT = Layer(role="draft")
FA, UNIFIED = "ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN"


def machine(arch="gfx942", aiter=True, **switches):
    return Machine(arch=arch, aiter=aiter, switches=switches)


# (tree, machine, explicit choice, layer) -> facts of the selection; what was read in the tree is said beside it
KNOWN = [
    ("regressed", machine(), FA, Layer(), {"backend": FA, "requested": FA}),
    ("release:0.15.1", machine(**ON), None, Layer(), {"backend": FA, "requested": None}),
    ("release:0.15.1", machine(), None, Layer(), {"backend": "TRITON_ATTN"}),
    ("release:0.15.1", machine("gfx1100"), FA, Layer(), {"type": "ValueError", "chose": None}),  # "only on gfx9"
    ("release:0.15.1", machine(aiter=False, **ON), None, Layer(), {"type": "ModuleNotFoundError", "chose": FA}),
    ("release:0.15.1", machine(**ON), None, MLA, {"backend": "ROCM_AITER_MLA"}),
    ("release:0.15.1", machine(), None, Layer(kind="encoder"), {"backend": "TRITON_ATTN"}),
    ("release:0.11.0", machine(**ON), None, MLA, {"type": "ValueError", "chose": None}),  # takes block size 1 only
    ("release:0.11.0", machine(**ON), "TRITON_ATTN", Layer(), {"backend": FA, "requested": "TRITON_ATTN"}),  # #26980
    ("release:0.32.0", machine(**ON), None, Layer(), {"backend": "ROCM_ATTN", "priorities": 4}),  # #46596
    ("release:0.32.0", machine("gfx1201", **ON), None, Layer(), {"backend": UNIFIED}),  # #56021
    ("release:0.32.0", machine("gfx1201"), FA, Layer(), {"type": "ValueError"}),  # compute capability
    ("release:0.32.0", machine("gfx1151"), None, Layer(), {"backend": "ROCM_ATTN"}),
    ("release:0.32.0", machine(aiter=False), UNIFIED, Layer(), {"type": "ModuleNotFoundError", "chose": UNIFIED}),
    ("release:0.30.0", machine(), FA, Layer(), {"backend": FA}),  # imports a module of a later AITER than the wheel's
    ("release:0.15.1", machine(), FA, DRAFT, {"backend": FA, "asked_through": "attention_config.backend"}),
    ("release:0.22.0", machine(), FA, DRAFT, {"backend": FA, "asked_through": "speculative_config.attention_backend"}),
    ("release:0.25.1", machine(), FA, DRAFT, {"backend": "ROCM_ATTN", "requested": None}),  # #54826: not heard
    ("release:0.32.0", machine(), FA, DRAFT, {"backend": FA}),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path_factory.mktemp("run")))
        asked = [
            Cell(trees.get(name), where, explicit, layer=layer, drive=False)
            for name, where, explicit, layer, _ in KNOWN
        ]
        asked += [Cell(trees.get(name), machine(VLLM_NO_SUCH="1"), None, drive=False) for name in ENVIRONMENT]
        return ask(asked)


ENVIRONMENT = {
    "release:0.15.1": {"unknown": ["VLLM_NO_SUCH"], "warned": False, "can_be_an_error": False, "raised": None},
    "release:0.32.0": {"unknown": ["VLLM_NO_SUCH"], "warned": True, "can_be_an_error": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(KNOWN)), ids=lambda number: f"{KNOWN[number][0]}-{number}")
def test_the_selection_is_what_the_tree_does(answers, number):
    said = answers[number]["facts"]["selection"]
    for name, expected in KNOWN[number][-1].items():
        found = len(said[name]) if isinstance(expected, int) and said[name] else said.get(name)
        assert found == expected, (name, json.dumps(said, indent=1))


@pytest.mark.slow
def test_the_names_that_the_regression_left_unbound_are_bound_with_the_switch_on(answers):
    missed = answers[0]["facts"]["selection"]["unbound"]
    assert [(entry["name"], entry["value"], entry["kept_off"]) for entry in missed] == [
        ("aiter", "builtins.aiter", None)
    ]
    assert answers[1]["facts"]["selection"]["unbound"] == []


@pytest.mark.slow
def test_a_choice_for_the_engine_reaches_the_draft_or_not(answers):
    heard = {
        KNOWN[i][0]: answers[i]["facts"].get("target_choice") for i, known in enumerate(KNOWN) if known[3] == DRAFT
    }
    assert {name: choice["backend"] for name, choice in heard.items()} == {
        "release:0.15.1": FA, "release:0.22.0": "ROCM_ATTN", "release:0.25.1": FA, "release:0.32.0": FA,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ENVIRONMENT)
def test_an_unknown_name_is_an_error_a_warning_or_nothing(answers, name):
    said = answers[len(KNOWN) + list(ENVIRONMENT).index(name)]["facts"]["environment"]
    assert {fact: said[fact] for fact in ENVIRONMENT[name]} == ENVIRONMENT[name]
    assert bool(said["raised"]) == said["can_be_an_error"]


@pytest.mark.slow
def test_what_is_imported_afterwards_is_not_the_cells(answers):
    for row in answers:
        assert all(
            entry["step"] in ("platform", "policy", "engine", "selection") for entry in row["facts"]["aiter_imports"]
        )


@dataclass
class Seen:
    """As what vLLM says of a model's class: plain values by name."""

    noted: list
    count: int


def test_an_inspection_in_a_fork_brings_back_the_answer_and_leaves_nothing_behind():
    state = []
    assert inspection._in_a_fork(lambda: {"noted": [state.append(1)], "count": len(state)}) == asdict(Seen([None], 1))
    assert state == []


def test_a_class_is_looked_at_once_in_a_fork_and_the_tree_keeps_nothing_itself(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    looks = tmp_path / "looks"

    class Model:
        module_name = "vllm.model_executor.models.llama"

        def __init__(self, class_name: str) -> None:
            self.class_name = class_name

        def inspect_model_cls(self):  # as vLLM's: what another process says, and then to the disk
            seen = registry._run_in_subprocess(
                lambda: Seen([self.class_name, os.getpid()], 1 // (self.class_name != "Broken"))
            )
            with looks.open("a") as file:
                file.write(f"{self.class_name}\n")
            self._save_modelinfo_to_cache(seen, "hash")
            return seen

        def _save_modelinfo_to_cache(self, seen, module_hash) -> None:
            raise AssertionError("imports the model loader")

    names = ("LlamaForCausalLM", "EagleLlamaForCausalLM")
    known = SimpleNamespace(models={name: Model(name) for name in (*names, "Broken")})
    registry = SimpleNamespace(_ModelInfo=Seen, _LazyRegisteredModel=Model, ModelRegistry=known)
    inspection._replace(registry)
    first = [Model(name).inspect_model_cls() for name in names]
    assert [seen.noted[0] for seen in first] == [*names]
    assert all(seen.noted[1] != os.getpid() for seen in first)
    assert [Model(name).inspect_model_cls() for name in names] == first
    assert looks.read_text().split() == [*names]
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "another machine"))
    monkeypatch.setattr(inspection, "_expected", ())
    inspection.expect(["Broken", "of another release", *names])
    again = [Model(name).inspect_model_cls() for name in names]
    assert [seen.noted[0] for seen in again] == [*names]
    assert len({seen.noted[1] for seen in again}) == 1, "one process looks at all that are expected"
    assert again[0] != first[0]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        Model("Broken").inspect_model_cls()


def test_an_inspection_that_fails_says_why():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        inspection._in_a_fork(lambda: 1 / 0)
