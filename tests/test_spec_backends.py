# SPDX-License-Identifier: Apache-2.0
"""Which backends are compared where, and what their table says of what was really used."""

import pytest

from aiterlab.policy import MAIN_SWITCH, Answer
from aiterlab.spec_decode import backends
from aiterlab.spec_decode.backends import Used

YES, NO = Answer(True, "installed"), Answer(False, "the library is not installed")


def test_every_platform_compares_the_suites_own_backend_but_a_cpu():
    assert [choice.label for choice in backends.candidates("cpu")] == ["CPU_ATTN"]
    assert backends.candidates("cpu")[0].backend is None
    cuda = backends.candidates("cuda", flash_attention=YES)
    assert [choice.backend for choice in cuda] == ["FLASH_ATTN", "TRITON_ATTN", "SUITE_PAGED"]
    assert "SUITE_PAGED" in [choice.backend for choice in backends.candidates("rocm", aiter=NO)]
    with pytest.raises(ValueError, match="not one of"):
        backends.candidates("tpu")


def test_aiter_is_asked_for_with_its_switch_in_every_position():
    rows = [choice for choice in backends.candidates("rocm", aiter=YES) if choice.backend == "ROCM_AITER_FA"]
    assert [dict(choice.environment).get(MAIN_SWITCH) for choice in rows] == [None, "0", "1", "1"]
    assert dict(rows[3].environment)["VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT"] == "1"
    assert len({choice.available for choice in rows}) == 1  # no switch decides what is available
    assert len({choice.label for choice in backends.candidates("rocm", aiter=YES)}) == 8


def test_without_the_library_only_aiters_rows_are_unavailable():
    choices = backends.candidates("rocm", aiter=NO)
    assert {choice.backend for choice in choices if not choice.available} == {
        "ROCM_AITER_FA",
        "ROCM_AITER_UNIFIED_ATTN",
    }
    row = backends.table(choices, {}).set_index("requested").loc["ROCM_AITER_FA, switch 1"]
    assert not row["available"]
    assert row["reason"] == NO.reason
    assert row["as_requested"] is None
    assert row["environment"] == f"{MAIN_SWITCH}=1"


def test_table_tells_a_draft_that_went_its_own_way():
    choices = backends.candidates("cuda", flash_attention=YES)
    flash, triton, _ = (choice.expected_class for choice in choices)
    used = {
        "FLASH_ATTN": Used((flash,), (flash,), True),
        "TRITON_ATTN": Used((triton,), (flash,), True),
        "SUITE_PAGED": Used(failure="ended with status 1"),
    }
    rows = backends.table(choices, used).set_index("requested")
    assert rows["as_requested"].tolist() == [True, False, None]
    assert rows.loc["TRITON_ATTN", "draft"] == flash
    assert rows.loc["SUITE_PAGED", "reason"] == "ended with status 1"
    assert rows["outputs_agree"].tolist() == [True, True, None]


def test_an_engine_without_a_draft_is_as_requested():
    choices = backends.candidates("cpu")
    rows = backends.table(choices, {"CPU_ATTN": Used(("CPUAttentionBackend",))})
    assert rows.loc[0, "as_requested"]
    assert rows.loc[0, "draft"] is None


def test_switches_that_would_leak_into_every_row_are_named():
    assert backends.inherited({MAIN_SWITCH: "1", "PATH": ""}) == [MAIN_SWITCH]
    assert backends.inherited({}) == []


def test_this_machine_has_at_least_one_backend():
    assert any(choice.available for choice in backends.here())


@pytest.mark.slow
def test_class_names_are_vllms(run_python):
    """A renamed class in vLLM would make every row look wrong."""
    output = run_python(
        """
        from importlib import import_module
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
        from aiterlab.spec_decode import backends
        names = [name for name in backends.CLASSES if name in AttentionBackendEnum.__members__]
        classes = [AttentionBackendEnum[name].value.rsplit(".", 1)[1] for name in names]
        print(classes == [backends.CLASSES[name] for name in names], len(names))
        print(AttentionBackendEnum.CPU_ATTN.value.rsplit(".", 1)[1] == backends.CLASSES[None])
        """
    )
    assert output.split()[-3:] == ["True", "5", "True"], output
