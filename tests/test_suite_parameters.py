# SPDX-License-Identifier: Apache-2.0
import json

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from papermill.parameterize import parameterize_notebook
from suite_notebooks import write_notebook

from aiterlab.paths import notebooks_dir
from aiterlab.suite.lint import lint_notebook
from aiterlab.suite.parameters import ParameterError, effective_values, load_notebook, read_parameters

CELL = """\
trees: list[str] = [
    "regressed",
    "release:0.16.0",
]  # states of the source
commit: str = "0a1b2c3"  # git commit = short
workers: int = 2  # processes at once
tolerance: float = 1e-3  # relative error
strict: bool = True  # refuse warnings
mode: Literal["fast", "slow"] = "fast"  # pace
limit: int | None = None  # seconds, null for none
sizes: dict[str, int] = {"a": 1}  # rows"""


def parameters_of(tmp_path, source):
    return read_parameters(load_notebook(write_notebook(tmp_path / "01_x.ipynb", "print(1)", parameters=source)))


@pytest.fixture
def parameters(tmp_path):
    return parameters_of(tmp_path, CELL)


def test_names_annotations_defaults_and_help_are_read_in_order(parameters):
    assert list(parameters) == ["trees", "commit", "workers", "tolerance", "strict", "mode", "limit", "sizes"]
    assert parameters["trees"].default == ["regressed", "release:0.16.0"]
    assert parameters["trees"].help == "states of the source"
    assert parameters["commit"].help == "git commit = short"
    assert parameters["mode"].annotation == "Literal['fast', 'slow']"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("trees", '["path:/x"]', ["path:/x"]),
        ("commit", "12e4567", "12e4567"),
        ("commit", "0071234", "0071234"),
        ("commit", "true", "true"),
        ("commit", '"quoted"', "quoted"),
        ("workers", "4", 4),
        ("tolerance", "1", 1.0),
        ("strict", "false", False),
        ("mode", "slow", "slow"),
        ("mode", '"slow"', "slow"),
        ("limit", "null", None),
        ("limit", "3", 3),
        ("sizes", '{"b": 2}', {"b": 2}),
    ],
)
def test_a_value_from_the_command_line(parameters, name, text, value):
    read = parameters[name].from_text(text, name)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("trees", "regressed", "not JSON"),
        ("trees", '"regressed"', "valid list"),
        ("trees", '["a", 1]', r"trees\[1\]: input should be a valid string"),
        ("workers", "2.5", "valid integer"),
        ("workers", "true", "valid integer"),
        ("workers", '"2"', "valid integer"),
        ("tolerance", "NaN", "not JSON"),
        ("tolerance", "1e999", "finite"),
        ("strict", "1", "valid boolean"),
        ("limit", "soon", "not JSON"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_with_its_mend(parameters, name, text, said):
    with pytest.raises(ParameterError, match=said) as caught:
        parameters[name].from_text(text, name)
    message = str(caught.value)
    assert message.startswith(name) and "\n" not in message and parameters[name].annotation in message


def test_a_choice_that_there_is_not_is_refused_with_the_nearest(parameters):
    with pytest.raises(ParameterError, match=r"^mode: unknown choice 'fats'; did you mean 'fast'\?$"):
        parameters["mode"].from_text("fats", "mode")
    with pytest.raises(ParameterError, match=r"^mode: unknown choice 'x'; there are: fast, slow$"):
        parameters["mode"].from_text('"x"', "mode")


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, '["\\ud800"]', '["a\\nb", 1]'])
def test_hostile_text_is_refused_in_one_line(parameters, text):
    with pytest.raises(ParameterError) as caught:
        parameters["trees"].from_text(text, "trees")
    assert "\n" not in str(caught.value)


def test_overrides_are_laid_over_the_defaults_and_checked(parameters):
    values = effective_values(parameters, {"workers": 8}, "01_x")
    assert values["workers"] == 8 and values["commit"] == "0a1b2c3"
    with pytest.raises(ParameterError, match=r"01_x: unknown parameter 'worker'; did you mean 'workers'\?"):
        effective_values(parameters, {"worker": 8}, "01_x")
    with pytest.raises(ParameterError, match=r"01_x\.workers: input should be a valid integer"):
        effective_values(parameters, {"workers": "8"}, "01_x")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("workers = 2", "only lines such as"),
        ("import os", "only lines such as"),
        ("workers: int", "only lines such as"),
        ("workers: int = 1 + n", "must be a literal"),
        ("workers: int = 'two'", "its default"),
        ("when: datetime = 1", "not a parameter type"),
        ("run: __import__('os').system('false') = 1", "not a parameter type"),
        ("hf_token: str = ''", "secrets are no parameters"),
        ("api_key: str = ''", "secrets are no parameters"),
        ("api_key_hf: str = ''", "secrets are no parameters"),
        ("passphrase: str = ''", "secrets are no parameters"),
        ("a: int = 1\na: int = 2", "assigned twice"),
        ("a: int = ", "not Python"),
    ],
)
def test_a_cell_that_is_not_typed_literals_is_refused(tmp_path, source, said):
    with pytest.raises(ParameterError, match=said):
        parameters_of(tmp_path, source)


def test_names_that_only_sound_like_secrets_are_parameters(tmp_path):
    assert set(parameters_of(tmp_path, "max_tokens: int = 1\nkey_heads: int = 2")) == {"max_tokens", "key_heads"}


def test_exactly_one_parameters_cell(tmp_path):
    path = write_notebook(tmp_path / "01_x.ipynb", "print(1)")
    notebook = nbformat.read(path, 4)
    notebook.cells[1].metadata["tags"] = ["parameters"]
    with pytest.raises(ParameterError, match="found 2"):
        read_parameters(notebook)
    notebook.cells = notebook.cells[2:]
    with pytest.raises(ParameterError, match="found 0"):
        read_parameters(notebook)


def test_a_missing_or_broken_file_is_bad_input(tmp_path):
    with pytest.raises(ParameterError, match="no such notebook"):
        load_notebook(tmp_path / "none.ipynb")
    (tmp_path / "broken.ipynb").write_text("{")
    with pytest.raises(ParameterError, match="not a notebook"):
        load_notebook(tmp_path / "broken.ipynb")


# What papermill writes into its own cell


def after_papermill(value):
    """The value that a notebook's cell has, once papermill has written it there and Python has read it."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel, "papermill": {}})
    injected = parameterize_notebook(notebook, {"value": value})
    (cell,) = json.loads(nbformat.writes(injected), object_hook=nbformat.from_dict).cells  # as the file holds it
    namespace = {}
    exec("".join(cell.source), namespace)
    return namespace["value"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(JSON)
def test_every_json_value_reaches_the_notebook_as_it_is(value):
    assert repr(after_papermill(json.loads(json.dumps(value)))) == repr(value)


@pytest.mark.parametrize(
    "value",
    [
        "12e4567", "007", "1_000", "nan", "inf", "true", "None", "", " ", True, False, None, 0, -0.0, 1.0, 1e22, 5e-324,
        2**63, -(10**300), "it's \"quoted\"", '\'\'\'"""', "a\nb\r\n\tc", "\\", "C:\\new\\x41",
        "{braces} %s $x", "é 漢字 😀",
        "\u2028\x00\x1b[31m", "# no comment", [], {}, [[], {}], [True, "true", 1, 1.0, None],
        {"a b": {"'\"\\": [1, "2"]}, "": None, "é": -1},
    ],
)  # fmt: skip
def test_values_that_look_like_others_stay_what_they_are(value):
    assert repr(after_papermill(value)) == repr(value)


@pytest.mark.parametrize(
    "text", ["12e4567", "007", "1_000", "nan", "true", "None", "null", "1e999", "0x10", "[1]", "é"]
)
def test_a_name_that_looks_like_something_else_stays_a_name(parameters, text):
    assert after_papermill(parameters["commit"].from_text(text, "commit")) == text


READS_ALL = "print(names, workers)"


def test_a_clean_notebook_passes_the_lint(tmp_path):
    assert lint_notebook(write_notebook(tmp_path / "01_x.ipynb", "# Title", READS_ALL)) == []


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("def f():\n    pass", "no `def`"),
        ("class C:\n    pass", "no `class`"),
        ("try:\n    x = 1\nexcept E:\n    pass", "no `try`"),
        ("!pip install x", "no shell"),
        ("%%bash\nls", "no shell"),
        ("import time\ntime.sleep(1)", "no sleep"),
        ("for a in b:\n    for c in a:\n        print(c)", "no nested loop"),
        ("\n".join(f"x{i} = {i}" for i in range(16)), "16 lines"),
        ("x = (", "not Python"),
    ],
)
def test_the_lint_names_each_broken_habit(tmp_path, cell, said):
    problems = lint_notebook(write_notebook(tmp_path / "01_x.ipynb", READS_ALL, cell))
    assert len(problems) == 1 and problems[0].startswith("cell 3:") and said in problems[0]


def test_the_lint_finds_a_parameter_that_nothing_reads(tmp_path):
    path = write_notebook(tmp_path / "01_x.ipynb", "print(names)", "workers = 3")
    assert lint_notebook(path) == ["workers: no cell after the parameters reads it"]


def test_the_lint_finds_parameters_that_papermill_does_not_document(tmp_path):
    source = "names: int | None = 1  # count\nworkers: int = 1"
    problems = lint_notebook(write_notebook(tmp_path / "01_x.ipynb", READS_ALL, parameters=source))
    assert [problem.split(":")[0] for problem in problems] == ["names", "workers"]
    assert "--help-notebook" in problems[0] and "trailing comment" in problems[1]


def test_the_lint_finds_outputs_and_foreign_metadata(tmp_path):
    path = write_notebook(tmp_path / "01_x.ipynb", READS_ALL)
    notebook = nbformat.read(path, 4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="x")]
    notebook.metadata.kernelspec.name = "mine"
    notebook.metadata["widgets"] = {}
    nbformat.write(notebook, path)
    said = " ".join(lint_notebook(path))
    assert "cell 2: has outputs" in said and "the name python3" in said and "widgets" in said


def test_the_lint_finds_a_tag_that_nothing_reads(tmp_path):
    path = write_notebook(tmp_path / "01_x.ipynb", "# Title", READS_ALL)
    notebook = nbformat.read(path, 4)
    notebook.cells[2].metadata["tags"] = ["skip-exection"]
    nbformat.write(notebook, path)
    assert lint_notebook(path) == ["cell 3: unknown tag 'skip-exection'; did you mean 'skip-execution'?"]


def test_the_lint_reports_a_broken_parameters_cell(tmp_path):
    problems = lint_notebook(write_notebook(tmp_path / "01_x.ipynb", "print(1)", parameters="x = 1"))
    assert any("only lines such as" in problem for problem in problems)


@pytest.mark.parametrize("path", sorted(notebooks_dir().glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_projects_notebooks_are_views(path):
    assert lint_notebook(path) == []
