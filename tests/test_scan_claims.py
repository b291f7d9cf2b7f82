# SPDX-License-Identifier: Apache-2.0
"""The scan's rules on what says "can" and asks "should", and on functions of one name and different order."""

import textwrap

import pytest

from aiterlab.scan import scan

ENVS = """
    import os
    from typing import TYPE_CHECKING
    if TYPE_CHECKING:
        USE_AITER: bool = False
        AITER_LEVEL: int = 0
        AITER_PATH: str = ""
        HAS_AITER_CUBIN: bool = False
        BATCH_INVARIANT: bool = False
"""


@pytest.fixture
def look(tmp_path):
    """Write a package `p` with its `envs`, scan one module of it, return `rule/severity:line`, or the findings."""

    def look(source: str, findings: bool = False, libraries=(), **others: str):
        files = {"module": source, "envs": ENVS, "__init__": ""} | others
        (tmp_path / "p").mkdir(exist_ok=True)
        for name, text in files.items():
            (tmp_path / "p" / f"{name}.py").write_text(textwrap.dedent(text))
        report = scan([tmp_path / "p" / "module.py"], libraries)
        return report.findings if findings else [f"{f.rule}/{f.severity}:{f.line}" for f in report.findings]

    return look


AVAILABILITY = "availability-reads-preference/warning:{}"
READS = {
    "directly": "import p.envs as envs\ndef is_aiter_found_and_supported(): return find() and envs.USE_AITER",
    "in a condition": """
        from p import envs
        def has_aiter():
            if not envs.USE_AITER:
                return False
            return True""",
    "os.environ": "import os\ndef is_aiter_available(): return os.environ.get('USE_AITER', '0') == '1'",
    "os.getenv": "import os\ndef aiter_supported(): return bool(os.getenv('ENABLE_AITER'))",
    "subscript": "import os\ndef supports_aiter(): return os.environ['DISABLE_AITER'] == '0'",
    "a local variable": "from p import envs\ndef has_aiter():\n    on = envs.USE_AITER\n    return on and find()",
    "a flag": "from p import envs\nON = envs.USE_AITER\ndef is_aiter_available(): return ON",
    "an import in the function": "def is_aiter_available():\n    import p.envs as envs\n    return envs.USE_AITER",
    "one call": "from p.other import wanted\ndef is_aiter_available(): return wanted()",
    "a call through a module": "import p.other\ndef is_aiter_available(): return p.other.wanted()",
    "a method": "from p.other import ops\ndef is_aiter_available(): return ops.is_enabled()",
}
OTHER = """
    from p import envs
    def wanted(): return envs.USE_AITER
    class ops:
        _ON = envs.USE_AITER
        @classmethod
        def is_enabled(cls): return cls._ON
"""


@pytest.mark.parametrize("source", READS.values(), ids=READS)
def test_availability_that_follows_a_switch_is_reported(look, source):
    (finding,) = look(source, findings=True, other=OTHER)
    assert finding.rule == "availability-reads-preference"
    assert "AITER" in finding.message
    assert finding.severity == "warning"


HONEST = {
    "a preference by name": "from p import envs\ndef is_aiter_enabled(): return envs.USE_AITER",
    "both in the name": "from p import envs\ndef is_aiter_supported_and_enabled(): return envs.USE_AITER",
    "facts alone": "def is_aiter_found(): return find_spec('aiter') is not None",
    "a path": "from p import envs\ndef is_aiter_found(): return exists(envs.AITER_PATH)",
    "a number": "from p import envs\ndef is_aiter_found(): return envs.AITER_LEVEL",
    "a fact the user states": "from p import envs\ndef is_aiter_found(): return envs.HAS_AITER_CUBIN",
    "a switch about something else": "from p import envs\ndef is_aiter_supported(): return not envs.BATCH_INVARIANT",
    "only for a log": """
        from p import envs
        def is_aiter_found():
            if envs.USE_AITER:
                log()
            return find()""",
    "a parameter": "def is_aiter_found(envs): return envs.found",
}


@pytest.mark.parametrize("source", HONEST.values(), ids=HONEST)
def test_an_honest_answer_is_no_finding(look, source):
    assert look(source) == []


def test_only_the_root_of_a_chain_of_availability_functions_is_reported(look):
    source = """
        from p import envs
        def is_aiter_supported(): return envs.USE_AITER
        def has_aiter_moe(): return is_aiter_supported() and find()
    """
    assert look(source) == [AVAILABILITY.format(3)]


def test_a_decorator_that_follows_a_switch_is_a_gate_if_it_stands_before_explicit_paths(look):
    source = """
        import functools
        from p import envs
        def is_aiter_found_and_supported(): return envs.USE_AITER
        def if_aiter_supported(func):
            @functools.wraps(func)
            def wrapper(*args):
                if is_aiter_found_and_supported():
                    return func(*args)
            return wrapper
        @if_aiter_supported
        def register_ops(): ...
    """
    found = look(source, findings=True)
    assert [f"{f.rule}:{f.line}" for f in found] == ["availability-reads-preference:4", "preference-gate:5"]
    assert "USE_AITER" in found[1].message
    assert found[1].related[-1].line == 12
    assert look(source.replace("envs.USE_AITER", "find('aiter')")) == []


def test_a_decorator_in_front_of_preferences_alone_is_no_gate(look):
    source = """
        from p import envs
        def if_wanted(func):
            def wrapper(*args):
                if envs.USE_AITER:
                    return func(*args)
            return wrapper
        @if_wanted
        def is_mha_enabled(): ...
    """
    assert look(source) == []


ALLOWED = """
    from p import envs
    class Proposer:
        def __init__(self):
            types = [A]
            if envs.USE_AITER and find("aiter"):
                from x import B
                types.append(B)
            self.allowed_attn_types = tuple(types)
"""


def test_a_list_of_what_is_allowed_that_follows_a_switch_is_a_gate(look):
    assert look(ALLOWED) == ["preference-gate/warning:6"]
    assert look(ALLOWED.replace("envs.USE_AITER and ", "")) == []
    assert look(ALLOWED.replace("allowed_attn_types", "invalid_attn_types")) == []


# Two functions under one name

ONE, OTHER_ORDER = "def attend(q, k, v, max_q, cu_q): ...", "def attend(q, k, v, cu_q, max_q): ..."
OFFER = """
    try:
        from p.one import attend
    except ImportError:
        from p.two import attend
    def f(q): return attend({})
"""


def test_functions_of_different_order_under_one_name_are_reported_with_the_calls_that_depend_on_it(look):
    (finding,) = look(OFFER.format("q, q, q, 1, q"), findings=True, one=ONE, two=OTHER_ORDER)
    assert (finding.rule, finding.severity, finding.line) == ("positional-order", "warning", 5)
    assert "`max_q` as argument 4" in finding.message and "`cu_q`" in finding.message
    assert [related.line for related in finding.related] == [3, 6]


def test_calls_by_keyword_make_it_a_note(look):
    assert look(OFFER.format("q, q, q, max_q=1, cu_q=q"), one=ONE, two=OTHER_ORDER) == ["positional-order/note:5"]


SAME = {
    "equal": ONE,
    "longer": "def attend(q, k, v, max_q, cu_q, scale=1): ...",
    "other names": "def attend(a, b, c, d, e): ...",
    "takes anything": "def attend(*args, **kwargs): raise ImportError",
}


@pytest.mark.parametrize("two", SAME.values(), ids=SAME)
def test_functions_that_agree_are_no_finding(look, two):
    assert look(OFFER.format("q"), one=ONE, two=two) == []


def test_alternatives_are_found_in_definitions_assignments_functions_and_re_exports(look):
    ops = "class ops:\n    @staticmethod\n    def attend(q, k, v, cu_q, max_q): ...\n"
    branches = "if a():\n    from p.one import attend\nelse:\n    from p.two import ops\n    attend = ops.attend\n"
    assert look(branches, one=ONE, two=ops) == ["positional-order/note:5"]
    override = f"{ONE}\nif a():\n    from p.two import attend\n"
    assert look(override, two=OTHER_ORDER) == ["positional-order/note:3"]
    third = "try:\n    from p.one import attend\nexcept ImportError:\n    if a():\n        from p.two import attend\n"
    third += "    else:\n        from p.one import attend\n"
    assert look(third, one=ONE, two=OTHER_ORDER) == ["positional-order/note:5"]
    inside = "def f():\n    if a():\n        from p.one import attend\n    else:\n        from p.again import attend\n"
    assert look(inside, one=ONE, two=OTHER_ORDER, again="from .two import attend") == ["positional-order/note:5"]


def test_names_of_different_functions_and_overloads_are_not_alternatives(look):
    apart = "def f():\n    from p.one import attend\ndef g():\n    if a():\n        from p.two import attend\n"
    assert look(apart, one=ONE, two=OTHER_ORDER) == []
    overloads = (
        f"if a():\n    @overload\n    {ONE}\n    @overload\n    {OTHER_ORDER}\nelse:\n    from p.one import attend\n"
    )
    assert look(overloads, one=ONE) == []


def test_a_library_is_followed_where_its_folder_is_given(look, tmp_path):
    (tmp_path / "site" / "flash").mkdir(parents=True)
    (tmp_path / "site" / "flash" / "__init__.py").write_text(OTHER_ORDER)
    source = OFFER.format("q, q, q, 1, q").replace("p.two", "flash")
    assert look(source, one=ONE) == []
    assert look(source, libraries=[tmp_path / "site"], one=ONE) == ["positional-order/warning:5"]


def test_an_operator_and_the_fake_that_is_traced_for_it_must_agree(look):
    source = """
        def op(x, scale, flag): ...
        def op_fake(x, flag, scale): ...
        register(op_name="op", op_func=op, fake_impl=op_fake)
    """
    assert look(source) == ["positional-order/warning:3"]
    assert look(source.replace("flag, scale", "scale, flag")) == []
