# SPDX-License-Identifier: Apache-2.0
"""The scan as a whole: files, suppressions, formats, exit codes, and what it finds in real releases."""

import argparse
import ast
import functools
import json
import subprocess
import symtable
import sys
import time
from pathlib import Path

import pytest
import yaml

import aiterlab
from aiterlab import trees
from aiterlab.scan import RULES, output, scan
from aiterlab.scan.cli import add_parser
from aiterlab.scan.formulas import FALSE, TRUE, Formulas, TooComplex
from aiterlab.scan.project import Project, python_files
from aiterlab.scan.scopes import FUNCTIONS, Scope, module_scope

FAULT = "try:\n    import x\nexcept ImportError:\n    pass\ndef f():\n    return x.y\n"
ALLOW = "# aiterlab: allow conditional-name because x is installed wherever f is called"


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    options = parser.parse_args(["scan", *map(str, arguments)])
    return options.run(options)


@pytest.fixture
def faulty(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faulty.py").write_text(FAULT)
    return tmp_path / "faulty.py"


# Files


def test_what_cannot_be_read_is_one_line_and_the_rest_goes_on(tmp_path, capsys):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "binary.py").write_bytes(b"x = 1\0")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "declared.py").write_bytes(b"# coding: latin-1\n# \xe9\n")
    (tmp_path / "unknown.py").write_bytes(b"# coding: no-such-code\n")
    (tmp_path / "windows.py").write_bytes(b"\xef\xbb\xbf" + FAULT.replace("\n", "\r\n").encode())
    report = scan([tmp_path])
    assert [f"{finding.path.name}:{finding.line}" for finding in report.findings] == ["windows.py:2"]
    assert [path.name for path, _ in report.notices] == ["binary.py", "broken.py", "latin.py", "unknown.py"]
    assert run(tmp_path) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert "broken.py: is not Python here: line 1:" in said[1]


def test_hidden_folders_and_installed_packages_are_left_out(tmp_path):
    for folder in (".venv", "__pycache__", "site-packages", "package"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.py").touch()
    assert python_files(tmp_path) == [tmp_path / "package" / "m.py"]


def test_a_file_that_is_named_alone_gives_the_findings_it_gives_in_its_package(tmp_path):
    package = tmp_path / "p"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "envs.py").write_text("if TYPE_CHECKING:\n    USE_FLASH: bool = False\n")
    (package / "m.py").write_text("from p import envs\ndef is_flash_available(): return envs.USE_FLASH\n")
    assert scan([package / "m.py"]).findings == scan([package]).findings != []


def test_conditions_beyond_measure_end_in_a_notice(tmp_path, monkeypatch):
    (tmp_path / "m.py").write_text(FAULT)
    monkeypatch.setattr("aiterlab.scan.formulas.Formulas.__init__.__defaults__", (3,))
    report = scan([tmp_path])
    assert [text for _, text in report.notices] == ["its conditions are too many to follow"]


# Suppressions


@pytest.mark.parametrize(
    ("line", "text"),
    [(2, f"    import x  {ALLOW}"), (2, f"    {ALLOW}\n    import x"), (6, f"    return x.y  {ALLOW}")],
    ids=["at the binding", "above it", "at the use"],
)
def test_a_suppression_with_a_reason_accepts_the_finding(tmp_path, line, text):
    lines = FAULT.splitlines()
    lines[line - 1] = text
    (tmp_path / "m.py").write_text("\n".join(lines))
    report = scan([tmp_path])
    assert report.findings == []
    ((finding, reason),) = report.accepted
    assert (finding.rule, reason) == ("conditional-name", "x is installed wherever f is called")


@pytest.mark.parametrize(
    ("comment", "fault"),
    [
        ("# aiterlab: allow conditional-name", "gives no reason"),
        ("# aiterlab: allow because I say so", "names no rule"),
        ("# aiterlab: allow conditional because x", "names no such rule: conditional"),
        ("# aiterlab: allow builtin-stand-in because x", "suppresses nothing"),
    ],
)
def test_a_suppression_that_is_wrong_or_unused_is_a_finding_itself(tmp_path, comment, fault):
    (tmp_path / "m.py").write_text(FAULT.replace("import x", f"import x  {comment}"))
    findings = scan([tmp_path]).findings
    assert [finding.rule for finding in findings] == ["suppression", "conditional-name"]
    assert fault in findings[0].message


def test_a_string_that_looks_like_a_suppression_is_none(tmp_path):
    (tmp_path / "m.py").write_text(f'TEXT = "{ALLOW}"\n')
    assert scan([tmp_path]).findings == []


# The command


def test_exit_codes(faulty, tmp_path, capsys):
    assert run(faulty) == 1
    assert run("--severity", "error", faulty) == 0
    assert run("--rule", "positional-order", faulty) == 0
    assert run(tmp_path / "nowhere") == 2
    assert "no such file or folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        run("--format", "xml", faulty)
    assert stopped.value.code == 2


def test_the_text_names_file_and_line_and_one_mend(faulty, capsys):
    run(faulty)
    first, mend, last = capsys.readouterr().out.splitlines()
    assert first.startswith("faulty.py:2:5: warning: conditional-name: `x` is bound only if `import x` works")
    assert mend.startswith("    mend: bind it in the except branch too")
    assert last.startswith("1 files in ") and last.endswith("1 warning")


def test_json_holds_all_that_is_known(faulty, capsys):
    run("--format", "json", faulty)
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["path"] == "faulty.py"
    assert finding["related"] == [{"path": "faulty.py", "line": 6, "text": "`x` is used here"}]


def test_sarif_has_what_the_standard_requires(faulty):
    faulty.with_name("accepted.py").write_text(FAULT.replace("import x", f"import x  {ALLOW}"))
    faulty.with_name("broken.py").write_text("def\n")
    log = json.loads(output.as_sarif(scan([faulty.parent])))
    assert log["version"] == "2.1.0" and log["$schema"].endswith("sarif-schema-2.1.0.json")
    (run_,) = log["runs"]
    driver = run_["tool"]["driver"]
    assert [rule["id"] for rule in driver["rules"]] == list(RULES)
    assert all(rule["shortDescription"]["text"] and rule["fullDescription"]["text"] for rule in driver["rules"])
    for result in run_["results"]:
        assert result["message"]["text"] and result["level"] in ("note", "warning", "error")
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        for location in (*result["locations"], *result["relatedLocations"]):
            physical = location["physicalLocation"]
            assert not physical["artifactLocation"]["uri"].startswith("/")
            assert physical["region"]["startLine"] >= 1
    accepted = [result for result in run_["results"] if "suppressions" in result]
    assert [result["suppressions"][0]["kind"] for result in accepted] == ["inSource"]
    (invocation,) = run_["invocations"]
    assert invocation["executionSuccessful"] is True
    assert len(invocation["toolExecutionNotifications"]) == 1


def test_the_scan_starts_at_once_and_imports_nothing_heavy(faulty):
    code = (
        "import sys; from aiterlab.scan.cli import add_parser; import aiterlab.scan; "
        "print([m for m in ('torch', 'numpy', 'vllm', 'pandas', 'transformers') if m in sys.modules])"
    )
    package = str(Path(aiterlab.__file__).parents[1])
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": package}, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert time.perf_counter() - started < 5


def test_the_pre_commit_hook_runs_this_command_on_the_files_that_change():
    (hook,) = yaml.safe_load((Path(__file__).parents[1] / ".pre-commit-hooks.yaml").read_text())
    assert hook["entry"] == "python -m aiterlab scan"
    assert hook["types"] == ["python"]


# Its foundations


def test_formulas_are_equal_exactly_if_they_mean_the_same():
    formulas = Formulas()
    a, b = formulas.atom("a"), formulas.atom("b")
    neither = formulas.negation(formulas.either(a, b))
    assert neither == formulas.both(formulas.negation(a), formulas.negation(b))
    assert formulas.either(a, formulas.negation(a)) == TRUE
    assert formulas.both(a, formulas.negation(a)) == FALSE
    assert formulas.given(formulas.both(a, b), "a", True) == b
    assert formulas.forget(formulas.both(a, b), lambda key: key == "a") == b
    assert formulas.toggled(formulas.both(a, b), "a") == formulas.both(formulas.negation(a), b)
    assert formulas.example(neither) == [("a", False), ("b", False)]
    with pytest.raises(TooComplex), formulas.allowance(0):
        formulas.both(b, formulas.atom("c"))


def named_by_symtable(table: symtable.SymbolTable, found: list) -> list:
    """Every function of a source, in order, with its own names and those of the module that it uses."""
    for child in table.get_children():
        if child.get_type() == "function" and child.get_name() not in ("listcomp", "genexpr", "setcomp", "dictcomp"):
            symbols = [symbol for symbol in child.get_symbols() if not symbol.get_name().startswith(".")]
            found.append((child.get_name(), child.get_lineno(), {s.get_name() for s in symbols if s.is_local()}))
        named_by_symtable(child, found)
    return found


def named_by_scan(scope: Scope, node: ast.AST, found: list) -> list:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            inner = scope.inner(child)
            if isinstance(child, FUNCTIONS):
                found.append((getattr(child, "name", "lambda"), child.lineno, set(inner.names - inner.outer_names)))
            named_by_scan(inner, child, found)
        else:
            named_by_scan(scope, child, found)
    return found


@pytest.mark.parametrize("path", sorted((Path(aiterlab.__file__).parent / "scan").glob("*.py")), ids=lambda p: p.stem)
def test_scopes_agree_with_pythons_own_symbol_table(path):
    text = path.read_text()
    tree = ast.parse(text)
    mine = named_by_scan(module_scope(tree), tree, [])
    theirs = named_by_symtable(symtable.symtable(text, str(path), "exec"), [])
    assert sorted(mine, key=str) == sorted(theirs, key=str)


def test_a_name_is_found_through_re_exports_relative_imports_and_bases(tmp_path):
    package = tmp_path / "p"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("from .inner import Thing as Other\n")
    (package / "inner" / "__init__.py").write_text("from ..deep import Thing\n")
    (package / "deep.py").write_text("class Base:\n    def f(self): ...\nclass Thing(Base): ...\nthing = Thing()\n")
    (package / "m.py").write_text("from p import Other\nimport p.deep\nloop = loop\n")
    project = Project()
    source = project.source(package / "m.py")
    for dotted in ("Other.f", "p.deep.Thing.f", "p.deep.thing.f"):
        (place,) = project.find(source, dotted)
        assert (place.node.name, place.owner.name) == ("f", "Base"), dotted
    assert project.find(source, "p.nothing") == project.find(source, "nobody") == []
    assert [place.node.lineno for place in project.find(source, "loop")] == [3]


# Real releases


@functools.cache
def findings_of(source: Path):
    return scan([source]).findings


def of_rule(name: str, rule: str) -> list[str]:
    source = trees.get(name).source
    return [f"{f.path.relative_to(source)}/{f.severity}" for f in findings_of(source) if f.rule == rule]


@pytest.mark.slow
def test_the_trap_is_found_in_the_regressed_tree_and_nowhere_after_the_fix():
    assert of_rule("regressed", "builtin-stand-in") == ["v1/attention/backends/rocm_aiter_fa.py/error"]
    assert of_rule("release:0.15.1", "builtin-stand-in") == ["v1/attention/backends/rocm_aiter_fa.py/warning"]
    assert of_rule("release:0.16.0", "builtin-stand-in") == []
    assert of_rule("release:0.32.0", "builtin-stand-in") == []


@pytest.mark.slow
def test_all_that_the_regression_changed_is_found_and_gone_after_the_fix():
    gates = ["_aiter_ops.py/warning", "v1/spec_decode/eagle.py/warning"]
    assert of_rule("regressed", "preference-gate") == gates
    assert "_aiter_ops.py/warning" in of_rule("regressed", "availability-reads-preference")
    for release in ("release:0.15.1", "release:0.16.0"):
        assert of_rule(release, "preference-gate") == []
        assert "_aiter_ops.py/warning" not in of_rule(release, "availability-reads-preference")
