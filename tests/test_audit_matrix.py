# SPDX-License-Identifier: Apache-2.0
"""The cells of an audit: which there are, and that each statement finds the contrasts that it compares."""

from itertools import product

import pytest
from test_audit_switches import SOURCES, make_tree

from aiterlab import trees
from aiterlab.audit import matrix
from aiterlab.machines import ARCHITECTURES
from aiterlab.policy import MAIN_SWITCH
from aiterlab.probes.layer import Layer


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree"), SOURCES)


@pytest.fixture(scope="module")
def cells(tree):
    return matrix.default(tree)


def at(cell):
    """Everything in which two cells can differ, but for the tree."""
    return (
        cell.machine.arch,
        cell.machine.aiter,
        tuple(sorted(cell.machine.switches.items())),
        cell.explicit,
        cell.layer,
    )


def test_no_cell_is_asked_twice_and_none_is_driven(cells):
    assert len({at(cell) for cell in cells}) == len(cells)
    assert not any(cell.drive for cell in cells)


def test_every_gpu_is_asked_with_and_without_aiter_at_every_position_of_the_switch(cells):
    plain = {at(cell)[:3] for cell in cells if cell.explicit is None and cell.layer == Layer()}
    positions = [(), ((MAIN_SWITCH, "0"),), ((MAIN_SWITCH, "1"),)]
    assert set(product(ARCHITECTURES, (True, False), positions)) <= plain


def test_some_gpus_are_asked_what_all_are(tree, cells):
    some = {"gfx942", "gfx1100"}
    assert matrix.default(tree, some) == [cell for cell in cells if cell.machine.arch in some] != []


def test_every_backend_is_asked_for_by_name_and_rocms_at_every_position(cells):
    asked = {(cell.explicit, cell.machine.switch) for cell in cells if cell.machine.arch == "gfx942"}
    assert {("FLASH_ATTN", "unset"), ("TRITON_MLA", "unset")} <= asked
    for name in ("TRITON_ATTN", "ROCM_ATTN", "ROCM_AITER_FA"):
        assert {(name, position) for position in ("unset", "0", "1")} <= asked
    assert all(cell.layer.kind == "mla" for cell in cells if cell.explicit == "TRITON_MLA")
    without = {cell.machine.switch for cell in cells if cell.explicit == "ROCM_AITER_FA" and not cell.machine.aiter}
    assert without == {"unset", "0", "1"}


DECODER, LATENT = {Layer()}, {Layer(), matrix.LATENT}


def layers(cells, arch, settings):
    """The layers for which these switches are moved on a GPU, with the main one on and nothing asked for."""
    wanted = {MAIN_SWITCH: "1"} | settings
    return {cell.layer for cell in cells if cell.machine.arch == arch and cell.machine.switches == wanted}


@pytest.mark.parametrize("arch", ["gfx942", "gfx1201"])
@pytest.mark.parametrize(
    "name, other, kinds",
    [
        ("VLLM_ROCM_USE_AITER_MHA", "VLLM_PREFILL_DECODE", DECODER),  # documented for one kind of layer
        ("VLLM_PREFILL_DECODE", "VLLM_ROCM_USE_AITER_MHA", LATENT),  # documented for none
    ],
)
def test_each_switch_that_decides_is_off_alone_and_on_alone(cells, arch, name, other, kinds):
    assert layers(cells, arch, {name: "0"}) == kinds
    assert layers(cells, arch, {name: "1", other: "0"}) == LATENT


def test_a_dead_switch_is_moved_alone_where_it_is_documented_to_decide(cells, tmp_path):
    gone = "VLLM_ROCM_USE_AITER_GONE"
    together = [cell.machine.switches for cell in cells if gone in cell.machine.switches]
    assert together and all(settings == together[0] and settings[gone] == "1" for settings in together)
    governed = "VLLM_ROCM_USE_AITER_UNIFIED_ATTENTION"
    renamed = make_tree(tmp_path, {file: text.replace(gone, governed) for file, text in SOURCES.items()})
    assert layers(matrix.default(renamed), "gfx942", {governed: "0"}) == DECODER


def test_beside_each_draft_stands_the_same_question_about_the_target(cells):
    asked = {at(cell) for cell in cells}
    drafts = [cell for cell in cells if cell.layer.role == "draft"]
    assert drafts
    assert all((*at(cell)[:4], Layer()) in asked for cell in drafts)


def test_pairs_of_layer_factors_are_all_there(cells):
    layers = {cell.layer for cell in cells if cell.layer.kind == "decoder" and cell.explicit is None}
    for one, other in product(matrix.DECODER_FACTORS, repeat=2):
        for a, b in product(matrix.DECODER_FACTORS[one], matrix.DECODER_FACTORS[other]):
            if one < other:
                assert any((getattr(layer, one), getattr(layer, other)) == (a, b) for layer in layers), (
                    one,
                    a,
                    other,
                    b,
                )


def test_a_misspelt_name_and_the_older_choice_are_set_somewhere(cells):
    names = {name for cell in cells for name in cell.machine.switches}
    assert {matrix.MISSPELT, matrix.OLDER_CHOICE} <= names


def test_the_description_counts_the_cells(tree, cells):
    said = matrix.describe(cells)
    assert said["cells"] == len(cells) == sum(said["arch"].values())
    assert said["machines"] == len({cell.group for cell in cells})
    assert set(said["kind"]) == {"decoder", "encoder", "mla"}


def test_the_exhaustive_matrix_holds_far_more(tree, cells):
    every = matrix.exhaustive(tree)
    assert len(every) > 20 * len(cells)
    assert len({at(cell) for cell in every[:5000]}) == 5000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["release:0.11.0", "regressed", "release:0.32.0"])
def test_the_default_matrix_of_a_real_tree_stays_small(name):
    said = matrix.describe(matrix.default(trees.get(name)))
    assert 150 <= said["cells"] <= 260
    assert said["machines"] <= 75
