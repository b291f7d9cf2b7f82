# SPDX-License-Identifier: Apache-2.0
"""The regression and its fix, asked of vLLM's and AITER's real code: one cell per process, each asked once for all."""

import json
import shutil

import pytest

from aiterlab import paths, trees
from aiterlab.machines import Machine
from aiterlab.machines.description import with_switch
from aiterlab.probes import EXPLICIT, TRAP, Cell, ask, cells, comparisons, findings, tables

pytestmark = pytest.mark.slow

SOUND = ("release:0.15.1", "hotfixed", "release:0.16.0", "release:0.32.0")
POSITIONS = ("unset", "0", "1")
BACKEND_FILE = "vllm/v1/attention/backends/rocm_aiter_fa.py"
MESSAGE = "'builtin_function_or_method' object has no attribute 'flash_attn_varlen_func'"
UNREGISTERED = "'_OpNamespace' 'aiter' object has no attribute 'paged_attention_v1'"
PARTS = {  # the facts that change when one part of the fix is left out, and to what
    1: {"available": False, "ops_registered": False},
    2: {"verdict": "builtin trap", "prefill": "error", "extend": "error"},
    3: {"verdict": "broken", "decode": "error"},
    4: {"shuffle_kv_cache_enabled": False},
    5: {"fp8_names": "_FP8_DTYPE, AITER_FP8_DTYPE"},
    6: {"fa_utils_exports": "flash_attn_varlen_func", "varlen_func_available": False},
    7: {"eagle_allows_aiter": False},
}
FACTS = ["verdict", "available", "enabled", "backend", *cells.STEPS, "gather_then_attend", "eagle_allows_aiter"]
FACTS += ["fa_utils_exports", "varlen_func_available", "vit_auto", "vit_explicit", "shuffle_kv_cache_enabled"]
FACTS += ["fp8_dtype", "ops_registered"]


@pytest.fixture(scope="session")
def renamed_regressed(tmp_path_factory):
    """The regressed source as a checkout that nothing but its code tells apart: another place, another version."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(trees.get("regressed").source, folder / "vllm")
    (folder / "vllm" / "_version.py").write_text("__version__ = version = '99.0.0'\n__version_tuple__ = (99, 0, 0)\n")
    yield f"path:{folder}"
    for left in (trees.get(f"path:{folder}").folder, paths.cache_dir() / "pycache" / folder.relative_to("/")):
        shutil.rmtree(left, ignore_errors=True)


def make(tree, switch="unset", selection=EXPLICIT, *, shuffled=False, present=True) -> Cell:
    switches = {cells.SHUFFLE_SWITCH: "1"} if shuffled else {}
    machine = with_switch(Machine(arch="gfx942", aiter=present, switches=switches), switch)
    return Cell(trees.get(tree), machine, None if selection == "auto" else selection)


def place(row: dict) -> tuple:
    return row["tree"], row["switch"], row["selection"], cells.SHUFFLE_SWITCH in row["switches"], row["aiter"]


@pytest.fixture(scope="session")
def rows(tmp_path_factory, renamed_regressed):
    """Every answer that this file looks at, by its place."""
    asked = [make(tree, switch) for tree in ("regressed", *SOUND) for switch in POSITIONS]
    asked += [make(tree, switch, "auto") for tree in ("hotfixed", "release:0.16.0") for switch in POSITIONS]
    asked += [make(tree, "unset", "auto") for tree in ("release:0.15.1", "regressed")]
    asked += [make(f"hotfixed-without-{part}", shuffled=part == 4) for part in PARTS]
    asked += [make(tree, shuffled=True) for tree in ("hotfixed", "release:0.16.0")]
    asked += [make("regressed", "unset", selection, present=False) for selection in ("auto", EXPLICIT)]
    asked += [make("hotfixed:release:0.16.0"), make(renamed_regressed)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path_factory.mktemp("run")))
        return {place(row): row for row in ask(asked)}


@pytest.fixture
def at(rows):
    def find(tree, switch="unset", selection=EXPLICIT, *, shuffled=False, aiter="present") -> dict:
        return rows[tree, switch, selection, shuffled, aiter]

    return find


def steps(row: dict) -> dict:
    return row["facts"]["selection"]["drive"]


def imported_by(row: dict) -> list[str]:
    return [entry["importer"] for entry in row["facts"]["aiter_imports"]]


def test_every_cell_answers_every_question(rows):
    for where, row in rows.items():
        assert row["no_answer_reason"] is None, where
        for question in ("platform", "policy", "vit", "selection", "eagle", "fa_utils"):
            assert row["facts"][question]["outcome"] == "ok", (where, question, row["facts"][question])
        assert row["facts"]["platform"]["is_rocm"]
        assert row["facts"]["platform"]["platform_class"] == "vllm.platforms.rocm.RocmPlatform"


@pytest.mark.parametrize("switch", ["unset", "0"])
@pytest.mark.parametrize("step", ["prefill", "extend"])
def test_regressed_and_asked_for_by_name_meets_the_builtin(at, switch, step):
    row = at("regressed", switch)
    met = steps(row)[step]
    assert (row["verdict"], row["facts"]["selection"]["backend"]) == ("builtin trap", EXPLICIT)
    assert (met["type"], met["message"]) == ("AttributeError", MESSAGE)
    assert MESSAGE.startswith(TRAP)
    assert met["raised_at"]["file"] == BACKEND_FILE
    assert "aiter.flash_attn_varlen_func(" in met["raised_at"]["source"]


@pytest.mark.parametrize("switch", ["unset", "0"])
def test_the_first_decode_step_of_regressed_lacks_the_operator(at, switch):
    decode = steps(at("regressed", switch))["decode"]
    assert (decode["type"], decode["message"]) == ("AttributeError", UNREGISTERED)
    assert decode["raised_at"]["file"] == BACKEND_FILE
    assert not [name for name in at("regressed", switch)["facts"]["stand_ins"] if "paged_attention_v1" in name]


def test_the_switch_hides_the_regression(at):
    row = at("regressed", "1")
    assert (row["verdict"], row["facts"]["policy"]["available"]) == ("works", True)


def test_the_other_faults_of_the_regressed_tree(at):
    facts = at("regressed")["facts"]
    assert not facts["policy"]["available"] and not facts["eagle"]["allows_aiter"]
    assert [name for name, there in facts["fa_utils"]["exports"].items() if there] == ["flash_attn_varlen_func"]


@pytest.mark.parametrize("switch", POSITIONS)
@pytest.mark.parametrize("tree", SOUND)
def test_a_sound_tree_works_whatever_the_switch(at, tree, switch):
    verdict, facts = at(tree, switch)["verdict"], at(tree, switch)["facts"]
    assert (verdict, facts["eagle"]["allows_aiter"]) == ("works", True)
    assert (facts["policy"]["available"], facts["policy"]["enabled"]) == (True, switch == "1")


def test_every_number_is_within_a_small_tolerance_and_no_number_is_free(rows):
    checked = 0
    for where, row in rows.items():
        for name, step in row["facts"]["selection"].get("drive", {}).items():
            assert step["outcome"] in ("ok", "error"), (where, name, step)
            if step["outcome"] == "ok":
                assert 0 < step["max_abs_error"] < step["tolerance"] < 0.02, (where, name)
                checked += 1
    assert checked > 80


def test_the_kernel_test_of_the_fix_holds_wherever_aiter_is_there(rows):
    found = {place(row): steps(row) for row in rows.values() if "drive" in row["facts"]["selection"]}
    assert len(found) > 25
    for where, driven in found.items():
        assert driven["gather_then_attend"]["outcome"] == ("error" if "absent" in where else "ok"), where


def test_who_imports_aiter_and_when(at):
    noisy = at("release:0.15.1", "unset", "auto")
    assert (imported_by(noisy)[0], noisy["facts"]["aiter_imports"][0]["first"]) == ("operator module", True)
    assert [entry["module"] for entry in noisy["facts"]["jit_modules"]] == ["module_aiter_enum"]
    assert noisy["aiter_log"], "the noise that the regression was to silence"
    for tree in ("regressed", "hotfixed", "release:0.16.0"):
        quiet = at(tree, "unset", "auto")
        assert (imported_by(quiet), quiet["facts"]["jit_modules"], quiet["aiter_log"]) == ([], [], [])
    for tree in ("hotfixed", "release:0.16.0"):
        assert imported_by(at(tree, "0", "auto")) == []
        assert set(imported_by(at(tree, "unset"))) == {"call"}
        moments = [(entry["first"], entry["step"]) for entry in at(tree)["facts"]["aiter_imports"]]
        assert moments == [(True, "decode"), (False, "prefill")]


@pytest.mark.parametrize("part", PARTS)
def test_each_part_left_out_is_missed_by_exactly_its_own_facts(at, part):
    whole, lacking = (at(tree, shuffled=part == 4) for tree in ("hotfixed", f"hotfixed-without-{part}"))
    status, left = whole["facts"]["policy"]["hotfix"], lacking["facts"]["policy"]["hotfix"]
    assert (status["applied"], status["failed"], status["refused"]) == (list(PARTS), [], None)
    assert left["applied"] == [number for number in PARTS if number != part]
    found = comparisons.differences(*(tables.frame([row]) for row in (whole, lacking)), [*FACTS, "fp8_names"])
    assert dict(zip(found["fact"], found["right"], strict=True)) == PARTS[part]
    messages = {step["message"] for step in steps(lacking).values() if step["outcome"] == "error"}
    assert messages == {2: {MESSAGE}, 3: {UNREGISTERED}}.get(part, set())


def test_the_shuffled_cache_is_really_used(at):
    for tree in ("hotfixed", "release:0.16.0"):
        shuffled, plain = at(tree, shuffled=True), at(tree)
        assert shuffled["verdict"] == "works"
        assert shuffled["facts"]["policy"]["shuffle_kv_cache_enabled"] is True
        assert any("pa_fwd_asm" in name for name in shuffled["facts"]["stand_ins"])
        assert not any("pa_fwd_asm" in name for name in plain["facts"]["stand_ins"])


def test_the_hotfix_equals_upstreams_fix(at):
    questions = [(s, c, False) for s in POSITIONS for c in ("auto", EXPLICIT)] + [("unset", EXPLICIT, True)]
    ours, theirs = (
        tables.frame([at(tree, switch, choice, shuffled=shuffled) for switch, choice, shuffled in questions])
        for tree in ("hotfixed", "release:0.16.0")
    )
    assert comparisons.differences(ours, theirs, FACTS).empty
    assert list(ours["backend"][ours["selection"] == "auto"]) == ["TRITON_ATTN", "TRITON_ATTN", EXPLICIT]


def test_the_hotfix_refuses_a_tree_without_the_regression_and_changes_nothing(at):
    refused, plain = at("hotfixed:release:0.16.0"), at("release:0.16.0")
    status = refused["facts"]["policy"]["hotfix"]
    assert status["applied"] == []
    assert "does not have the regression of vllm-project/vllm#32902" in status["refused"]
    assert status["refused"].endswith("unset AITERLAB_HOTFIX")
    assert comparisons.differences(
        *(tables.frame([row]) for row in (refused, plain)), [*FACTS, "fp8_names", "aiter_imported_at"]
    ).empty


def test_a_cell_without_aiter_sees_nothing_of_its_neighbours_imports(at):
    for selection in ("auto", EXPLICIT):
        row = at("regressed", "unset", selection, aiter="absent")
        assert (row["facts"]["jit_modules"], row["aiter_log"]) == ([], [])
    missing = steps(at("regressed", "unset", EXPLICIT, aiter="absent"))["gather_then_attend"]
    assert (missing["type"], missing["message"]) == ("ModuleNotFoundError", "No module named 'aiter'")


def without_times(facts):
    """Facts without durations, and the stand-ins in no order: what a server has loaded already is not loaded again."""
    if isinstance(facts, dict):
        told = {name: without_times(fact) for name, fact in facts.items() if name != "seconds"}
        return told | {name: sorted(told[name]) for name in told if name == "stand_ins"}
    return [without_times(fact) for fact in facts] if isinstance(facts, list) else facts


def test_neither_name_nor_version_nor_place_decides(at, renamed_regressed):
    assert without_times(at(renamed_regressed)["facts"]) == without_times(at("regressed")["facts"])


@pytest.mark.parametrize("tree", ["regressed", "hotfixed"])
def test_a_forked_cell_answers_like_a_new_interpreter(at, tree, run_python, tmp_path):
    code = """
    import json, os, sys
    from aiterlab.probes import child
    with open(sys.argv[2], "w") as answer:
        json.dump(child.answer(json.loads(sys.argv[1])), answer)
    os._exit(0)
    """
    run_python(code, json.dumps(make(tree).request()), str(tmp_path / "answer"), HF_HUB_OFFLINE="1")
    assert without_times(json.loads((tmp_path / "answer").read_text())) == without_times(at(tree)["facts"])


def test_the_sentence_of_the_report_follows(at):
    table = tables.frame([at(tree, switch) for tree in ("regressed", *SOUND) for switch in POSITIONS])
    assert findings.regression(table) == (
        "2 of 15 cells end in Python's builtin aiter, all of them in regressed; with AITER installed it takes an"
        " explicit choice of the backend and the switch at unset or 0; never in release:0.15.1, hotfixed,"
        " release:0.16.0 and release:0.32.0."
    )
