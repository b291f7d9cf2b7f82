# SPDX-License-Identifier: Apache-2.0
"""Switches and backends as a tree's source states them: on a tree of a few lines, and on real releases."""

import hashlib
from pathlib import Path

import pytest

from aiterlab import trees
from aiterlab.audit import backends, switches
from aiterlab.policy import MAIN_SWITCH
from aiterlab.trees import Tree

SOURCES = {
    "envs.py": """
        from typing import TYPE_CHECKING, Literal
        if TYPE_CHECKING:
            VLLM_ROCM_USE_AITER: bool = False
            VLLM_ROCM_USE_AITER_MHA: bool = True
            VLLM_ROCM_USE_AITER_LINEAR: bool = True
            VLLM_ROCM_USE_AITER_GONE: bool = False
            VLLM_ROCM_USE_AITER_MODE: Literal["a", "b"] = "a"
            VLLM_ROCM_LAYOUT: bool = False
            VLLM_ROCM_PADDING: bool = True
            VLLM_PREFILL_DECODE: bool = False
            VLLM_PORT: int | None = None
        environment_variables = {}
        """,
    "_aiter_ops.py": """
        import vllm.envs as envs
        class rocm_aiter_ops:
            _ON = envs.VLLM_ROCM_USE_AITER
            _MHA = envs.VLLM_ROCM_USE_AITER_MHA
            _GONE = envs.VLLM_ROCM_USE_AITER_GONE
            @classmethod
            def refresh_env_variables(cls):
                cls._GONE = envs.VLLM_ROCM_USE_AITER_GONE
            @classmethod
            def is_enabled(cls):
                return cls._ON
            @classmethod
            def is_mha_enabled(cls):
                return cls.is_enabled() and cls._MHA
            @classmethod
            def is_gone_enabled(cls):
                return cls._GONE
            @classmethod
            def is_linear_enabled(cls):
                return envs.VLLM_ROCM_USE_AITER_LINEAR
        """,
    "platforms/rocm.py": """
        import vllm.envs as envs
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
        def _priorities():
            from vllm._aiter_ops import rocm_aiter_ops
            if rocm_aiter_ops.is_mha_enabled():
                return [AttentionBackendEnum.ROCM_AITER_FA]
            return [AttentionBackendEnum.TRITON_ATTN]
        def _elsewhere():
            return AttentionBackendEnum.FLASH_ATTN
        class RocmPlatform:
            @classmethod
            def get_attn_backend_cls(cls, selected_backend):
                if envs.VLLM_PREFILL_DECODE:
                    return "vllm.v1.attention.backends.rocm_attn.RocmAttentionBackend"
                return _priorities()
        """,
    "v1/attention/backends/registry.py": """
        from enum import Enum
        class AttentionBackendEnum(Enum):
            TRITON_ATTN = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"
            FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
            ROCM_ATTN = "vllm.v1.attention.backends.rocm_attn.RocmAttentionBackend"
            ROCM_AITER_FA = "vllm.v1.attention.backends.rocm_aiter_fa.AiterFlashAttentionBackend"
            TRITON_MLA = "vllm.v1.attention.backends.mla.triton_mla.TritonMLABackend"
            CUSTOM = ""
        """,
    "v1/attention/backends/rocm_aiter_fa.py": "import vllm.envs as envs\nshuffled = envs.VLLM_ROCM_LAYOUT\n",
    "model_executor/layers/linear.py": """
        # VLLM_ROCM_USE_AITER_GONE is spoken of and not read
        from vllm import envs
        from vllm._aiter_ops import rocm_aiter_ops
        use = rocm_aiter_ops.is_linear_enabled() or envs.VLLM_ROCM_PADDING
        """,
}


def make_tree(folder: Path, sources: dict[str, str], name="made") -> Tree:
    import textwrap

    files = {}
    for file, text in sources.items():
        path = folder / "vllm" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        files[file] = hashlib.sha256(path.read_bytes()).digest()
    return Tree(name, folder, folder / "vllm", str(folder), "a test", files=files)


@pytest.fixture
def made(tmp_path) -> Tree:
    return make_tree(tmp_path, SOURCES)


def test_switches_are_those_of_aiter_of_the_choice_and_of_rocms_attention(made):
    found = {switch.name.removeprefix("VLLM_"): switch for switch in switches.declared(made)}
    assert list(found) == [
        "ROCM_USE_AITER", "ROCM_USE_AITER_MHA", "ROCM_USE_AITER_LINEAR", "ROCM_USE_AITER_GONE", "ROCM_USE_AITER_MODE",
        "ROCM_LAYOUT", "PREFILL_DECODE",
    ]  # fmt: skip
    assert {name for name, switch in found.items() if switch.decides} == {
        "ROCM_USE_AITER", "ROCM_USE_AITER_MHA", "PREFILL_DECODE",
    }  # fmt: skip
    assert {name for name, switch in found.items() if switch.dead} == {"ROCM_USE_AITER_GONE", "ROCM_USE_AITER_MODE"}
    assert not found["ROCM_USE_AITER_LINEAR"].of_attention
    assert found["ROCM_LAYOUT"].read_in == ("v1/attention/backends/rocm_aiter_fa.py",)


def test_only_what_is_on_or_off_can_be_moved(made):
    moved = {switch.name: switch.moved() for switch in switches.declared(made)}
    assert (moved[MAIN_SWITCH], moved["VLLM_ROCM_USE_AITER_MHA"]) == ("1", "0")
    assert moved["VLLM_ROCM_USE_AITER_MODE"] is None
    names = [switch.name for switch in switches.of_attention(made)]
    assert MAIN_SWITCH not in names
    assert "VLLM_ROCM_USE_AITER_MODE" not in names


def test_backends_are_the_trees_and_rocms_those_that_its_choice_speaks_of(made):
    assert list(backends.names(made)) == ["TRITON_ATTN", "FLASH_ATTN", "ROCM_ATTN", "ROCM_AITER_FA", "TRITON_MLA"]
    assert backends.of_rocm(made) == ["TRITON_ATTN", "ROCM_ATTN", "ROCM_AITER_FA"]
    assert [name for name, path in backends.names(made).items() if backends.is_latent(name, path)] == ["TRITON_MLA"]


OLDEST = {
    "platforms/interface.py": """
        import enum
        class _Backend(enum.Enum):
            TRITON_ATTN = enum.auto()
            ROCM_ATTN = enum.auto()
        """,
    "platforms/rocm.py": """
        from .interface import _Backend
        class RocmPlatform:
            @classmethod
            def get_attn_backend_cls(cls, selected_backend):
                return "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"
        """,
    "envs.py": "",
}


def test_a_tree_without_a_table_of_classes_names_them_by_their_modules(tmp_path):
    tree = make_tree(tmp_path, OLDEST)
    assert backends.names(tree) == {"TRITON_ATTN": "", "ROCM_ATTN": ""}
    assert backends.of_rocm(tree) == ["TRITON_ATTN"]
    assert switches.declared(tree) == []


REAL = {
    "release:0.15.1": ({"VLLM_ROCM_USE_AITER_UNIFIED_ATTENTION", "VLLM_ROCM_USE_AITER_MHA"}, set()),
    "release:0.32.0": ({"VLLM_ROCM_USE_AITER_MHA"}, {"VLLM_ROCM_USE_AITER_UNIFIED_ATTENTION"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_trees_have_switches_that_decide_and_switches_that_nothing_reads(name):
    found = {switch.name: switch for switch in switches.declared(trees.get(name))}
    decide, dead = REAL[name]
    assert decide <= {name for name, switch in found.items() if switch.decides}
    assert dead <= {name for name, switch in found.items() if switch.dead}
    assert "ROCM_AITER_FA" in backends.of_rocm(trees.get(name))
