# SPDX-License-Identifier: Apache-2.0
"""Write notebooks' parameters cells anew from their models: `python -m aiterlab.suite.rewrite notebooks/*.ipynb`."""

import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat

from aiterlab.records import atomic_write_text
from aiterlab.suite.notebook_parameters import MODELS
from aiterlab.suite.parameter_model import ParameterError
from aiterlab.suite.parameters import load_notebook, parameters_cell


def rewrite(path: Path) -> bool:
    """Make the parameters cell what the notebook's model says; returns whether it was something else.

    A notebook without a model is left alone.

    Raises:
        ParameterError: not a notebook, or none of its cells, or more than one, is the parameters cell.
    """
    if path.stem not in MODELS:
        return False
    notebook = load_notebook(path)
    cell, wanted = parameters_cell(notebook), MODELS[path.stem].cell()
    if cell.source == wanted:
        return False
    cell.source = wanted
    atomic_write_text(path, nbformat.writes(notebook) + "\n")
    return True


def main(argv: Sequence[str]) -> int:
    """Rewrite every notebook named, say which changed, and return the exit code."""
    try:
        for path in map(Path, argv):
            if rewrite(path):
                print(f"{path}: parameters cell written anew")
    except ParameterError as error:
        print(f"rewrite: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
