# SPDX-License-Identifier: Apache-2.0
"""Acting at the moment of an import; each check has an interpreter of its own, whose import system it changes."""

import pytest


@pytest.fixture
def modules(tmp_path):
    """A folder with modules to import: a package, a module that imports another, one that fails."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("value = 'package'\n")
    (tmp_path / "package" / "part.py").write_text("value = 'part'\n")
    (tmp_path / "outer.py").write_text("import inner\nseen = inner.value\n")
    (tmp_path / "inner.py").write_text("value = 'source'\n")
    (tmp_path / "failing.py").write_text("raise OSError('as it is')\n")
    return tmp_path


@pytest.fixture
def check(run_python, modules):
    """Run code with these modules on the import path."""

    def run(code: str) -> list[str]:
        return run_python(f"import sys; sys.path.insert(0, {str(modules)!r})\n{code}").splitlines()

    return run


def test_after_import_waits_for_the_import_and_causes_none(check):
    assert check(
        "from aiterlab.importing import after_import\n"
        "after_import('inner', lambda module: print('called', module.value))\n"
        "print('inner' in sys.modules)\n"
        "import inner\n"
        "print('imported')\n"
        "import inner\n"
        "from importlib import import_module; import_module('inner')\n"
    ) == ["False", "called source", "imported"]


def test_after_import_calls_at_once_what_is_imported_already(check):
    assert check(
        "from aiterlab.importing import after_import\n"
        "import inner\n"
        "after_import('inner', lambda module: print('called', module is inner))\n"
        "print('returned')\n"
    ) == ["called True", "returned"]


def test_after_import_acts_before_anybody_has_bound_a_name(check):
    assert check(
        "from aiterlab.importing import after_import\n"
        "after_import('inner', lambda module: setattr(module, 'value', 'patched'))\n"
        "import outer\n"
        "print(outer.seen)\n"
    ) == ["patched"]


def test_callbacks_run_in_the_order_of_their_registration_and_for_nested_imports(check):
    assert check(
        "from aiterlab.importing import after_import\n"
        "for n in (1, 2): after_import('inner', lambda module, n=n: print('inner', n))\n"
        "after_import('outer', lambda module: print('outer', module.seen))\n"
        "after_import('package.part', lambda module: print(module.__name__, sys.modules['package'].value))\n"
        "import outer, package.part\n"
    ) == ["inner 1", "inner 2", "outer source", "package.part package"]


def test_a_callback_may_register_and_import_further_modules(check):
    assert check(
        "from aiterlab.importing import after_import\n"
        "def first(module):\n"
        "    after_import('inner', lambda module: print('inner'))\n"
        "    import outer\n"
        "    print('package')\n"
        "after_import('package', first)\n"
        "import package\n"
    ) == ["inner", "package"]


def test_a_module_that_is_being_imported_is_not_yet_called_back(check, modules):
    (modules / "early.py").write_text(
        "from aiterlab.importing import after_import\n"
        "after_import('early', lambda module: print('called', hasattr(module, 'late')))\n"
        "late = 1\n"
    )
    # The import has passed the finders already, so nothing is called now; above all not on the half-made module.
    assert "called False" not in check("import early")


def test_a_watched_module_keeps_its_own_loader_and_source(check):
    assert check(
        "from aiterlab.importing import after_import\n"
        "after_import('inner', lambda module: None)\n"
        "import inner, inspect, importlib.machinery as m\n"
        "loaders = inner.__loader__, inner.__spec__.loader\n"
        "print(*[isinstance(loader, m.SourceFileLoader) for loader in loaders])\n"
        "print(inspect.getsource(inner).strip())\n"
    ) == ["True True", "value = 'source'"]


def test_a_module_that_fails_fails_as_it_would_and_calls_nobody(check):
    assert check(
        "from aiterlab.importing import after_import\n"
        "after_import('failing', lambda module: print('called'))\n"
        "after_import('not_there', lambda module: print('called'))\n"
        "for name in ('failing', 'not_there'):\n"
        "    try: __import__(name)\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    ) == ["OSError as it is", "ModuleNotFoundError No module named 'not_there'"]


def test_serve_answers_the_claimed_names_and_no_other(check):
    assert check(
        "from aiterlab import importing\n"
        "def fill(module): module.answer = module.__name__.upper()\n"
        "importing.serve(lambda name: name.startswith('made_up'), fill, 'a test')\n"
        "import importlib.util, inner, made_up_one, made_up_one.part\n"
        "print(made_up_one.answer, made_up_one.part.answer, made_up_one.__file__, inner.value)\n"
        "print(importlib.util.find_spec('made_up_two').origin, importlib.util.find_spec('other'))\n"
        "print('made_up_two' in sys.modules)\n"
    ) == ["MADE_UP_ONE MADE_UP_ONE.PART <a test>/made_up_one source", "a test None", "False"]


def test_a_served_module_is_before_an_installed_one(check):
    assert check(
        "from aiterlab import importing\n"
        "importing.serve('inner'.__eq__, lambda module: setattr(module, 'value', 'served'), 'a test')\n"
        "import outer; print(outer.seen)\n"
    ) == ["served"]


def test_hide_makes_a_package_look_as_if_it_were_not_installed(check):
    assert check(
        "from aiterlab import importing\n"
        "importing.hide('package')\n"
        "importing.hide('outer')\n"
        "import importlib.util, inner\n"
        "print(importlib.util.find_spec('package'), importlib.util.find_spec('outer'), inner.value)\n"
        "for name in ('package', 'package.part', 'outer'):\n"
        "    try: __import__(name)\n"
        "    except ModuleNotFoundError as error: print(error)\n"
    ) == ["None None source", *[f"No module named '{name}'" for name in ("package", "package", "outer")]]


def test_hide_leaves_distributions_to_be_found(check):
    assert check(
        "import importlib.metadata as metadata\n"
        "from aiterlab import importing\n"
        "before = {d.name for d in metadata.distributions()}\n"
        "importing.hide('package')\n"
        "print({d.name for d in metadata.distributions()} == before, 'pytest' in before)\n"
    ) == ["True True"]


def test_hide_refuses_what_is_imported_already(check):
    assert check(
        "from aiterlab import importing\n"
        "import inner\n"
        "try: importing.hide('package', 'inner')\n"
        "except RuntimeError as error: print(error)\n"
        "import package; print(package.value)\n"
    ) == ["cannot hide what is imported already: inner", "package"]


def test_a_hidden_package_is_hidden_from_watchers_too(check):
    assert check(
        "from aiterlab import importing\n"
        "importing.after_import('package', lambda module: print('called'))\n"
        "importing.hide('package')\n"
        "try: import package\n"
        "except ModuleNotFoundError as error: print(error)\n"
    ) == ["No module named 'package'"]
