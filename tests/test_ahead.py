# SPDX-License-Identifier: Apache-2.0
"""What is done ahead of all cells is what each of them would have done."""

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from aiterlab.probes import ahead

UTILS = Path(find_spec("aiter").origin).parent / "jit" / "utils"


@pytest.fixture
def held(monkeypatch):
    """AITER's tables, executed ahead; afterwards this process is as it was."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    ahead._hold_tables(UTILS)
    assert not tables()
    yield sys.meta_path[0].modules
    for name in tables():
        del sys.modules[name]


def tables() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "hipify"]


def test_tables_come_ready_to_whoever_would_have_found_them(held):
    sys.path.insert(0, str(UTILS))
    module = importlib.import_module("hipify.hipify_python")
    assert module is held["hipify.hipify_python"]
    assert sys.modules["hipify"].hipify_python is module
    assert isinstance(module.__spec__.loader, importlib.machinery.SourceFileLoader)
    assert sorted(tables()) == sorted(held)


def test_tables_are_what_an_import_makes_of_the_same_files(held):
    sys.path.insert(0, str(UTILS))
    sys.meta_path.pop(0)
    module = importlib.import_module("hipify.hipify_python")
    ready = held["hipify.hipify_python"]
    assert module is not ready
    assert vars(module).keys() == vars(ready).keys()
    assert (module.__file__, module.__spec__.origin) == (ready.__file__, ready.__spec__.origin)
    assert module.PYTORCH_MAP == ready.PYTORCH_MAP
    assert module.RE_PYTORCH_PREPROCESSOR.pattern == ready.RE_PYTORCH_PREPROCESSOR.pattern


def test_a_machine_without_aiter_finds_no_tables(held):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("hipify")
    assert find_spec("hipify") is None


def test_another_package_of_that_name_keeps_its_place(held, tmp_path):
    (tmp_path / "hipify.py").write_text("mine = True\n")
    sys.path.insert(0, str(tmp_path))
    assert importlib.import_module("hipify").mine


@pytest.mark.parametrize("level", [1, 2])
def test_an_operator_notes_the_same_place(level):
    def ours():
        return ahead._source(level)

    def torchs():
        return torch._library.utils.get_source(level)

    places = [function() for function in (ours, torchs)]
    lines = [int(place.rpartition(":")[2]) for place in places]
    assert {place.rpartition(":")[0] for place in places} == {__file__}
    assert lines[0] == lines[1] if level == 2 else lines[1] - lines[0] == 3
