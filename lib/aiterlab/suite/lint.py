# SPDX-License-Identifier: Apache-2.0
"""Check that a notebook is a view: typed literal parameters, calls, tables, figures, one record, and no outputs in git.

These are the habits of the house that a program can see. Each returned line names the cell and what to do instead.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import nbformat
import papermill

from aiterlab.suite.parameters import PARAMETERS_TAG, Parameter, ParameterError, load_notebook, read_parameters

LONGEST_CELL_LINES = 15
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
    after_parameters = False
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type != "code":
            continue
        problems += [f"cell {number}: {problem}" for problem in _cell_problems(cell)]
        if after_parameters:
            names_read |= _names_read(cell.source)
        after_parameters = after_parameters or PARAMETERS_TAG in cell.metadata.get("tags", [])
    problems += [f"{name}: no cell after the parameters reads it" for name in parameters if name not in names_read]
    return problems


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
