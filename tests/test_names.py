# SPDX-License-Identifier: Apache-2.0
"""Names that a backend's code looks up in vain: found where they are, and said what keeps their use off."""

import importlib
import sys
from itertools import count
from types import SimpleNamespace

import pytest

from aiterlab.probes import guards, names

_numbers = count()
PLAIN = """
class Backend:
    get_builder_cls = staticmethod(lambda: Builder)
class Builder:
    def __init__(self, spec): ...
"""
TRAP = """
HAS = False
if HAS:
    import aiter
class Impl:
    def forward(self):
        return aiter.attend()
"""


@pytest.fixture
def find(tmp_path, monkeypatch):
    """What is said of a backend whose module has this source."""
    monkeypatch.syspath_prepend(tmp_path)

    def find(source: str, rest: str = PLAIN) -> dict[str, dict]:
        module = f"backend_{next(_numbers)}"
        (tmp_path / f"{module}.py").write_text(source + rest)
        made = importlib.import_module(module)
        try:
            layer = SimpleNamespace(attn_backend=made.Backend, impl=made.Impl())
            return {entry["name"]: entry for entry in names.unbound(layer, tmp_path)}
        finally:
            del sys.modules[module]

    return find


def test_the_trap_of_the_regression_is_found_with_the_builtin_in_its_place(find):
    found = find(TRAP)["aiter"]
    assert (found["builtin"], found["value"], found["kept_off"]) == (True, "builtins.aiter", None)
    assert (found["line"], found["functions"]) == (7, ["Impl.forward"])
    assert found["file"].startswith("vllm/backend_")


def test_a_name_that_no_builtin_replaces_is_found_too(find):
    found = find(TRAP.replace("aiter", "flash"))["flash"]
    assert (found["builtin"], found["value"], found["kept_off"]) == (False, None, None)


@pytest.mark.parametrize(
    "bound",
    [
        "import json as flash",
        "try:\n    import no_such_module as flash\nexcept ImportError:\n    flash = None",
        "if False:\n    import json as flash\nelse:\n    flash = None",
    ],
)
def test_a_bound_name_is_no_matter(find, bound):
    assert find(f"{bound}\nclass Impl:\n    def forward(self):\n        return flash.attend()\n") == {}


@pytest.mark.parametrize(
    ("bound", "used"),
    [
        ("if on():\n    import json as flash", "if on():\n            return flash.attend()"),
        ("if on():\n    import json as flash", "if fast and on():\n            return flash.attend()"),
        ("if on():\n    import json as flash", "return on() and flash.attend()"),
        ("if on():\n    import json as flash", "return flash.attend() if on() else None"),
        (
            "try:\n    import no_such as flash\n    HAS = True\nexcept ImportError:\n    HAS = False",
            "if HAS:\n            return flash.attend()",
        ),
    ],
)
def test_the_same_condition_keeps_a_use_off(find, bound, used):
    source = f"on = lambda: False\n{bound}\nclass Impl:\n    def forward(self, fast=1):\n        {used}\n"
    assert find(source)["flash"]["kept_off"] == "the same condition"


@pytest.mark.parametrize("used", ["if other():\n            return flash.attend()", "return flash or on()"])
def test_another_condition_does_not(find, used):
    source = (
        "on = other = lambda: False\nif on():\n    import json as flash\n"
        f"class Impl:\n    def forward(self):\n        {used}\n"
    )
    assert find(source)["flash"]["kept_off"] is None


CALLS = """
ON = False
if ON:
    import json as flash
def helper():
    return flash.attend()
class Impl:
    def __init__(self):
        if {held}:
            self.run = self._run
    def forward(self):
        {called}
    def _run(self):
        return helper()
"""


@pytest.mark.parametrize(("called", "kept_off"), [("pass", "not called"), ("self._run()", None), ("helper()", None)])
def test_a_function_that_nothing_of_the_layer_refers_to_is_not_called(find, called, kept_off):
    assert find(CALLS.format(called=called, held=False))["flash"]["kept_off"] == kept_off


def test_a_method_that_the_layer_holds_is_called(find):
    assert find(CALLS.format(called="pass", held=True))["flash"]["kept_off"] is None


BUILDS = """
ON = False
if ON:
    import json as flash
class Backend:
    get_builder_cls = staticmethod(lambda: Builder)
class Impl:
    def __init__(self):
        flash if ON and 1 else None
    def forward(self): ...
class Builder:
    def {method}(self):
        return flash
"""


@pytest.mark.parametrize(
    ("method", "kept_off"), [("__init__", None), ("build", None), ("__len__", None), ("_later", "not called")]
)
def test_the_builders_constructor_is_still_to_come_and_the_layers_own_has_run(find, method, kept_off):
    found = find(BUILDS.format(method=method), "")["flash"]
    assert found["kept_off"] == kept_off
    assert kept_off or found["functions"] == [f"Builder.{method}"]


def test_lines_over_which_no_condition_stands_are_not_covered():
    module = guards.Guards("if on():\n    import x\ndef f():\n    x.a()\n    if on():\n        x.b()\n")
    assert [module.cover("x", line) for line in (4, 6)] == [False, True]
