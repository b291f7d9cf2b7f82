# SPDX-License-Identifier: Apache-2.0
"""The scan's rules on conditional names: what is reported, how gravely, and every idiom that is safe."""

import textwrap

import pytest

from aiterlab.scan import scan

AITER_TRAP = """
    from vllm.platforms import current_platform
    from vllm._aiter_ops import rocm_aiter_ops

    if current_platform.is_rocm():
        if rocm_aiter_ops.is_enabled():
            import aiter

    class Impl:
        def forward(self, q):
            return aiter.flash_attn_varlen_func(q)
"""
AITER_OPS = """
    import vllm.envs as envs

    class rocm_aiter_ops:
        _AITER_ENABLED = envs.VLLM_ROCM_USE_AITER

        @classmethod
        def is_enabled(cls):
            return cls._AITER_ENABLED
"""
ENVS = """
    import os
    if TYPE_CHECKING:
        VLLM_ROCM_USE_AITER: bool = False
        VLLM_CACHE_DIR: str = ""
"""


@pytest.fixture
def look(tmp_path):
    """Write files, scan them, and return `rule/severity` of each finding, or the findings."""

    def look(source: str, findings: bool = False, **others: str):
        files = {"module.py": source, **{name.replace("__", "/") + ".py": text for name, text in others.items()}}
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
            for folder in path.relative_to(tmp_path).parents:
                if folder.name:
                    (tmp_path / folder / "__init__.py").touch()
        report = scan([tmp_path / "module.py"])
        assert not report.notices
        return report.findings if findings else [f"{f.rule}/{f.severity}" for f in report.findings]

    return look


def test_the_aiter_trap_is_an_error_and_says_how_to_mend_it(look):
    (finding,) = look(AITER_TRAP, findings=True, vllm___aiter_ops=AITER_OPS, vllm__envs=ENVS)
    assert (finding.rule, finding.severity, finding.line) == ("builtin-stand-in", "error", 7)
    assert "not rocm_aiter_ops.is_enabled()): Python's builtin `aiter`" in finding.message
    assert "import aiter as" in finding.mend
    assert [related.line for related in finding.related] == [11]


def test_a_builtin_that_stands_in_only_on_another_platform_is_a_warning(look):
    source = AITER_TRAP.replace("if rocm_aiter_ops.is_enabled():", "if True:")
    assert look(source) == ["builtin-stand-in/warning"]


@pytest.mark.parametrize("local", ["        import aiter\n", "        import aiter as rocm_aiter\n"])
def test_the_trap_is_gone_where_the_import_stands_beside_the_use(look, local):
    source = textwrap.dedent(AITER_TRAP)
    used = "rocm_aiter" if " as " in local else "aiter"
    source = source.replace("        return aiter", local + f"        return {used}")
    assert look(source) == []


DELIBERATE = {
    "backport": "import sys\nif sys.version_info < (3, 10):\n    from compat import anext\ndef f(it): return anext(it)",
    "richer twin": "try:\n    from rich import print\nexcept ImportError:\n    pass\ndef f(): print(1)",
    "stub for type checkers": """
        if TYPE_CHECKING:
            def anext(it): ...
        def f(it): return anext(it)""",
}


@pytest.mark.parametrize("source", DELIBERATE.values(), ids=DELIBERATE)
def test_a_builtin_that_is_meant_to_stand_in_is_no_finding(look, source):
    assert look(source) == []


UNSAFE = {
    "if without else": ("if flag():\n    import x\ndef f(): return x.y", "conditional-name/warning"),
    "try that passes": (
        "try:\n    import x\nexcept ImportError:\n    pass\ndef f(): return x.y",
        "conditional-name/warning",
    ),
    "suppress": (
        "import contextlib\nwith contextlib.suppress(ImportError):\n    import x\ndef f(): return x.y",
        "conditional-name/warning",
    ),
    "platform": (
        "from p import current_platform\nif current_platform.is_cuda():\n    import x\ndef f(): return x.y",
        "conditional-name/note",
    ),
    "preference": (
        "import os\nif os.environ.get('USE_X'):\n    import x\ndef f(): return x.y",
        "conditional-name/error",
    ),
    "module level": ("if flag():\n    import x\nclass A(x.B): pass", "conditional-name/warning"),
    "annotation of a class body": (
        "if flag():\n    from x import T\nclass A:\n    t: T = None",
        "conditional-name/warning",
    ),
    "only for type checkers": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from x import T\ndef f(v): return isinstance(v, T)",
        "conditional-name/error",
    ),
    "another guard": (
        "if a():\n    import x\ndef f():\n    if b():\n        return x.y",
        "conditional-name/warning",
    ),
    "the wrong branch": (
        "if a():\n    import x\ndef f():\n    if a():\n        return None\n    return x.y",
        "conditional-name/warning",
    ),
    "a later import that fails": (
        "try:\n    import a\n    HAS = True\n    import b\nexcept ImportError:\n    pass\n"
        "def f():\n    if HAS:\n        return b.x",
        "conditional-name/warning",
    ),
    "module __getattr__ serves others, not its own functions": (
        "if flag():\n    import x\ndef __getattr__(name): ...\ndef f(): return x.y",
        "conditional-name/warning",
    ),
    "flag under the wrong branch": (
        "HAS = True\ntry:\n    import x\nexcept ImportError:\n    pass\ndef f():\n    if HAS:\n        return x.y",
        "conditional-name/warning",
    ),
    "guard through a falsy alternative": (
        "if a():\n    import x\ndef f():\n    if a() or b():\n        return x.y",
        "conditional-name/warning",
    ),
    "match without a last case": (
        "match kind():\n    case 1:\n        import x\ndef f(): return x.y",
        "conditional-name/warning",
    ),
    "walrus in a condition": ("if a() and (x := b()):\n    pass\ndef f(): return x.y", "conditional-name/warning"),
    "caught broadly": (
        "if a():\n    import x\ndef f():\n    try:\n        return x.y\n    except Exception:\n        return None",
        "conditional-name/note",
    ),
    "method only called under the guard": (
        "if a():\n    import x\nclass C:\n    def _f(self): return x.y\n    def g(self):\n        if a():\n"
        "            return self._f()",
        "conditional-name/note",
    ),
    "only called under the guard": (
        "if a():\n    import x\ndef _f(): return x.y\ndef g():\n    if a():\n        return _f()",
        "conditional-name/note",
    ),
}


@pytest.mark.parametrize(("source", "expected"), UNSAFE.values(), ids=UNSAFE)
def test_a_name_that_may_be_missing_is_reported(look, source, expected):
    assert look(source) == [expected]


SAFE = {
    "else binds None": "if a():\n    import x\nelse:\n    x = None\ndef f(): return x.y",
    "except binds": "try:\n    import x\nexcept ImportError:\n    x = None\ndef f(): return x.y",
    "except raises": "try:\n    import x\nexcept ImportError as e:\n    raise RuntimeError from e\ndef f(): return x.y",
    "except exits": "import sys\ntry:\n    import x\nexcept ImportError:\n    sys.exit(1)\ndef f(): return x.y",
    "except calls what raises": """
        def missing(error):
            raise RuntimeError("install x") from error
        try:
            import x
        except ImportError as error:
            missing(error)
        def f(): return x.y""",
    "default first": "x = None\nif a():\n    import x\ndef f(): return x.y",
    "every branch": """
        if a():
            import x
        elif b():
            from c import x
        else:
            def x(): ...
        def f(): return x()""",
    "same guard": "if a():\n    import x\ndef f():\n    if a():\n        return x.y",
    "same guard, early return": "if a():\n    import x\ndef f():\n    if not a():\n        return None\n    return x.y",
    "same guard, raise": "if a():\n    import x\ndef f():\n    if not a():\n        raise RuntimeError\n    return x.y",
    "same guard, assert": "if a():\n    import x\ndef f():\n    assert a()\n    return x.y",
    "same guard, and": "if a():\n    import x\ndef f(): return a() and x.y",
    "same guard, or": "if a():\n    import x\ndef f(): return not a() or x.y",
    "same guard, conditional expression": "if a():\n    import x\ndef f(): return x.y if a() else None",
    "same guard, comprehension": "if a():\n    import x\ndef f(s): return [x.y for i in s if a()]",
    "same guard, while": "if a():\n    import x\ndef f():\n    while a():\n        x.y()",
    "same guard, alias": "if a():\n    import x\ndef f():\n    on = a()\n    if on:\n        return x.y",
    "stronger guard": "if a():\n    import x\ndef f():\n    if a() and b():\n        return x.y",
    "guard on an object": """
        if a():
            import x
        class C:
            def __init__(self):
                self.on = a()
            def f(self):
                if self.on:
                    return x.y""",
    "the constructor refuses": """
        try:
            import x
            HAS_X = True
        except ImportError:
            HAS_X = False
        class C:
            def __init__(self):
                if not HAS_X:
                    raise ImportError("x")
            def f(self):
                return x.y""",
    "the base's constructor refuses": """
        try:
            import x
        except ImportError:
            HAS_X = False
        else:
            HAS_X = True
        class A:
            def __init__(self):
                assert HAS_X
        class B(A):
            def __init__(self):
                super().__init__()
                x.start()
            def f(self):
                return x.y""",
    "flag in the same branch": """
        HAS_X = False
        try:
            import x
            HAS_X = True
        except ImportError:
            pass
        def f():
            if HAS_X:
                return x.y""",
    "flag in an else": """
        try:
            import x
        except ImportError:
            HAS_X = False
        else:
            HAS_X = True
        def f():
            if not HAS_X:
                return None
            return x.y""",
    "error kept": """
        error = None
        try:
            import x
        except ImportError as e:
            error = e
        def f():
            if error is not None:
                raise error
            return x.y""",
    "function that answers": """
        try:
            import x
            HAS_X = True
        except ImportError:
            HAS_X = False
        def has_x():
            return HAS_X
        def f():
            if has_x():
                return x.y""",
    "function that checks": """
        try:
            import x
        except ImportError:
            x_missing = True
        else:
            x_missing = False
        def require_x():
            if x_missing:
                raise RuntimeError
        def f():
            require_x()
            return x.y""",
    "a sibling that is None": """
        try:
            import x
            from x import y
        except ImportError:
            x = None
        def f():
            if x is None:
                raise RuntimeError
            return y()""",
    "an attribute of a sibling that is None": """
        try:
            import x
            from x import y
        except ImportError:
            x = None
        def f():
            x.init()
            return y()""",
    "defined under the same guard": "if a():\n    import x\nif a():\n    def f(): return x.y",
    "inner function": """
        if a():
            import x
        def f():
            if not a():
                return
            def g(): return x.y
            return g""",
    "lambda": "if a():\n    import x\nf = (lambda: x.y) if a() else None",
    "type annotations": """
        from __future__ import annotations
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from x import T
        def f(v: T) -> T:
            w: T = v
            return w""",
    "quoted annotation": "if TYPE_CHECKING:\n    from x import T\ndef f(v: 'T') -> 'T': return v",
    "global in a function": "if a():\n    import x\ndef load():\n    global x\n    import x\ndef f(): return x.y",
    "lookup in globals": "if a():\n    import x\ndef f():\n    if 'x' in globals():\n        return x.y",
    "caught": """
        if a():
            import x
        def f():
            try:
                return x.y
            except NameError:
                return None""",
    "local import": "if a():\n    import x\ndef f():\n    import x\n    return x.y",
    "local variable and parameter": "if a():\n    import x\ndef f(x): return x.y\ndef g():\n    x = 1\n    return x",
    "loop variable": "for x in (1, 2):\n    y = x\ndel x\ndef f(): return y",
    "with": "with open('f') as f:\n    x = f.read()\ndef g(): return x",
    "match with a last case": """
        match kind():
            case 1:
                x = 1
            case _:
                x = 2
        def f(): return x""",
    "walrus": "if (x := a()) and b():\n    pass\ndef f(): return x",
    "star import may bind it": "if a():\n    import x\nfrom y import *\ndef f(): return x.y",
    "written through globals": "if a():\n    import x\nglobals()['x'] = 1\ndef f(): return x.y",
    "finally binds": "try:\n    a()\nfinally:\n    x = 1\ndef f(): return x",
    "class body": "class A:\n    if a():\n        x = 1\n    else:\n        x = 2\n    y = x",
    "skipped test": """
        import pytest
        try:
            import x
            HAS_X = True
        except ImportError:
            HAS_X = False
        @pytest.mark.skipif(not HAS_X, reason="no x")
        def test_it(): x.y()""",
    "never used": "if a():\n    import x",
}


@pytest.mark.parametrize("source", SAFE.values(), ids=SAFE)
def test_a_safe_idiom_is_no_finding(look, source):
    assert look(source) == []


def test_names_of_one_try_are_one_finding_and_uses_that_cannot_fail_are_left_out(look):
    source = """
        try:
            import x
            from x import y
        except ImportError:
            pass
        def f(): return x.a
        def g(): return y
        def h():
            try:
                return x.b
            except NameError:
                return None
    """
    (finding,) = look(source, findings=True)
    assert "`x`, `y` are bound only if" in finding.message
    assert [related.line for related in finding.related] == [7, 8]


def test_a_preference_that_the_file_asks_for_elsewhere_is_a_warning_that_says_where(look):
    source = """
        import os
        if os.environ.get('USE_X'):
            import x
        def f(): return x.y
        def g(o):
            if os.environ.get('USE_X'):
                o.f()
    """
    (finding,) = look(source, findings=True)
    assert finding.severity == "warning"
    assert "line 7 asks for that condition" in finding.message


def test_a_condition_that_another_file_refuses_with_a_reason_is_a_note_that_says_where(tmp_path):
    names = "from p.flags import has_x\nif has_x():\n    import x\ndef f(): return x.y\n"
    refusals = {
        "assert": "def g():\n    assert has_x(), 'x is missing'\n",
        "raise": "def g():\n    if not has_x():\n        raise ImportError('x')\n",
        "answer": "def g():\n    if not has_x():\n        return False, 'x is missing'\n",
        "registry": "NAMES = ['p.names.f']\ndef g():\n    assert has_x()\n",
        "silence": "def g():\n    if not has_x():\n        return False\n",
    }
    found = {}
    for name, refusal in refusals.items():
        package = tmp_path / name / "p"
        package.mkdir(parents=True)
        for file, text in {"__init__": "", "flags": "", "names": names, "caller": refusal}.items():
            (package / f"{file}.py").write_text(text)
        (finding,) = scan([package / "names.py"]).findings
        found[name] = finding.severity
        assert ("caller.py:2 refuses" in finding.message) == (found[name] == "note")
    assert found == {
        "assert": "note",
        "raise": "note",
        "answer": "note",
        "registry": "warning",  # whoever chooses it by name does not pass there
        "silence": "warning",
    }


def test_what_reads_a_path_from_the_environment_is_no_preference(look):
    assert look("import os\nif os.environ.get('X_PATH'):\n    import x\ndef f(): return x.y") == [
        "conditional-name/warning"
    ]
