# SPDX-License-Identifier: Apache-2.0
"""Make the executed notebook fit to keep and to show around.

It is written while the notebook runs and at its end: without home directories and secrets, without widget state (code
hosts refuse to show a notebook that has it), and under one megabyte, above which they show nothing either.
"""

from collections.abc import Iterator
from pathlib import Path

import nbformat

from aiterlab.provenance import scrub_tree
from aiterlab.records import atomic_write_text
from aiterlab.suite.streams import shorten

EXECUTED_NAME = "executed.ipynb"
LIMIT_BYTES = 1_000_000


def publishable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a copy without home directories, secrets, widget state and the middle of endless output."""
    copy = nbformat.from_dict(scrub_tree(notebook))
    copy.metadata.pop("widgets", None)
    for cell, original in zip(copy.cells, notebook.cells, strict=True):
        for output, before in zip(cell.get("outputs", []), original.get("outputs", []), strict=True):
            if output.output_type == "stream":
                output.text = shorten(output.text)
            for kind, data in before.get("data", {}).items():
                # Encoded pixels hold no paths; a chance match in them would spoil the picture.
                if kind.startswith("image/") and kind != "image/svg+xml":
                    output.data[kind] = data
    return copy


def write_executed(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write the executed copy atomically, leaving out the largest outputs if it would be too large otherwise."""
    copy = publishable(notebook)
    text = nbformat.writes(copy)
    largest = sorted(_outputs(copy), key=lambda found: len(str(found[1])), reverse=True)
    for cell, output in largest:
        if len(text.encode()) < LIMIT_BYTES:
            break
        note = f"[an output of {len(str(output)) // 1000} kB is left out of this copy; report.html shows it]\n"
        cell.outputs[cell.outputs.index(output)] = nbformat.v4.new_output("stream", name="stderr", text=note)
        text = nbformat.writes(copy)
    atomic_write_text(path, text + "\n")


def _outputs(notebook: nbformat.NotebookNode) -> Iterator[tuple[nbformat.NotebookNode, nbformat.NotebookNode]]:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            yield cell, output
