# SPDX-License-Identifier: Apache-2.0
"""Check that a notebook is a view: typed literal parameters, calls, tables, figures, one record, and no outputs in git.

These are the habits of the house that a program can see. Each returned line names the cell and what to do instead. A
notebook that has a model of its parameters must also declare exactly those, and let the model check them as it runs.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import nbformat
import papermill

from aiterlab.suite.notebook_parameters import MODELS
from aiterlab.suite.parameter_model import NotebookParameters, unknown
from aiterlab.suite.parameters import PARAMETERS_TAG, Parameter, ParameterError, load_notebook, read_parameters
from aiterlab.suite.tags import TAGS

LONGEST_CELL_LINES = 15
CHECK = "given = suite.check_parameters(STEM, globals())"
_DEFINITIONS = {
    ast.FunctionDef: "def",
    ast.AsyncFunctionDef: "async def",
    ast.ClassDef: "class",
    ast.Try: "try",
    ast.TryStar: "try",
}
_LOOPS = (ast.For, ast.AsyncFor, ast.While)


def lint_notebook(path: Path) -> list[str]:
    """Return one line for each broken habit; an empty list is a clean notebook."""
    notebook = load_notebook(path)
    problems = list(_metadata_problems(notebook))
    try:
        parameters = read_parameters(notebook)
    except ParameterError as error:
        problems.append(str(error))
        parameters = {}
    problems += _help_problems(notebook, parameters)
    names_read: set[str] = set()
    later: list[nbformat.NotebookNode] = []
    after_parameters = False
    for number, cell in enumerate(notebook.cells, 1):
        problems += [f"cell {number}: {problem}" for problem in _tag_problems(cell)]
        if cell.cell_type != "code":
            continue
        problems += [f"cell {number}: {problem}" for problem in _cell_problems(cell)]
        if after_parameters:
            later.append(cell)
            names_read |= _names_read(cell.source)
        after_parameters = after_parameters or PARAMETERS_TAG in cell.metadata.get("tags", [])
    if model := MODELS.get(path.stem):
        problems += _model_problems(model, parameters)
        problems += _check_problems(notebook, later, path.stem)
        names_read |= set(NotebookParameters.model_fields)  # which the record reads
    problems += [f"{name}: no cell after the parameters reads it" for name in parameters if name not in names_read]
    return problems


def _model_problems(model: type[NotebookParameters], parameters: dict[str, Parameter]) -> Iterator[str]:
    """Hold the cell against the model; where both agree the order may still be another."""
    defaults, mend = model.defaults(), "run `make format`, which writes the cell from the model"
    for name in parameters:
        if name not in defaults:
            yield f"{unknown('the model has no parameter', name, defaults)}; add it there, or {mend}"
    for name, field in model.model_fields.items():
        wanted = (model.annotation(name), repr(defaults[name]), field.description)
        if name not in parameters:
            yield f"{name}: the model has it, the cell has not; {mend}"
            continue
        parameter = parameters[name]
        found = (parameter.annotation, repr(parameter.default), parameter.help)
        for what, ours, theirs in zip(("type", "default", "help"), found, wanted, strict=True):
            if ours != theirs:
                yield f"{name}: its {what} is {ours}, in the model {theirs}; {mend}"
    if list(parameters) != list(defaults) and set(parameters) == set(defaults):
        yield f"the parameters stand in another order than in the model; {mend}"


def _check_problems(notebook: nbformat.NotebookNode, later: list[nbformat.NotebookNode], stem: str) -> Iterator[str]:
    """Papermill and editors run a notebook without our runner: it has to check its own parameters."""
    if not later or CHECK not in later[0].source.splitlines():
        yield f"the cell after the parameters must say `{CHECK}`"
    if not any(f'STEM = "{stem}"' in cell.source.splitlines() for cell in notebook.cells):
        yield f'a cell must say `STEM = "{stem}"`, the name of the file'
    if not any("parameters=given" in cell.source for cell in later):
        yield "the record must be saved with `parameters=given`, the checked values"


def _tag_problems(cell: nbformat.NotebookNode) -> Iterator[str]:
    for tag in cell.metadata.get("tags", []):
        if tag not in TAGS:
            yield unknown("unknown tag", tag, TAGS)


def _metadata_problems(notebook: nbformat.NotebookNode) -> Iterator[str]:
    kernelspec = notebook.metadata.get("kernelspec", {})
    if (kernelspec.get("name"), kernelspec.get("language")) != ("python3", "python"):
        yield "metadata: kernelspec must have the name python3 and the language python"
    if "widgets" in notebook.metadata:
        yield "metadata: widgets make the notebook unreadable on code hosts; remove the key"


def _help_problems(notebook: nbformat.NotebookNode, parameters: dict[str, Parameter]) -> Iterator[str]:
    """Compare with what `papermill --help-notebook` sees, the documentation that every user of papermill knows."""
    try:
        seen = papermill.inspect_notebook(notebook)
    except ValueError as error:  # no language in the metadata, which is said above in other words
        yield f"metadata: `papermill --help-notebook` fails: {error}"
        return
    for name, parameter in parameters.items():
        if name not in seen:
            yield f"{name}: `papermill --help-notebook` misses it; one assignment a line, one '=', no '|' or quotes"
        if not parameter.help:
            yield f"{name}: needs a trailing comment, `# unit, meaning`"


def _cell_problems(cell: nbformat.NotebookNode) -> Iterator[str]:
    if cell.outputs or cell.execution_count is not None:
        yield "has outputs or a count; strip it (git holds intent, results/ holds outputs)"
    lines = cell.source.splitlines()
    if len(lines) > LONGEST_CELL_LINES:
        yield f"{len(lines)} lines; at most {LONGEST_CELL_LINES}, anything longer lives in the package"
    try:
        tree = ast.parse(cell.source)
    except SyntaxError as error:
        shell = any(line.lstrip().startswith(("!", "%")) for line in lines)
        yield "no shell and no magics in a cell" if shell else f"not Python: {error.msg} (line {error.lineno})"
        return
    for node in ast.walk(tree):
        if type(node) in _DEFINITIONS:
            yield f"no `{_DEFINITIONS[type(node)]}` in a notebook; put it into the package"
        if isinstance(node, _LOOPS) and any(isinstance(inner, _LOOPS) for inner in ast.walk(node) if inner is not node):
            yield "no nested loop in a notebook; put it into the package"
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "sleep":
            yield "no sleep; wait for the thing itself"


def _names_read(source: str) -> set[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return set()
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
