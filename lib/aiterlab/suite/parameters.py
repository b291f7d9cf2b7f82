# SPDX-License-Identifier: Apache-2.0
"""Read a notebook's parameters cell, and refuse a wrong parameter before any kernel starts.

papermill injects unknown names with a warning and finds parameters with a regular expression that misses `Literal[...]`
and `X | None`. Here the cell is parsed as Python, and every value is checked, strictly: a string is never taken for a
list, nor "1e5" for a commit id. The project's own notebooks are held to their model, others to their annotations.
"""

import ast
import io
import json
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nbformat
from pydantic import ConfigDict, TypeAdapter, ValidationError

from aiterlab.security import is_secret_name
from aiterlab.suite.notebook_parameters import MODELS
from aiterlab.suite.parameter_model import (
    ParameterError,
    complaint,
    refuse_lone_surrogates,
    shortened,
    unknown,
)

PARAMETERS_TAG = "parameters"
_PLAIN_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict, "None": None}


@dataclass(frozen=True)
class Parameter:
    """One typed literal of a parameters cell."""

    name: str
    annotation: str
    default: Any
    help: str
    type: Any

    def check(self, value: Any, where: str) -> Any:
        """Return `value` if it is of this parameter's type, else raise ParameterError."""
        refuse_lone_surrogates(value, where)
        try:
            return _adapter(self.type).validate_python(value)
        except ValidationError as error:
            wanted = f"{self.annotation} such as {shortened(self.default)}"
            raise ParameterError(complaint(error.errors(include_url=False)[0], where, wanted)) from None

    def from_text(self, text: str, where: str) -> Any:
        """Read a value from a command line: JSON, or a bare string where the annotation takes strings."""
        try:
            value = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            value, is_json = text, False
        else:
            is_json = True
            # A commit id such as 12e4567 is a number in JSON and a name here: strings win where they are asked for.
            if not isinstance(value, str) and _accepts(self.type, text) and not _accepts(self.type, value):
                value = text
        if not is_json and "Literal" not in self.annotation and not _accepts(self.type, value):
            raise ParameterError(
                f"{where}: {text!r} is not JSON; wanted {self.annotation}, written as {_json(self.default)}"
            )
        return self.check(value, where)


def load_notebook(path: Path) -> nbformat.NotebookNode:
    """Read a notebook file, or raise ParameterError with the reason in one line."""
    try:
        return nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise ParameterError(f"{path}: there is no such notebook") from None
    except OSError as error:
        raise ParameterError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # over JSON that is no notebook nbformat raises what it likes
        said = str(error).partition("\n")[0]
        raise ParameterError(f"{path}: not a notebook ({type(error).__name__}: {said})") from error


def parameters_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the one cell tagged `parameters`; raises ParameterError if there is none, or more."""
    cells = [cell for cell in notebook.cells if PARAMETERS_TAG in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ParameterError(f"exactly one cell must be tagged {PARAMETERS_TAG!r}; found {len(cells)}")
    return cells[0]


def read_parameters(notebook: nbformat.NotebookNode) -> dict[str, Parameter]:
    """Return the parameters of the one cell tagged `parameters`, in the order written."""
    source = parameters_cell(notebook).source
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise ParameterError(f"the parameters cell is not Python: {error.msg} (line {error.lineno})") from None
    comments = _comments(source)
    parameters: dict[str, Parameter] = {}
    for statement in body:
        parameter = _parameter(statement, comments)
        if parameter.name in parameters:
            raise ParameterError(f"{parameter.name}: assigned twice in the parameters cell")
        parameters[parameter.name] = parameter
    return parameters


def effective_values(
    parameters: Mapping[str, Parameter], overrides: Mapping[str, Any], where: str = ""
) -> dict[str, Any]:
    """Return the defaults with `overrides` laid over them, all checked.

    Args:
        where: the stem; it opens each message, and where a model has this name, the values are held to the model.
    """
    for name in overrides:
        if name not in parameters:
            raise ParameterError(unknown(f"{where}: unknown parameter", name, parameters))
    values = {name: overrides.get(name, parameter.default) for name, parameter in parameters.items()}
    if where not in MODELS:
        return {name: parameters[name].check(value, f"{where}.{name}") for name, value in values.items()}
    if missing := [name for name in MODELS[where].model_fields if name not in parameters]:
        mend = f"run: python -m aiterlab.suite.rewrite {where}.ipynb"
        raise ParameterError(f"{where}: its parameters cell lacks {', '.join(missing)}; {mend}")
    return MODELS[where].checked(values, where)


def _parameter(statement: ast.stmt, comments: Mapping[int, str]) -> Parameter:
    if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value):
        line = ast.unparse(statement).splitlines()[0]
        raise ParameterError(f"parameters cell, `{line[:80]}`: only lines such as `name: int = 1  # unit, meaning`")
    name, annotation = statement.target.id, ast.unparse(statement.annotation)
    if is_secret_name(name):
        raise ParameterError(f"{name}: secrets are no parameters, they end up in files; read an environment variable")
    try:
        default = ast.literal_eval(statement.value)
    except ValueError:
        raise ParameterError(f"{name}: its default must be a literal; derive values in the next cell") from None
    help_text = comments.get(statement.end_lineno or 0) or comments.get(statement.lineno, "")
    parameter = Parameter(name, annotation, default, help_text, _type(statement.annotation, name))
    parameter.check(default, f"{name} (its default)")
    return parameter


def _type(node: ast.expr, name: str) -> Any:
    """Build the type that an annotation names, from a short list of types and without evaluating code."""
    match node:
        case ast.Name(id=plain) if plain in _PLAIN_TYPES:
            return _PLAIN_TYPES[plain]
        case ast.Constant(value=None):
            return None
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return list[_type(item, name)]
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, item])):
            return dict[_type(key, name), _type(item, name)]
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            values = ast.literal_eval(choices)
            return Literal[values if isinstance(values, tuple) else (values,)]
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _type(left, name) | _type(right, name)
    raise ParameterError(
        f"{name}: {ast.unparse(node)} is not a parameter type; use str, int, float, bool, list[...], dict[...], "
        "Literal[...] or X | None"
    )


def _comments(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def _adapter(type_: Any) -> TypeAdapter:
    return TypeAdapter(type_, config=ConfigDict(strict=True, allow_inf_nan=False))


def _accepts(type_: Any, value: Any) -> bool:
    try:
        _adapter(type_).validate_python(value)
    except ValidationError:
        return False
    return True


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
