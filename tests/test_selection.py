# SPDX-License-Identifier: Apache-2.0
"""The witness that listens while a platform chooses, on a platform of a few lines; and AITER brought up to date."""

import inspect
import logging
import sys
from collections import namedtuple
from enum import Enum
from pathlib import PurePath
from types import ModuleType

import pytest

from aiterlab.probes import selection

Asked = namedtuple("Asked", "head_size dtype use_mla")
FA_PATH = "vllm.v1.attention.backends.rocm_aiter_fa.AiterFlashAttentionBackend"


class AttentionBackendEnum(Enum):
    TRITON_ATTN = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"
    ROCM_AITER_FA = FA_PATH
    CUSTOM = ""

    def get_path(self) -> str:
        if not self.value:
            raise ValueError("nobody has registered one")
        return self.value


class Platform:
    refuses = False

    @classmethod
    def get_valid_backends(cls, capability):
        valid = [(AttentionBackendEnum.TRITON_ATTN, 1), (AttentionBackendEnum.ROCM_AITER_FA, 0)]
        return valid, {AttentionBackendEnum.CUSTOM: ["nothing there"]}

    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        logging.getLogger("vllm.platforms").warning("unknown name %s", "VLLM_X")
        logging.getLogger("vllm.platforms").info("chosen")
        if cls.refuses:
            raise ValueError("not valid")
        if selected_backend is None:
            selected_backend = min(cls.get_valid_backends(9)[0], key=lambda entry: entry[1])[0]
        return selected_backend.get_path()


@pytest.fixture
def platform(monkeypatch):
    """A platform that vLLM's own import would give."""
    kind = type("RocmPlatform", (Platform,), {name: vars(Platform)[name] for name in (
        "get_valid_backends", "get_attn_backend_cls")})  # fmt: skip
    registry = "vllm.v1.attention.backends.registry"
    for name in ("vllm", "vllm.platforms", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends", registry):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm.platforms"].current_platform = kind()
    sys.modules[registry].AttentionBackendEnum = AttentionBackendEnum
    return kind


def test_the_witness_hears_question_and_answer_and_changes_neither(platform):
    asked, kept = Asked(64, PurePath("torch.float16"), False), vars(platform)["get_attn_backend_cls"]
    signature = inspect.signature(platform().get_attn_backend_cls)
    with selection.Witness() as witness:
        assert inspect.signature(platform().get_attn_backend_cls) == signature
        assert platform().get_attn_backend_cls(None, attn_selector_config=asked) == FA_PATH
    assert vars(platform)["get_attn_backend_cls"] is kept
    assert witness.facts() == {
        "requested": None,
        "asked_with": {"head_size": 64, "dtype": "float16", "use_mla": False},
        "chose": "ROCM_AITER_FA",
        "priorities": ["ROCM_AITER_FA", "TRITON_ATTN"],
        "refused": {"CUSTOM": ["nothing there"]},
    }


def test_an_explicit_choice_is_heard_and_candidates_that_nobody_asked_for_are_not_made_up(platform):
    with selection.Witness() as witness:
        platform().get_attn_backend_cls(AttentionBackendEnum.TRITON_ATTN, Asked(64, "x", False))
    assert (witness.requested, witness.chose) == ("TRITON_ATTN", "TRITON_ATTN")
    assert (witness.priorities, witness.refused) == (None, None)


def test_a_refusal_is_the_platforms_own_exception_and_leaves_no_choice(platform):
    platform.refuses = True
    with pytest.raises(ValueError, match="not valid"), selection.Witness() as witness:
        platform().get_attn_backend_cls(AttentionBackendEnum.ROCM_AITER_FA, Asked(64, "x", False))
    assert (witness.requested, witness.chose) == ("ROCM_AITER_FA", None)
    assert witness.asked_with is not None


def test_who_was_never_asked_says_so_and_warnings_are_kept(platform):
    with selection.Witness() as witness:
        logging.getLogger("elsewhere").warning("not vLLM's")
    assert (witness.asked_with, witness.warnings) == (None, [])
    with selection.Witness() as witness:
        platform().get_attn_backend_cls(None, Asked(64, "x", False))
    assert witness.warnings == ["unknown name VLLM_X"]


LATER = """
import sys
from pathlib import Path
folder, arch = Path(sys.argv[1]), "gfx1201"
for file, text in {
    "aiter/__init__.py": "from aiter.jit.utils.chip_info import GFX_MAP\\n"
    "try:\\n    import aiter.optional\\nexcept ImportError: pass",
    "aiter/jit/__init__.py": "", "aiter/jit/utils/__init__.py": "",
    "aiter/jit/utils/chip_info.py": "GFX_MAP = {0: 'native', 1: 'gfx942'}",
    "vllm/__init__.py": "from aiter.newer import kernel\\n"
    "import importlib.util as u\\nsees = u.find_spec('aiter.newest')",
}.items():
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(text)
sys.path.insert(0, str(folder))
from aiterlab.machines import aiter_jit, ledger
aiter_jit.have_later_modules(folder / "vllm")
aiter_jit.know_architecture(arch)
import vllm
from aiter import GFX_MAP
assert "aiter.optional" not in sys.modules, "what AITER itself lacks stays away"
assert vllm.sees is None, "and so does what somebody only asks for"
assert list(GFX_MAP.values()) == ["native", "gfx942", arch]
try:
    vllm.kernel()
except NotImplementedError as error:
    print(error)
print(len(ledger.stand_ins))
"""


def test_a_tree_finds_the_modules_and_the_architecture_of_a_later_aiter(run_python, tmp_path):
    said = run_python(LATER, str(tmp_path)).splitlines()
    assert said[0].startswith("aiter.newer.kernel exists only compiled for ROCm")
    assert said[1] == "2"
