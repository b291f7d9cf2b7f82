# SPDX-License-Identifier: Apache-2.0
"""What is done ahead of all cells is what each of them would have done."""

import functools
import importlib
import importlib.metadata
import inspect
import logging.config
import py_compile
import sys
from importlib import _bootstrap_external
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path

import jinja2
import pytest
import torch
from torch._library import effects

from aiterlab.probes import ahead

AITER = find_spec("aiter")
if AITER is None:
    pytest.skip("AITER is not installed", allow_module_level=True)
UTILS = Path(AITER.origin).parent / "jit" / "utils"


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


def test_the_signature_of_a_function_is_found_once_as_long_as_the_function_stays_as_it_is():
    asked = []

    def find(function, **options):
        asked.append(function)
        return inspect.signature(function, **options)

    remembering = ahead._remembering_last(find)

    def one(a: int, b=1, *, c=2): ...

    def other(a, *more): ...

    def check(times: int, **options) -> None:
        asked.clear()
        for _ in range(3):
            assert remembering(one, **options) == inspect.signature(one, **options)
        assert len(asked) == times

    check(1)
    check(0)
    check(3, eval_str=True)
    assert remembering(other) == inspect.signature(other)
    for change in (
        lambda: None,
        lambda: one.__annotations__.update(b=float),
        lambda: one.__kwdefaults__.update(c=3),
        lambda: setattr(one, "__defaults__", (4,)),
        lambda: setattr(one, "__code__", (lambda a, x=0, *, c=5: None).__code__),
    ):
        change()
        check(1)
    one.__wrapped__ = other
    check(3)
    assert [*remembering(one).parameters] == ["a", "more"]
    del one.__wrapped__
    one.__signature__ = inspect.signature(other)
    check(3)
    for unusual in (int.from_bytes, functools.partial(other, 1), SourceFileLoader, check):
        assert remembering(unusual) == inspect.signature(unusual)


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


def test_the_module_of_a_frame_is_found_without_a_search(monkeypatch):
    monkeypatch.setattr(ahead, "_find_module", pytest.fail)
    assert ahead._module(sys._getframe()) is sys.modules[__name__]


@pytest.mark.parametrize("name", [__name__, "nowhere", None])
def test_a_frame_that_is_not_of_the_module_it_names_is_searched_for(name):
    scope = {"sys": sys, "__name__": name}
    exec(compile("frame = sys._getframe()", "<made up>", "exec"), scope)
    assert ahead._module(scope["frame"]) is inspect.getmodule(scope["frame"])
    assert ahead._module(ahead.prepare) is ahead


def test_a_template_of_aiter_is_compiled_once_and_to_the_same(tmp_path, monkeypatch):
    text = "template<int N> void {{ name }}();{% for part in parts %} {{ part }}{% endfor %}"
    (tmp_path / "kernel.cpp.jinja").write_text(text)
    monkeypatch.setattr(jinja2.Environment, "compile", jinja2.Environment.compile)  # put back afterwards
    given = {"name": "paged", "parts": ["a", "b"]}
    expected = jinja2.Template(text).render(given)
    ahead._hold_templates(tmp_path)
    monkeypatch.setattr(jinja2.Environment, "_parse", None)  # what is compiled now fails
    assert jinja2.Template(text).render(given) == expected
    with pytest.raises(TypeError):
        jinja2.Template(text + " ").render(given)
    with pytest.raises(TypeError):  # another language, though the same text
        jinja2.Template(text, block_start_string="<%").render(given)


def test_the_kernels_of_an_operator_are_looked_for_when_they_are_asked_for():
    looked = []
    kernels = ahead._Kernels(lambda operator: looked.append(operator) or ["first", "second"], "operator")
    assert looked == []
    assert [*kernels] == ["first", "second"]
    assert (len(kernels), kernels[1], looked) == (2, "second", ["operator"])


def test_a_configuration_of_loggers_empties_their_caches_once_and_leaves_them_as_plainly(monkeypatch):
    plain, empty, emptied = logging.config._handle_existing_loggers, logging.Manager._clear_cache, []
    monkeypatch.setattr(logging.Manager, "_clear_cache", lambda manager: emptied.append(1) or empty(manager))
    names = [f"aiterlab_test.{name}" for name in ("one", "two")]
    counted = []
    for handle in (plain, ahead._emptying_caches_once(plain)):
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL)
            assert not logging.getLogger(name).isEnabledFor(logging.ERROR)  # and remembers that
        emptied.clear()
        handle(names, names, False)
        counted.append(len(emptied))
        assert [logging.getLogger(name).isEnabledFor(logging.ERROR) for name in names] == [True, True]
    assert counted == [2, 1]
    with pytest.raises(KeyError):
        ahead._emptying_caches_once(plain)(["no logger"], [], False)
    assert "_clear_cache" not in vars(logging.root.manager)


def test_torch_looks_for_the_effects_of_an_operator_when_they_are_asked_for(monkeypatch):
    looked = []

    class Holder(effects.EffectHolder):
        def _set_default_effect(self):
            looked.append(self.qualname)
            super()._set_default_effect()

    ahead._look_for_effects_when_asked(Holder)
    one, other = Holder("aten::relu"), Holder("aten::relu")
    other._effect = effects.EffectType.ORDERED
    assert looked == [] and other.effect is effects.EffectType.ORDERED
    assert one.effect is one.effect is effects.EffectHolder("aten::relu").effect is None
    assert looked == ["aten::relu"]
    assert not hasattr(one, "unknown")


def test_what_a_package_says_of_itself_is_read_once(monkeypatch):
    read = importlib.metadata.PathDistribution.read_text
    files = []
    monkeypatch.setattr(
        importlib.metadata.PathDistribution, "read_text", lambda self, name: files.append(name) or read(self, name)
    )
    for name in ("entry_points", "metadata"):
        plain = getattr(importlib.metadata.PathDistribution, name)
        monkeypatch.setattr(importlib.metadata.PathDistribution, name, plain)  # put back afterwards
    monkeypatch.setattr(importlib.metadata, "entry_points", importlib.metadata.entry_points)
    expected = set(importlib.metadata.entry_points(group="vllm.platform_plugins"))
    ahead._hold_metadata()
    files.clear()
    assert set(importlib.metadata.entry_points(group="vllm.platform_plugins")) == expected != set()
    assert importlib.metadata.version("torch") == torch.__version__
    assert importlib.metadata.version("torch") == torch.__version__
    assert files == ["METADATA"]


def test_entry_points_are_those_of_the_places_that_are_searched_now(monkeypatch, tmp_path):
    plain = importlib.metadata.entry_points
    remembered = ahead._remembering_places(plain)
    assert set(remembered(group="vllm.platform_plugins")) == set(plain(group="vllm.platform_plugins"))
    folder = tmp_path / "added-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: added\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[vllm.platform_plugins]\nadded = added:plugin\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert {point.name for point in remembered(group="vllm.platform_plugins", name="added")} == {"added"}
    assert set(remembered(group="vllm.platform_plugins")) == set(plain(group="vllm.platform_plugins"))


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package of two modules; one has been imported before."""
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "compiled"))
    monkeypatch.setattr(SourceFileLoader, "get_code", SourceFileLoader.get_code)
    monkeypatch.setattr(ahead, "_code", {})
    folder = tmp_path / "package"
    folder.mkdir()
    for name in ("imported", "other"):
        (folder / f"{name}.py").write_text(f"NAME = {name!r}\n")
    py_compile.compile(folder / "imported.py")
    return folder


def code(file: Path):
    return SourceFileLoader(file.stem, str(file)).get_code(file.stem)


def test_the_code_of_what_was_imported_before_is_held(package):
    ahead.hold_code([package])
    assert set(ahead._code[package]) == {str(package / "imported.py")}
    assert code(package / "imported.py") is code(package / "imported.py")
    for name in ("imported", "other"):
        scope: dict = {}
        exec(code(package / f"{name}.py"), scope)
        assert scope["NAME"] == name


def test_what_is_imported_later_is_held_too_and_old_packages_are_let_go(package, tmp_path):
    ahead.hold_code([package])
    held = code(package / "imported.py")
    py_compile.compile(package / "other.py")
    others = [tmp_path / str(n) for n in range(ahead._PACKAGES_HELD)]
    ahead.hold_code([*others[:-1], package])
    assert code(package / "imported.py") is held
    assert code(package / "other.py") is code(package / "other.py")
    ahead.hold_code(others)
    assert list(ahead._code) == others
    assert code(package / "imported.py") is not held


@pytest.mark.parametrize("text", [None, "this is no Python", "NAME = 'edited'"])
def test_a_file_that_changed_since_is_read_as_it_is(package, text):
    file = package / "imported.py"
    file.unlink()
    if text is not None:
        file.write_text(text)
    ahead.hold_code([package])
    if text is None or "no" in text:
        assert ahead._code == {package: {}}
        with pytest.raises(OSError if text is None else SyntaxError):
            code(file)
    else:
        scope: dict = {}
        exec(code(file), scope)
        assert scope["NAME"] == "edited"


def test_compiled_files_are_taken_from_where_an_installer_put_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(_bootstrap_external, "cache_from_source", _bootstrap_external.cache_from_source)
    files = {}
    for name in ("installed", "new", "tree"):
        (tmp_path / name).mkdir()
        files[name] = tmp_path / name / f"module_of_{name}.py"
        files[name].write_text("")
    for name in ("installed", "tree"):
        py_compile.compile(files[name])
    sys.pycache_prefix = str(tmp_path / "apart")
    ahead.share_compiled_files([tmp_path / "tree"])
    monkeypatch.setattr(sys, "path", [str(file.parent) for file in files.values()] + sys.path)
    for name, file in files.items():
        module = importlib.import_module(file.stem)
        del sys.modules[file.stem]
        beside = Path(module.__cached__).is_relative_to(tmp_path / name)
        assert (beside, Path(module.__cached__).exists()) == (name == "installed", True)
    assert {path.name.partition(".")[0] for path in (tmp_path / "apart").rglob("*.pyc")} == {
        "module_of_new",
        "module_of_tree",
    }
    assert not (files["new"].parent / "__pycache__").exists()


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Contents that were compiled anew since, in a process that keeps what it compiles; a folder with its code."""
    anew, compile_anew = [], SourceFileLoader.source_to_code

    def noting(loader, data, path, **options):
        anew.append(bytes(data).decode())
        return compile_anew(loader, data, path, **options)

    monkeypatch.setattr(SourceFileLoader, "source_to_code", noting)
    ahead.compile_once(tmp_path / "compiled")
    return anew


def code_of(file: Path, text: str):
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return SourceFileLoader("some", str(file)).source_to_code(text.encode(), str(file))


def test_what_several_trees_have_in_common_is_compiled_once(compiled, tmp_path):
    text = "def where():\n    return __file__\n"
    one, other = (code_of(tmp_path / tree / "module.py", text) for tree in ("one", "other"))
    assert compiled == [text]
    assert one.co_code == other.co_code
    for code, tree in ((one, "one"), (other, "other")):  # tracebacks and `inspect` name the file that was imported
        inner = next(part for part in code.co_consts if hasattr(part, "co_filename"))
        assert code.co_filename == inner.co_filename == str(tmp_path / tree / "module.py")
    code_of(tmp_path / "third" / "module.py", text + "MORE = 1\n")
    assert compiled == [text, text + "MORE = 1\n"]


@pytest.mark.parametrize("spoilt", [b"", b"none of it", b"\0" * 40, "cut"])
def test_a_spoilt_compiled_file_is_made_anew(compiled, tmp_path, spoilt):
    text = "NAME = 'value'\n"
    code_of(tmp_path / "one" / "module.py", text)
    (kept,) = (tmp_path / "compiled").iterdir()
    kept.write_bytes(kept.read_bytes()[:-9] if spoilt == "cut" else spoilt)
    for _ in range(2):
        scope: dict = {}
        exec(code_of(tmp_path / "other" / "module.py", text), scope)
        assert scope["NAME"] == "value"
    assert compiled == [text, text]
