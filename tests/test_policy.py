# SPDX-License-Identifier: Apache-2.0
"""The rule: availability reads no switch, preference implies it, and an explicit choice needs nothing else."""

import ast
import inspect
import os
import re
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiterlab import policy, trees
from aiterlab.policy import FEATURES, MAIN_SWITCH, Answer, Candidate, Facts

TREE_OF_FEATURES = ("release:0.15.1", "release:0.16.0")
VALUES = st.sampled_from(["0", "1", "true", "True", "TRUE", "false", "yes", "on", "", " 1"])
NAMES = st.sampled_from([MAIN_SWITCH, *(feature.switch for feature in FEATURES.values()), "VLLM_USE_V1"])
SWITCHES = st.dictionaries(NAMES, VALUES)
FACTS = st.builds(Facts, st.booleans(), st.booleans(), st.sampled_from(["gfx942", "gfx1201"]), st.booleans())
USABLE = Facts(rocm=True, library=True, architecture="gfx942", architecture_supported=True)
YES, NO = Answer(True, "a reason for it"), Answer(False, "a reason against it")


class Untouchable(Mapping):
    """An environment that must not be looked at in any way."""

    def _raise(self, *args, **kwargs):
        raise AssertionError("the environment was read")

    __getitem__ = __iter__ = __len__ = __contains__ = get = keys = items = values = copy = _raise


def candidates_of(facts: Facts, switches: Mapping[str, str]) -> list[Candidate]:
    """AITER's candidates before one that is always there, as an engine would line them up."""
    aiter = [
        Candidate(name, policy.availability(facts), policy.preference(facts, switches, feature))
        for name, feature in (("ROCM_AITER_FA", "mha"), ("ROCM_AITER_UNIFIED_ATTN", "triton_unified_attn"))
    ]
    return [*aiter, Candidate("TRITON_ATTN", YES, YES)]


@given(FACTS, SWITCHES, SWITCHES, st.sampled_from(["ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN", "TRITON_ATTN"]))
def test_an_explicit_choice_never_depends_on_a_switch(facts, switches, others, explicit):
    chosen = policy.selection(candidates_of(facts, switches), explicit)
    assert chosen == policy.selection(candidates_of(facts, others), explicit)
    there = explicit == "TRITON_ATTN" or policy.availability(facts)
    assert (chosen.chosen, chosen.how) == ((explicit, "explicit") if there else (None, "refused"))


@given(FACTS, SWITCHES, st.sampled_from([None, *FEATURES]))
def test_preference_implies_availability(facts, switches, feature):
    if policy.preference(facts, switches, feature):
        assert policy.availability(facts)
    if not policy.availability(facts):
        assert policy.preference(facts, switches, feature) == policy.availability(facts)


@given(FACTS)
def test_availability_is_the_three_facts_and_names_the_one_that_fails(facts):
    answer = policy.availability(facts)
    assert answer.holds is (facts.rocm and facts.library and facts.architecture_supported)
    if not facts.rocm:
        assert "ROCm" in answer.reason
    elif not facts.library:
        assert "not installed" in answer.reason
    else:
        assert facts.architecture in answer.reason


@given(FACTS, SWITCHES)
def test_no_answer_reads_the_environment(facts, switches):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", Untouchable())
        patch.setattr(os, "getenv", Untouchable()._raise)
        policy.availability(facts)
        policy.preference(facts, switches, "mha")
        policy.selection(candidates_of(facts, switches))


def test_availability_cannot_be_given_a_switch():
    assert list(inspect.signature(policy.availability).parameters) == ["facts"]
    assert set(Facts.__dataclass_fields__) == {"rocm", "library", "architecture", "architecture_supported"}


def test_the_module_imports_nothing_that_could_look_around():
    tree = ast.parse(inspect.getsource(policy))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported <= {"__future__", "collections.abc", "dataclasses", "enum", "typing"}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"os", "sys", "torch", "open", "exec", "eval", "globals", "__import__", "importlib"}


@given(SWITCHES, st.sampled_from(sorted(FEATURES)))
def test_a_feature_follows_its_own_switch_and_the_main_one_where_it_needs_it(switches, name):
    feature = FEATURES[name]
    own = policy.is_on(switches, feature.switch, feature.default)
    main = policy.is_on(switches, MAIN_SWITCH)
    answer = policy.preference(USABLE, switches, name)
    assert answer.holds is (own and (main or name == "shuffle_kv_cache"))
    if not answer:
        assert answer.reason.split()[0] == (feature.switch if main or name == "shuffle_kv_cache" else MAIN_SWITCH)


def test_only_the_layout_of_the_kv_cache_ignores_the_main_switch():
    assert [name for name, feature in FEATURES.items() if not feature.needs_main_switch] == ["shuffle_kv_cache"]
    on = {FEATURES["shuffle_kv_cache"].switch: "1"}
    for position in ({}, {MAIN_SWITCH: "0"}, {MAIN_SWITCH: "1"}):
        assert policy.preference(USABLE, on | position, "shuffle_kv_cache")
        assert not policy.preference(USABLE, position, "shuffle_kv_cache")


def test_an_unknown_feature_is_an_error():
    with pytest.raises(KeyError):
        policy.preference(USABLE, {MAIN_SWITCH: "1"}, "no_such_feature")


@given(st.one_of(st.none(), st.text(max_size=5), VALUES), st.booleans())
def test_is_on_is_the_rule_of_vllm(value, default):
    environment = {} if value is None else {"A": value}
    # vllm/envs.py: lambda: os.getenv("A", "True").lower() in ("true", "1")
    expected = environment.get("A", str(default)).lower() in ("true", "1")
    assert policy.is_on(environment, "A", default) is expected


def truth_table_in_the_docstring() -> list[list[str]]:
    lines = policy.__doc__.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith("library ")) + 1
    table = []
    for line in lines[start:]:
        if not line.strip():
            return table
        table.append(re.split(r"\s{2,}", line.strip()))
    return table


def test_the_truth_table_in_the_docstring_is_what_the_functions_answer():
    rows = truth_table_in_the_docstring()
    assert [row[:2] for row in rows] == [["absent", "any"], ["installed", "off"], ["installed", "on"]]
    positions = {"any": [{}, {MAIN_SWITCH: "0"}, {MAIN_SWITCH: "1"}], "off": [{}, {MAIN_SWITCH: "0"}]}
    positions["on"] = [{MAIN_SWITCH: "1"}, {MAIN_SWITCH: "true"}]
    for library, switch, available, preferred, explicit, auto in rows:
        facts = Facts(True, library == "installed", "gfx942", True)
        for switches in positions[switch]:
            answers = policy.availability(facts), policy.preference(facts, switches)
            assert [bool(answer) for answer in answers] == [available == "yes", preferred == "yes"]
            lined_up = [Candidate("AITER", *answers), Candidate("another backend", YES, YES)]
            asked = policy.selection(lined_up, "AITER")
            assert (asked.chosen or "refused, with the reason") == explicit
            assert asked.reasons["AITER"]
            assert policy.selection(lined_up).chosen == auto


def test_preferred_without_being_available_is_a_contradiction():
    with pytest.raises(ValueError, match=r"AITER is preferred but not available: a reason against it"):
        Candidate("AITER", NO, YES)


@given(
    st.lists(st.sampled_from([(YES, YES), (YES, NO), (NO, NO)]), min_size=1, max_size=4),
    st.one_of(st.none(), st.integers(0, 3)),
)
def test_a_selection_has_a_reason_for_every_candidate(answers, asked):
    lined_up = [Candidate(f"c{i}", *both) for i, both in enumerate(answers)]
    explicit = None if asked is None else f"c{min(asked, len(answers) - 1)}"
    result = policy.selection(lined_up, explicit)
    assert set(result.reasons) == {candidate.name for candidate in lined_up}
    assert all(result.reasons.values())
    if explicit is None:
        preferred = [candidate.name for candidate in lined_up if candidate.preferred]
        assert (result.chosen, result.how) == ((preferred[0], "preferred") if preferred else (None, "refused"))


def test_an_explicit_choice_that_is_not_available_is_never_replaced():
    result = policy.selection([Candidate("AITER", NO, NO), Candidate("other", YES, YES)], "AITER")
    assert (result.chosen, result.how, result.reasons["AITER"]) == (None, "refused", "a reason against it")


def test_an_explicit_choice_that_is_no_candidate_is_an_error():
    with pytest.raises(KeyError, match="FLASHINFER"):
        policy.selection([Candidate("AITER", YES, YES)], "FLASHINFER")


@pytest.mark.slow
@pytest.mark.parametrize("tree", TREE_OF_FEATURES)
def test_every_feature_has_the_switch_and_the_default_of_the_release(tree):
    package = trees.get(tree).source
    envs, operators = ((package / name).read_text() for name in ("envs.py", "_aiter_ops.py"))
    for feature in (*FEATURES.values(), policy.Feature("aiter", MAIN_SWITCH, False)):
        read = re.search(rf'os\.getenv\(\s*"{feature.switch}", "(\w+)"\s*\)\.lower\(\)\s*in \("true", "1"\)', envs)
        assert read, f"{feature.switch} is not read in {tree} as is_on reads it"
        assert (read[1].lower() in ("true", "1")) is feature.default, feature.switch
    methods = {
        node.name.removeprefix("is_").removesuffix("_enabled"): ast.unparse(node)
        for node in ast.walk(ast.parse(operators))
        if isinstance(node, ast.FunctionDef) and re.fullmatch(r"is_\w+_enabled", node.name)
    }
    assert set(FEATURES) <= set(methods)
    flags = dict(re.findall(r"(\w+) = envs\.(VLLM_\w+)", operators))
    for feature in FEATURES.values():
        read = {flags[name] for name in re.findall(r"cls\.(\w+)", methods[feature.name]) if name in flags}
        assert feature.switch in read, f"is_{feature.name}_enabled of {tree} reads {read}"
