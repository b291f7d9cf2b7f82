# SPDX-License-Identifier: Apache-2.0
"""Make small notebooks for the tests of the runner."""

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

DEFAULT_PARAMETERS = 'names: list[str] = ["a"]  # what is asked\nworkers: int = 1  # processes at once'


def write_notebook(path: Path, *cells: str, parameters: str = DEFAULT_PARAMETERS) -> Path:
    """Write a notebook whose cells are code, or markdown where they start with '#' and a capital letter."""
    notebook = new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    notebook.cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    for source in cells:
        is_markdown = source.lstrip("#").startswith(" ") and source.startswith("#") and "\n" not in source
        notebook.cells.append(new_markdown_cell(source) if is_markdown else new_code_cell(source))
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path
