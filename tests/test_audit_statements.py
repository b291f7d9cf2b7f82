# SPDX-License-Identifier: Apache-2.0
"""The statements on synthetic answers: each holds, breaks, does not apply or stays unknown for the right reason."""

import pytest
from audit_rows import answers, asserted, crashed, imported, picked, refused, row, unanswered

from aiterlab.audit import statements
from aiterlab.audit.judgement import by_sentence
from aiterlab.probes.layer import Layer

FA, UNIFIED, ROCM, TRITON = "ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN", "ROCM_ATTN", "TRITON_ATTN"
UNIFIED_SWITCH = "VLLM_ROCM_USE_AITER_UNIFIED_ATTENTION"
MHA_SWITCH = "VLLM_ROCM_USE_AITER_MHA"


def judged(name: str, *rows: dict):
    """The judgement of one statement on rows of one tree."""
    (found,) = [judgement for judgement in statements.judge(rows) if judgement.statement.name == name]
    return found


def test_every_statement_has_a_sentence_a_source_and_a_mend():
    names = [statement.name for statement in statements.STATEMENTS]
    assert len(set(names)) == len(names) == 11
    for statement in statements.STATEMENTS:
        assert statement.sentence.endswith(".")
        assert statement.source and statement.mend and statement.without
        assert not statement.mend.endswith(".")


def test_rows_of_several_trees_are_judged_each_for_itself_in_their_order():
    rows = [row(picked(FA), FA, tree="b"), row(picked(TRITON), FA, tree="a")]
    found = {j.tree: j for j in statements.judge(rows) if j.statement.name == "explicit choice"}
    assert list(found) == ["b", "a"]
    assert (found["b"].verdict, found["a"].verdict) == ("holds", "broken")


EXPLICIT = [
    (row(picked(FA), FA), "holds"),
    (row(refused("Selected backend X is not valid"), FA), "holds"),
    (row(asserted("Block size must be 1"), FA), "holds"),
    (row(picked(TRITON), FA), "broken"),
    (row(crashed("AttributeError", "no such field"), FA), "broken"),
    (row(crashed("ModuleNotFoundError", "No module named 'aiter'"), FA), "broken"),
    (row(crashed("ModuleNotFoundError", "No module named 'aiter'"), FA, aiter="absent"), "holds"),
    (row(picked(TRITON)), "not applicable"),
    (row(unanswered("timed out"), FA), "unknown"),
]


@pytest.mark.parametrize(("answer", "verdict"), EXPLICIT)
def test_an_explicit_choice_wins_or_is_refused(answer, verdict):
    assert judged("explicit choice", answer).verdict == verdict


def test_an_alias_is_no_replacement_and_a_dropped_choice_is_said_to_be_one():
    alias = row(picked(TRITON, backend_names=[TRITON, "TRITON_ATTN_VLLM_V1"]), "TRITON_ATTN_VLLM_V1")
    assert judged("explicit choice", alias).verdict == "holds"
    dropped = judged("explicit choice", row(picked(ROCM, requested=None, asked_with={}), "CUTLASS_MSA"))
    assert dropped.violations[0].what == (
        "CUTLASS_MSA is asked for and ROCM_ATTN is used, because the configuration dropped the choice"
    )


def test_a_choice_that_aiter_itself_cannot_serve_counts_as_made():
    unfit = crashed("RuntimeError", "Unknown GPU architecture: gfx1201", raised_in="aiter", chose=UNIFIED)
    assert judged("explicit choice", row(unfit, UNIFIED, arch="gfx1201")).verdict == "holds"
    assert judged("explicit choice", row(unfit, FA, arch="gfx1201")).verdict == "broken"
    nowhere = crashed("RuntimeError", "Unknown GPU architecture: gfx1201", raised_in="aiter")
    assert judged("explicit choice", row(nowhere, UNIFIED, arch="gfx1201")).verdict == "unknown"


def test_a_library_that_wants_a_real_gpu_gives_no_answer():
    wants = {"raised_in": "torch", "message": "Torch not compiled with CUDA enabled"}
    told = judged("explicit choice", row(crashed("AssertionError", **wants), "CUTLASS_MLA"))
    assert told.verdict == "unknown"
    assert "torch cannot answer on this machine: AssertionError: Torch not compiled" in told.reason
    later = crashed("AssertionError", **wants, chose="CUTLASS_MLA")
    assert judged("explicit choice", row(later, "CUTLASS_MLA")).verdict == "holds"


def test_an_accident_before_the_platform_was_asked_is_no_answer():
    accident = crashed("AttributeError", "no operator", asked_with=None, requested=None)
    assert judged("explicit choice", row(accident, FA)).verdict == "unknown"
    meant = refused("not a draft's backend", asked_with=None, requested=None)
    assert judged("explicit choice", row(meant, FA)).verdict == "holds"


def with_switches(answer, selection="auto", **said):
    """The same cell with the main switch in each position; `answer` may depend on the position."""
    return [row(answer(switch), selection, switch=switch, **said) for switch in ("unset", "0", "1")]


def test_availability_that_follows_the_switch_is_broken_and_a_steady_one_holds():
    steady = with_switches(lambda switch: picked(TRITON, available=True))
    assert judged("availability", *steady).verdict == "holds"
    moving = judged("availability", *with_switches(lambda switch: picked(TRITON, available=switch == "1")))
    assert moving.verdict == "broken"
    (violation,) = moving.violations
    assert violation.what == (
        "AITER is available with VLLM_ROCM_USE_AITER 1 but not available with VLLM_ROCM_USE_AITER unset or 0"
    )
    assert violation.command == "python -m aiterlab audit --tree t --arch gfx942 --aiter present --switch unset,1" + (
        " --explicit auto"
    )


def test_a_refusal_that_follows_the_switch_is_broken_and_a_replacement_is_another_matter():
    moving = with_switches(lambda switch: picked(FA) if switch == "1" else refused("not enabled"), FA)
    (violation,) = judged("availability", *moving).violations
    assert violation.what == (
        "the explicit choice of ROCM_AITER_FA is accepted with VLLM_ROCM_USE_AITER 1"
        " but refused with VLLM_ROCM_USE_AITER unset or 0"
    )
    failing = with_switches(lambda switch: picked(FA) if switch == "1" else crashed("NameError", "aiter"), FA)
    assert "met by an error with VLLM_ROCM_USE_AITER unset or 0" in judged("availability", *failing).violations[0].what
    replaced = with_switches(lambda switch: picked(FA), TRITON)
    assert judged("availability", *replaced).verdict == "holds"


def test_availability_is_judged_once_a_machine_whatever_was_asked_there():
    explicit = with_switches(lambda switch: picked(FA, available=switch == "1"), FA)
    (violation,) = judged("availability", *explicit).violations
    assert violation.what.startswith("AITER is available with VLLM_ROCM_USE_AITER 1 but")
    auto = with_switches(lambda switch: picked(TRITON, available=switch == "1"))
    told = judged("availability", *explicit, *auto)
    assert (told.cases, len(told.violations)) == (2, 1)
    assert told.violations[0].rows[0]["selection"] == "auto"


def test_availability_needs_a_contrast():
    assert judged("availability", row(picked(FA), FA)).verdict == "not applicable"
    assert judged("availability", *with_switches(lambda switch: picked(TRITON, available=None))).verdict == (
        "not applicable"
    )


OFF = [
    (row(picked(TRITON)), "holds"),
    (row(picked(TRITON), switch="0"), "holds"),
    (row(picked(UNIFIED), switch="0"), "broken"),
    (row(imported(TRITON, "operator module")), "broken"),
    (row(imported(TRITON, "operator module"), TRITON), "broken"),
    (row(picked(TRITON), TRITON), "holds"),
    (row(imported(FA, "backend module"), FA), "not applicable"),
    (row(imported(FA, "backend module"), switch="1"), "not applicable"),
    (row(picked(TRITON), aiter="absent"), "not applicable"),
    (row(imported(FA, "backend module"), others={"VLLM_ATTENTION_BACKEND": FA}), "not applicable"),
]


def test_who_imports_aiter_is_said_by_its_line():
    told = judged("switch off", row(imported(TRITON, "operator module")))
    assert told.violations[0].what == "vllm/a.py:3 imports AITER although the switch is off"


@pytest.mark.parametrize(("answer", "verdict"), OFF)
def test_with_the_switch_off_nothing_of_aiter_is_touched(answer, verdict):
    assert judged("switch off", answer).verdict == verdict


def test_a_tree_whose_switch_is_on_by_default_is_off_at_zero_only():
    rows = [row(imported(FA, "backend module", enabled=True)), row(picked(TRITON), switch="0")]
    assert judged("switch off", *rows).verdict == "holds"


DEFAULT = [
    ([row(picked(FA), switch="1")], "holds"),
    ([row(picked(FA), switch="1"), row(refused("not in the list"), FA, switch="1")], "holds"),
    ([row(picked(ROCM), switch="1")], "broken"),
    ([row(refused("No valid attention backend found"), switch="1")], "not applicable"),
    ([row(refused("No valid attention backend found"), switch="1"), row(picked(FA), FA, switch="1")], "broken"),
    ([row(picked(ROCM), switch="1", layer=Layer(head_size=72))], "not applicable"),
    ([row(picked(ROCM), switch="1"), row(refused("head size"), FA, switch="1")], "not applicable"),
    ([row(picked(ROCM), switch="1", arch="gfx90a")], "not applicable"),
    ([row(picked(ROCM), switch="1", others={MHA_SWITCH: "0"})], "not applicable"),
    ([row(picked(ROCM), switch="1", layer=Layer(role="draft"))], "not applicable"),
    ([row(picked(ROCM))], "not applicable"),
    ([row(picked("TRITON_MLA"), switch="1", layer=Layer(kind="mla"))], "broken"),
    ([row(picked("ROCM_AITER_TRITON_MLA"), switch="1", layer=Layer(kind="mla"))], "holds"),
    ([row(picked("ROCM_ATTN"), switch="1", layer=Layer(kind="encoder"))], "not applicable"),
]


@pytest.mark.parametrize(("rows", "verdict"), DEFAULT)
def test_the_documented_default_is_chosen_where_it_can_be(rows, verdict):
    assert judged("documented default", *rows).verdict == verdict


def test_on_an_unusual_layer_the_accepted_choice_is_part_of_the_evidence():
    layer = Layer(head_size=128)
    rows = [row(picked(ROCM), switch="1", layer=layer), row(picked(FA), FA, switch="1", layer=layer)]
    (violation,) = judged("documented default", *rows).violations
    assert violation.what == "auto-selection takes ROCM_ATTN, not ROCM_AITER_FA, although the switch is on"
    assert violation.command.endswith("--switch 1 --explicit auto,ROCM_AITER_FA --head-size 128")


def sub(answer, **switches):
    return row(answer, switch="1", others=switches)


def test_a_sub_switch_that_is_off_keeps_its_backend_out():
    ignored = judged("sub-switches", sub(picked(UNIFIED, available=True), **{UNIFIED_SWITCH: "0"}))
    assert ignored.verdict == "broken"
    assert ignored.violations[0].command.endswith(f"--switch 1 --explicit auto --set {UNIFIED_SWITCH}=0")
    assert judged("sub-switches", sub(picked(ROCM), **{UNIFIED_SWITCH: "0"})).verdict == "holds"


def test_a_sub_switch_that_is_on_brings_its_backend_in():
    alone = {UNIFIED_SWITCH: "1", MHA_SWITCH: "0"}
    told = judged("sub-switches", sub(picked(ROCM, available=True), **alone))
    assert [violation.what for violation in told.violations] == [
        f"auto-selection takes ROCM_ATTN although {UNIFIED_SWITCH} is 1"
    ]
    assert judged("sub-switches", sub(picked(UNIFIED, available=True), **alone)).verdict == "holds"
    assert judged("sub-switches", sub(picked(FA, available=True), **alone)).verdict == "broken"


def test_another_sub_switch_that_is_not_off_may_come_first():
    assert judged("sub-switches", sub(picked(FA, available=True), **{UNIFIED_SWITCH: "1"})).verdict == "holds"
    assert judged("sub-switches", sub(picked(ROCM, available=True), **{UNIFIED_SWITCH: "1"})).verdict == "broken"


def test_a_sub_switch_cannot_bring_in_what_is_refused_or_not_supported():
    asked = sub(picked(ROCM, available=True), **{UNIFIED_SWITCH: "1"})
    assert judged("sub-switches", asked, row(refused("head size"), UNIFIED, switch="1")).verdict == "not applicable"
    unsupported = sub(picked(ROCM, available=False), **{UNIFIED_SWITCH: "1"})
    assert judged("sub-switches", unsupported).verdict == "not applicable"
    other_kind = row(picked("TRITON_MLA"), switch="1", layer=Layer(kind="mla"), others={UNIFIED_SWITCH: "1"})
    assert judged("sub-switches", other_kind).verdict == "not applicable"


def on(arch, answer, explicit=UNIFIED, **said):
    return row(answer, explicit, arch=arch, switch="1", **said)


def test_an_unsupported_architecture_is_refused():
    good = on("gfx942", picked(UNIFIED, available=True))
    accepted = on("gfx90a", picked(UNIFIED, available=False))
    told = judged("architecture", good, accepted)
    assert told.verdict == "broken"
    assert "accepted on a GPU that this tree does not count as supported" in told.violations[0].what
    assert judged("architecture", good, on("gfx90a", refused("capability", available=False))).verdict == "holds"
    fell = judged("architecture", good, on("gfx90a", crashed("RuntimeError", "no kernel", available=False)))
    assert "met by RuntimeError: no kernel" in fell.violations[0].what
    assert judged("architecture", good).verdict == "not applicable"


def test_the_twin_for_rdna4_promises_no_more_than_it_says():
    twin = picked("TRITON_MLA", available=False, available_by={"is_aiter_found_and_supported_on_rdna4": True})
    asked = {"arch": "gfx1201", "switch": "1", "others": {"VLLM_ROCM_USE_AITER_MLA": "1"}}
    assert judged("sub-switches", row(twin, layer=Layer(kind="mla"), **asked)).verdict == "not applicable"


def test_the_twin_for_rdna4_counts_and_a_switch_that_hides_support_does_not():
    twin = picked(UNIFIED, available=False, available_by={"is_aiter_found_and_supported_on_rdna4": True})
    assert judged("architecture", on("gfx1201", twin)).verdict == "not applicable"
    regressed = with_switches(lambda switch: picked(FA, available=switch == "1"), FA)
    assert judged("architecture", *regressed).verdict == "not applicable"
    assert judged("architecture", *regressed[:2]).verdict == "not applicable"


def test_without_a_function_for_availability_what_the_switch_turns_on_counts():
    asked = row(picked(UNIFIED, available=None, enabled=False), UNIFIED, switch="1", arch="gfx1100")
    assert judged("architecture", asked).verdict == "broken"
    asked = row(picked(UNIFIED, available=None, enabled=True), UNIFIED, switch="1", arch="gfx942")
    assert judged("architecture", asked).verdict == "not applicable"


def test_a_missing_library_is_refused_or_fails_at_once():
    assert judged("missing library", row(picked(FA), FA, aiter="absent")).verdict == "broken"
    fails = crashed("ModuleNotFoundError", "No module named 'aiter'")
    assert judged("missing library", row(fails, FA, aiter="absent")).verdict == "holds"
    assert judged("missing library", row(refused("not installed"), FA, aiter="absent")).verdict == "holds"
    assert judged("missing library", row(picked(TRITON), TRITON, aiter="absent")).verdict == "not applicable"


def test_auto_selection_takes_only_what_is_available():
    absent = {"aiter": "absent", "switch": "1"}
    assert judged("only what is available", row(picked(FA), **absent)).verdict == "broken"
    fails = crashed("ModuleNotFoundError", "No module named 'aiter'")
    assert judged("only what is available", row(fails, **absent)).verdict == "broken"
    assert judged("only what is available", row(picked(ROCM), **absent)).verdict == "holds"
    unsupported = row(picked(UNIFIED, available=False), switch="1", arch="gfx1100")
    assert judged("only what is available", unsupported).verdict == "broken"
    assert judged("only what is available", row(picked(FA, available=True), switch="1")).verdict == "not applicable"


def test_draft_and_target_are_resolved_alike():
    def pair(target, draft, explicit):
        return [row(target, explicit), row(draft, explicit, layer=Layer(role="draft"))]

    assert judged("draft and target", *pair(picked(FA), picked(FA), FA)).verdict == "holds"
    assert judged("draft and target", *pair(refused("no"), refused("no"), FA)).verdict == "holds"
    told = judged("draft and target", *pair(picked(FA), picked(TRITON), FA))
    assert told.violations[0].what == (
        "asked for ROCM_AITER_FA, the target's layer gets ROCM_AITER_FA and the draft's TRITON_ATTN"
    )
    assert told.violations[0].command.endswith("--explicit ROCM_AITER_FA --role target,draft")
    assert judged("draft and target", row(picked(FA), FA)).verdict == "not applicable"


def test_a_draft_that_has_a_choice_of_its_own_does_not_inherit_the_targets():
    def drafts(inherited, through="speculative_config.attention_backend"):
        asked = picked(FA, asked_through=through) | {"target_choice": {"outcome": "ok", "backend": inherited}}
        return [
            row(answer, choice, layer=Layer(role="draft")) for answer, choice in ((asked, FA), (picked(ROCM), "auto"))
        ]

    assert judged("draft and target", *drafts(ROCM)).verdict == "holds"
    (violation,) = judged("draft and target", *drafts(FA)).violations
    assert violation.what == ("ROCM_AITER_FA is asked for the target alone, and the draft gets ROCM_AITER_FA too")
    assert violation.command.endswith("--explicit auto,ROCM_AITER_FA --role draft")
    assert judged("draft and target", *drafts(FA, "attention_config.backend")).verdict == "not applicable"


def named(value, answer, **environment):
    facts = answer | {"environment": {"unknown": [], "warned": False, "raised": None} | environment}
    return row(facts, others={"VLLM_ATTENTION_BACKEND": value})


def test_an_unknown_or_ignored_name_is_an_error():
    unknown = {"unknown": ["VLLM_ATTENTION_BACKEND"]}
    told = judged("unknown names", named(FA, picked(ROCM), **unknown, warned=True, raised="Unknown …"))
    assert told.violations[0].what == (
        "VLLM_ATTENTION_BACKEND, which this tree does not know, is answered by a warning;"
        " only an option makes it an error"
    )
    assert "without a word" in judged("unknown names", named(FA, picked(ROCM), **unknown)).violations[0].what
    stopped = crashed("ValueError", "Unknown vLLM environment variable detected: VLLM_ATTENTION_BACKEND")
    assert judged("unknown names", named(FA, stopped, **unknown)).verdict == "holds"
    assert "known and ignored" in judged("unknown names", named(FA, picked(ROCM))).violations[0].what
    assert judged("unknown names", named(FA, picked(FA))).verdict == "holds"
    assert judged("unknown names", row(picked(ROCM))).verdict == "not applicable"


OWN = "vllm.v1.attention.backends.rocm_aiter_fa"


def lost(name: str, module: str = OWN, builtin: bool = False, kept_off: str | None = None) -> dict:
    """A name that functions of the chosen backend use and nothing has bound."""
    at = {"file": "vllm/fa.py", "line": 8}
    return {"name": name, "module": module, "builtin": builtin, "kept_off": kept_off} | at


def fa(*unbound: dict) -> dict:
    return picked(FA, unbound=list(unbound), backend_class=f"{OWN}.AiterFlashAttentionBackend")


def test_a_name_that_nothing_binds_is_told_with_what_takes_its_place():
    trapped = row(fa(lost("aiter", builtin=True), lost("rocm_aiter")), FA)
    assert [violation.what for violation in judged("bound names", trapped).violations] == [
        "vllm/fa.py:8 uses `aiter`, which is not bound: Python's builtin aiter stands in for it",
        "vllm/fa.py:8 uses `rocm_aiter`, which is not bound: a NameError waits",
    ]
    assert judged("bound names", row(fa(), FA)).verdict == "holds"
    assert judged("bound names", row(fa(lost("aiter", builtin=True)), FA, aiter="absent")).verdict == "not applicable"
    assert judged("bound names", row(refused("no"), FA)).verdict == "not applicable"


def test_a_name_of_a_shared_module_counts_only_if_a_builtin_hides_it():
    shared = "vllm.v1.attention.backends.mla.common"
    assert judged("bound names", row(fa(lost("flashinfer", shared)), FA)).verdict == "holds"
    assert judged("bound names", row(fa(lost("aiter", shared, builtin=True)), FA)).verdict == "broken"
    assert judged("bound names", row(fa(lost("aiter", builtin=True, kept_off="not called")), FA)).verdict == "holds"


def test_the_verdict_says_what_it_rests_on():
    rows = [row(picked(FA), FA), row(unanswered("timed out"), TRITON)]
    assert judged("explicit choice", *rows).reason == "1 case; no answer from 1 of 2 cells: timed out"
    rows = [row(picked(ROCM), FA, arch=arch) for arch in ("gfx942", "gfx950")] + [row(picked(TRITON), TRITON)]
    told = judged("explicit choice", *rows)
    assert told.reason == "1 finding in 2 of 3 cases"
    assert list(map(len, by_sentence(told.violations).values())) == [2]
    assert {j.verdict for j in statements.unprobed("release:9", "no such release")} == {"unknown"}


def test_the_record_is_plain_and_small():
    rows = [row(picked(ROCM), FA, arch=arch) for arch in ("gfx950", "gfx942")]
    record = judged("explicit choice", *rows).record()
    assert record["verdict"] == "broken"
    (finding,) = record["findings"]
    assert finding["violations"] == 2
    assert finding["where"].startswith("on gfx950 and gfx942; AITER present;")
    assert "--arch gfx942" in finding["command"]


def test_a_tree_that_answers_nothing_is_unknown_everywhere():
    rows = [row(unanswered("the probe ended without an answer"), selection) for selection in ("auto", FA)]
    assert {judgement.verdict for judgement in statements.judge(rows)} == {"unknown"}
    assert answers(rows) == 0
