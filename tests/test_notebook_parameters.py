# SPDX-License-Identifier: Apache-2.0
import json

import jsonschema
import nbformat
import pytest
from click.testing import CliRunner
from nbformat.v4 import new_code_cell
from papermill.cli import papermill

from aiterlab import suite
from aiterlab.attention import cases as attention_cases
from aiterlab.attention import workloads
from aiterlab.attention.providers import PROVIDERS, Place
from aiterlab.machines.description import ARCHITECTURES, SWITCH_POSITIONS
from aiterlab.paths import notebooks_dir
from aiterlab.spec_decode import models, prompts, study
from aiterlab.suite import notebook_parameters as known
from aiterlab.suite.lint import lint_notebook
from aiterlab.suite.notebook_parameters import MODELS, schema
from aiterlab.suite.parameter_file import read_parameter_file
from aiterlab.suite.parameter_model import ParameterError
from aiterlab.suite.parameters import effective_values, load_notebook, parameters_cell, read_parameters
from aiterlab.suite.rewrite import main as rewrite
from aiterlab.trees import TreeError
from aiterlab.trees import get as get_tree

REPRODUCE, FIX, AUDIT, KERNELS, EAGLE, PLOT = MODELS
NOTEBOOKS = sorted(notebooks_dir().glob("*.ipynb"))


def refused(stem, **values):
    """The one line with which values are refused."""
    with pytest.raises(ParameterError) as caught:
        MODELS[stem].checked(values, stem)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(stem)
    return message


def accepts(stem, **values):
    checked = MODELS[stem].checked(values, stem)
    assert {name: checked[name] for name in values} == values
    return checked


@pytest.mark.parametrize("stem", MODELS)
def test_defaults_pass_their_own_model_and_come_back_in_order(stem):
    defaults = MODELS[stem].defaults()
    assert list(MODELS[stem].checked(defaults, stem)) == list(defaults) == list(MODELS[stem].model_fields)


def test_every_notebook_has_a_model():
    assert {path.stem for path in NOTEBOOKS} == set(MODELS)


@pytest.mark.parametrize(
    ("stem", "values", "said"),
    [
        (REPRODUCE, {"worker": 2}, "unknown parameter 'worker'; did you mean 'workers'?"),
        (REPRODUCE, {"workers": "2"}, ".workers: input should be a valid integer; got '2', wanted int such as 0"),
        (REPRODUCE, {"workers": 2.0}, "valid integer"),
        (REPRODUCE, {"workers": True}, "valid integer"),
        (REPRODUCE, {"workers": -1}, "greater than or equal to 0; got -1"),
        (REPRODUCE, {"installed": [1]}, ".installed[0]: input should be a valid boolean; got 1"),
        (REPRODUCE, {"installed": ["true"]}, "valid boolean"),
        (REPRODUCE, {"profile": "smok"}, ".profile: unknown choice 'smok'; did you mean 'smoke'?"),
        (REPRODUCE, {"switches": ["unset", "on"]}, ".switches[1]: unknown choice 'on'; there are: unset, 0, 1"),
        (REPRODUCE, {"switches": [0]}, "got 0"),
        (REPRODUCE, {"switches": []}, "at least 1 item, not 0"),
        (REPRODUCE, {"architectures": ["gfx94"]}, "did you mean 'gfx942'?"),
        (REPRODUCE, {"trees": ["regresed"]}, ".trees[0]: unknown tree 'regresed'; did you mean 'regressed'?"),
        (REPRODUCE, {"trees": ["0.16.0"]}, "unknown tree '0.16.0'; write release:X.Y.Z"),
        (REPRODUCE, {"trees": ["releases:all"]}, "unknown tree"),
        (REPRODUCE, {"trees": ["regressed", "regressed"]}, ".trees: 'regressed' is there twice"),
        (REPRODUCE, {"trees": "regressed"}, "valid list; got 'regressed', wanted list[str] such as ['release"),
        (REPRODUCE, {"trees": ["path:/a\nb"]}, "unknown tree 'path:/a\\nb'"),
        (REPRODUCE, {"trees": ["path:/\ud800"]}, "no text in UTF-8"),
        (FIX, {"regressed": "hotfixed"}, "name the tree before it"),
        (FIX, {"upstream": "regressed"}, "name another tree"),
        (FIX, {"upstream": "hotfixed"}, "name another tree"),
        (FIX, {"machine": "gfx94"}, ".machine: unknown choice 'gfx94'; did you mean 'gfx942'?"),
        (AUDIT, {"cold_share": 1.5}, "less than or equal to 1; got 1.5"),
        (AUDIT, {"cold_share": float("nan")}, "finite"),
        (AUDIT, {"cold_share": float("inf")}, "finite"),
        (AUDIT, {"cold_share": "0.5"}, "valid number"),
        (AUDIT, {"compared": ["regressed"]}, "name two trees"),
        (AUDIT, {"looked_at": "release:0.16"}, "not among trees: 'release:0.16'; did you mean 'release:0.16.0'?"),
        (AUDIT, {"trees": ["releases:0.1.."], "seed": 2**32}, "less than"),
        (AUDIT, {"trees": ["releases:a..b"]}, "unknown tree"),
        (AUDIT, {"trees": ["releases:0.16."]}, "unknown tree"),
        (KERNELS, {"operations": ["decod"]}, ".operations[0]: unknown choice 'decod'; did you mean 'decode'?"),
        (KERNELS, {"operations": []}, "operations and cases are both empty"),
        (KERNELS, {"shape": {"head": 4}}, ".shape['head']: unknown choice 'head'; did you mean 'heads'?"),
        (KERNELS, {"shape": {"heads": 0}}, ".shape['heads']: input should be greater than or equal to 1"),
        (KERNELS, {"shape": {"heads": 6, "kv_heads": 4}}, "6 heads cannot share 4 kv_heads"),
        (KERNELS, {"dtypes": ["bf16"]}, "did you mean 'bfloat16'?"),
        (KERNELS, {"providers": ["vllm"]}, "unknown choice 'vllm'"),
        (KERNELS, {"machine": "native"}, "unknown choice 'native'"),
        (AUDIT, {"architectures": ["gfx950"]}, "lacks gfx942, on which most is varied; add it"),
        (KERNELS, {"checks": "tinny"}, "did you mean 'tiny'?"),
        (KERNELS, {"rounds": -1}, "greater than or equal to 0"),
        (KERNELS, {"cases": ["verify_1x32k"]}, "unknown case 'verify_1x32k'; write decode_64x8k"),
        (KERNELS, {"cases": ["decode_q4_1x32k"]}, "unknown case"),
        (KERNELS, {"cases": ["decode_0x32k"]}, "unknown case"),
        (KERNELS, {"compiled": []}, "at least 1 item"),
        (EAGLE, {"draft_tokens": [2, 0]}, ".draft_tokens[1]: input should be greater than or equal to 1; got 0"),
        (EAGLE, {"draft_tokens": []}, "at least 1 item"),
        (EAGLE, {"draft_tokens": [2, 2]}, "2 is there twice"),
        (EAGLE, {"temperatures": [1.0]}, "0 must be among them"),
        (EAGLE, {"temperatures": [0.0, -1.0]}, "greater than or equal to 0; got -1.0"),
        (EAGLE, {"temperatures": [0.0, float("inf")]}, "finite"),
        (EAGLE, {"samples": 0}, "greater than or equal to 1"),
        (EAGLE, {"methods": ["eagel"]}, "did you mean 'eagle'?"),
        (EAGLE, {"methods": ["ngram"]}, "name eagle or eagle3"),
        (EAGLE, {"models": {"target": "m"}, "methods": ["eagle"]}, "models names no eagle"),
        (EAGLE, {"models": {"eagle": "m"}, "methods": ["eagle"]}, "models names no target"),
        (EAGLE, {"models": {"targt": "m"}}, "did you mean 'target'?"),
        (EAGLE, {"cells": ["128x"]}, "unknown cell '128x'; write sequences x context"),
        (EAGLE, {"tasks": ["prosa"]}, "did you mean 'prose'?"),
        (EAGLE, {"beside": ["server"]}, "unknown test 'server'; did you mean 'serve'?"),
        (EAGLE, {"beside": ["tensor 0"]}, "unknown test 'tensor 0'"),
        (EAGLE, {"accuracy": {"gsm8k": -1}}, ".accuracy['gsm8k']: input should be greater than or equal to 0"),
        (EAGLE, {"trees": ["regresed"]}, "did you mean 'regressed'?"),
        (PLOT, {"reference": "false"}, "valid boolean"),
        (PLOT, {"runs": [""]}, "at least 1 character"),
    ],
)  # fmt: skip
def test_what_would_fail_later_is_refused_in_one_line_that_says_the_mend(stem, values, said):
    assert said in refused(stem, **values)


@pytest.mark.parametrize(
    ("stem", "values"),
    [
        (REPRODUCE, {"trees": ["installed", "path:../vllm é", "hotfixed-without-3:release:0.15.0.post1"]}),
        (REPRODUCE, {"architectures": ["native"], "workers": 64}),
        (FIX, {"regressed": "release:0.15.0", "upstream": "path:/x"}),
        (AUDIT, {"trees": ["releases:..0.15.1", "hotfixed:hotfixed", "releases:0.16.0.."], "looked_at": "a tree"}),
        (AUDIT, {"trees": ["releases:all", "releases:0.16", "releases:..", "releases:0.16.0..0.17.0"]}),
        (AUDIT, {"cold_share": 0, "compared": ["regressed", "release:0.32.0"]}),
        (KERNELS, {"operations": [], "cases": ["verify_q4_16x4k_page64"], "shape": {"heads": 8}}),
        (EAGLE, {"models": {"target": "org/name", "eagle": "/m"}, "methods": ["ngram", "eagle"], "cells": []}),
        (EAGLE, {"beside": [], "trees": [], "accuracy": {}, "tasks": ["file:/a b.txt"], "temperatures": [0]}),
        (EAGLE, {"beside": ["tensor 8"], "cells": ["8b:1x16384"]}),
        (PLOT, {"runs": ["../old", "results/new"], "reference": False}),
    ],
)  # fmt: skip
def test_what_the_code_behind_takes_is_accepted(stem, values):
    accepts(stem, **values)


def test_every_row_of_every_profile_passes_its_model():
    import run_all

    for row in run_all.ROWS:
        for values in row.profiles.values():
            accepts(row.stem, **values)


def choices(literal):
    return set(literal.__args__)


def test_choices_are_those_of_the_code_behind(tmp_path, monkeypatch):
    assert choices(known.Architecture) == set(ARCHITECTURES)
    assert choices(known.ArchitectureOrNative) == {*ARCHITECTURES, "native"}
    assert choices(known.ArchitectureOrNone) == {*ARCHITECTURES, ""}
    assert choices(known.Switch) == set(SWITCH_POSITIONS)
    assert choices(known.Operation) == set(workloads.OPERATIONS)
    assert choices(known.Dtype) == set(workloads.DTYPES)
    assert choices(known.Provider) == set(PROVIDERS)
    assert choices(known.Sweep) == set(attention_cases.SWEEPS)
    assert choices(known.Method) == set(models.METHODS) - {"vanilla"}
    place, shape = Place("cpu", "x86_64"), dict.fromkeys(choices(known.ShapeField), 1)
    assert attention_cases.select(place, ["decode"], [], shape)
    accepts(EAGLE, tasks=list(prompts.TASKS))
    monkeypatch.setenv("AITERLAB_RUN_DIR", str(tmp_path))
    pair = models.Pair("eagle", tmp_path)
    with pytest.raises(ValueError, match="there are sabotage, backends, serve, tensor N and data N"):
        study.Study("x").beside(["nothing"], pair, 1, {"code": []}, 1, [], {})
    accepts(EAGLE, beside=["sabotage", "backends", "serve", "tensor 4", "data 4"])


NAMES_OF_CASES = [
    *workloads.CASES, *workloads.CPU_CASES, "verify_q4_16x4k_page64", "decode_64x8k_int8", "gather_1x100_fp8",
    "verify_1x32k", "decode_q4_1x32k", "decod_1x1", "prefill_2x", "decode_0x8", "decode_1x8_page7", "_", "",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES_OF_CASES)
def test_names_of_cases_are_those_that_can_be_parsed(name):
    try:
        attention_cases.parse(name)
    except ValueError:
        refused(KERNELS, cases=[name])
    else:
        accepts(KERNELS, cases=[name])


@pytest.mark.parametrize("cell", ["1x128", "8b:1x16384", "x1", "1x", "8c:1x1", "1 x 1", "a"])
def test_cells_are_those_that_can_be_read(cell):
    try:
        study.cells_of([cell])
    except ValueError:
        refused(EAGLE, cells=[cell])
    else:
        accepts(EAGLE, cells=[cell])


@pytest.mark.parametrize(
    "name", ["regresed", "release:", "release:1", "hotfixed-without-8", "hotfixed:nothing", "path:", ""]
)
def test_names_that_no_tree_can_have_are_refused(name):
    if name != "path:":  # a folder: the working one
        with pytest.raises(TreeError, match="unknown tree"):
            get_tree(name)
    refused(REPRODUCE, trees=[name])


@pytest.mark.parametrize("stem", MODELS)
def test_help_or_default_names_every_choice(stem):
    for name, field in schema(stem)["properties"].items():
        items = field.get("items", {})
        for choice in [*field.get("enum", ()), *items.get("enum", ()), *field.get("propertyNames", {}).get("enum", ())]:
            told = f"{field['description']} {json.dumps(field['default'])}"
            if (stem, name) == (KERNELS, "machine"):  # its line would be too long
                told += schema(stem)["properties"]["architectures"]["description"] + '"gfx942", "gfx950"'
            assert str(choice) in told, (name, choice)


@pytest.mark.parametrize("stem", MODELS)
def test_the_schema_accepts_the_defaults_and_is_closed(stem):
    found, defaults = schema(stem), MODELS[stem].defaults()
    jsonschema.Draft202012Validator.check_schema(found)
    jsonschema.validate(defaults, found)
    for wrong in ({"profile": "smok"}, {"nothing": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(defaults | wrong, found)


def test_the_schema_holds_bounds_grammar_and_help():
    properties = schema(EAGLE)["properties"]
    assert properties["draft_tokens"]["items"]["minimum"] == 1 and properties["draft_tokens"]["minItems"] == 1
    assert properties["samples"]["description"].startswith("of each of four prompts")
    assert "regressed" in properties["trees"]["items"]["pattern"]
    with pytest.raises(ParameterError, match="did you mean '05_run_eagle_spec_decode'"):
        schema("05_run_eagle")


# The cell


def copy_of(path, folder, change):
    notebook = nbformat.read(path, 4)
    change(notebook)
    nbformat.write(notebook, folder / path.name)
    return folder / path.name


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("workers: int = 0", "workers: int = 1", "workers: its default is 1, in the model 0"),
        ("workers: int = 0", "workers: float = 0", "workers: its type is float, in the model int"),
        ("for one per core", "for all", "workers: its help is"),
        ("workers: int", "worker: int", "the model has no parameter 'worker'; did you mean 'workers'?"),
        ("# states", "# state", "trees: its help is"),
        ('profile: str = "standard"', "profile: bool = True", "profile: its type is bool"),
    ],
)
def test_the_lint_holds_the_cell_against_the_model(tmp_path, old, new, said):
    def change(notebook):
        cell = parameters_cell(notebook)
        assert old in cell.source
        cell.source = cell.source.replace(old, new)

    path = copy_of(NOTEBOOKS[0], tmp_path, change)
    problems = lint_notebook(path)
    assert any(said in problem for problem in problems) and any("make format" in problem for problem in problems)
    assert rewrite([str(path)]) == 0
    assert path.read_text() == NOTEBOOKS[0].read_text() and lint_notebook(path) == []


def test_the_lint_sees_another_order(tmp_path):
    def change(notebook):
        cell = parameters_cell(notebook)
        cell.source = "\n".join(reversed(cell.source.splitlines()))

    assert any("another order" in problem for problem in lint_notebook(copy_of(NOTEBOOKS[0], tmp_path, change)))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("given = suite.check_parameters(STEM, globals())", "given = {}", "the cell after the parameters must say"),
        ('STEM = "01_reproduce_regression"', 'STEM = "1_reproduce"', "the name of the file"),
        ("parameters=given", "parameters={}", "must be saved with `parameters=given`"),
        ("workers=workers or None, ", "", "workers: no cell after the parameters reads it"),
    ],
)
def test_the_lint_wants_the_notebook_to_check_itself(tmp_path, old, new, said):
    def change(notebook):
        (cell,) = [cell for cell in notebook.cells if old in cell.source]
        cell.source = cell.source.replace(old, new)

    assert any(said in problem for problem in lint_notebook(copy_of(NOTEBOOKS[0], tmp_path, change)))


def test_rewrite_leaves_other_notebooks_alone_and_says_what_is_none(tmp_path, capsys):
    other = copy_of(NOTEBOOKS[0], tmp_path, lambda notebook: notebook.cells.pop()).rename(tmp_path / "mine.ipynb")
    before = other.read_text()
    assert rewrite([str(other)]) == 0 and other.read_text() == before
    assert rewrite([str(tmp_path / NOTEBOOKS[0].name)]) == 2
    assert "there is no such notebook" in capsys.readouterr().err


def test_an_edited_default_counts_and_a_lost_parameter_is_told(tmp_path):
    def change(notebook):
        cell = parameters_cell(notebook)
        cell.source = cell.source.replace("workers: int = 0", "workers: int = 3")

    parameters = read_parameters(load_notebook(copy_of(NOTEBOOKS[0], tmp_path, change)))
    assert effective_values(parameters, {}, REPRODUCE)["workers"] == 3
    with pytest.raises(ParameterError, match=r"\.workers: .*greater than or equal to 0"):
        effective_values(parameters, {"workers": -1}, REPRODUCE)
    del parameters["workers"]
    with pytest.raises(ParameterError, match="its parameters cell lacks workers"):
        effective_values(parameters, {}, REPRODUCE)


# papermill without run_all.py


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermills_own_help_is_complete(path):
    told = CliRunner().invoke(papermill, [str(path), "--help-notebook"])
    assert told.exit_code == 0, told.output
    unfolded = " ".join(told.output.split())
    model = MODELS[path.stem]
    for name, field in model.model_fields.items():
        assert f"{name}: {model.annotation(name)} (default" in unfolded
        assert " ".join(field.description.split()) in unfolded


def gate(stem, folder, *more):
    """A notebook with the parameters of `stem`, their check, and what else is given."""
    notebook = nbformat.read(notebooks_dir() / f"{stem}.ipynb", 4)
    index = notebook.cells.index(parameters_cell(notebook))
    start = new_code_cell(f'import pandas as pd\nfrom aiterlab import suite\nSTEM = "{stem}"')
    notebook.cells = [start, *notebook.cells[index : index + 2], *map(new_code_cell, more)]
    nbformat.write(notebook, folder / f"{stem}.ipynb")
    return str(folder / f"{stem}.ipynb")


def by_papermill(notebook, *options):
    done = CliRunner().invoke(
        papermill, [notebook, notebook.replace(".ipynb", ".done.ipynb"), "--no-progress-bar", *options]
    )
    return done.exit_code, str(done.exception or "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-p", "workers", "-1"], "workers: input should be greater than or equal to 0; got -1"),
        (["-p", "upstream", "007"], "upstream: input should be a valid string; got 7, .* -r NAME VALUE leaves it"),
        (["-r", "upstream", "007"], "upstream: unknown tree '007'"),
        (["-p", "installed", "true"], "installed: input should be a valid list; .* -y 'NAME: "),
        (["-y", "installed: ['true']"], r"installed\[0\]: input should be a valid boolean"),
        (["-p", "worker", "2"], "unknown parameter 'worker'; did you mean 'workers'"),
    ],
)
def test_under_papermill_alone_the_notebook_itself_refuses(tmp_path, options, said):
    code, error = by_papermill(gate(FIX, tmp_path), *options)
    assert code == 1
    with pytest.raises(ParameterError, match=said):
        raise ParameterError(next(line for line in error.splitlines() if line.startswith("ParameterError: ")))


@pytest.mark.slow
def test_under_papermill_alone_values_in_effect_are_shown(tmp_path):
    notebook = gate(FIX, tmp_path, "print(given['workers'], given['upstream'], given['switches'])")
    code, error = by_papermill(
        notebook, "-p", "workers", "2", "-y", "switches: ['0']", "-r", "upstream", "release:0.17.0"
    )
    assert code == 0, error
    executed = nbformat.read(notebook.replace(".ipynb", ".done.ipynb"), 4)
    assert executed.cells[-1].outputs[0].text == "2 release:0.17.0 ['0']\n"
    assert "in effect" in executed.cells[-2].outputs[0].data["text/html"]


@pytest.mark.parametrize("stem", MODELS)
def test_the_check_returns_what_is_in_the_notebook(stem):
    values = MODELS[stem].defaults()
    assert suite.check_parameters(stem, values | {"other": object()}) == values
    with pytest.raises(ParameterError, match="profile has no value; run the parameters cell first"):
        suite.check_parameters(stem, {})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("workers", object(), "workers: input should be a valid integer"),
        ("trees", ("regressed",), "trees: input should be a valid list"),
        ("profile", {(1, 2): {3}}, "profile: input should be"),
    ],
)
def test_what_is_no_json_at_all_is_refused_in_words_as_well(name, value, said):
    with pytest.raises(ParameterError, match=f"^{REPRODUCE}.{said}"):
        suite.check_parameters(REPRODUCE, MODELS[REPRODUCE].defaults() | {name: value})


def test_what_is_recorded_does_not_change_with_the_notebook():
    namespace = MODELS[EAGLE].defaults()
    given = suite.check_parameters(EAGLE, namespace)
    namespace["draft_tokens"].append(9)
    assert given["draft_tokens"] == [2, 4]


# The file


def file_of(tmp_path, text):
    path = tmp_path / "asked.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_parameters_of_several_notebooks_come_from_one_file(tmp_path):
    wanted = {REPRODUCE: {"workers": 2, "trees": ["path:/é"]}, EAGLE: {"temperatures": [0, 0.5]}}
    assert read_parameter_file(file_of(tmp_path, json.dumps(wanted))) == wanted
    assert read_parameter_file(file_of(tmp_path, '{"mine": {}}'), ["mine"]) == {"mine": {}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "holds a list; write it as"),
        ('{"01_reproduce": {}}', "unknown notebook '01_reproduce'; did you mean '01_reproduce_regression'?"),
        ('{"02_apply_fix": 1}', "02_apply_fix holds a int"),
        ('{"02_apply_fix": {"workers": 1, "workers": 2}}', "the key 'workers' is there twice"),
        ('{"02_apply_fix": {}, "02_apply_fix": {}}', "the key '02_apply_fix' is there twice"),
        ('{"03_audit_backend_selection": {"cold_share": NaN}}', "NaN is not JSON"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, said):
    path = file_of(tmp_path, text)
    with pytest.raises(ParameterError) as caught:
        read_parameter_file(path)
    message = str(caught.value)
    assert said in message and "\n" not in message and message.startswith(str(path))


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(ParameterError, match="No such file"):
        read_parameter_file(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'{"\xe9": 1}')
    with pytest.raises(ParameterError, match="not UTF-8"):
        read_parameter_file(tmp_path / "latin.json")
