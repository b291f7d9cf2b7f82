# SPDX-License-Identifier: Apache-2.0
"""Make the executed notebook fit to keep and to show around.

It is written while the notebook runs and at its end: without home directories and secrets, without widget state (code
hosts refuse to show a notebook that has it), valid whatever the cells sent, and under one megabyte, above which they
show nothing either. Banners say how it ended and where. Its report shows more, up to what a browser opens at once.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from aiterlab.records import atomic_write_text
from aiterlab.security import scrub_tree
from aiterlab.suite import status
from aiterlab.suite.markdown import escape
from aiterlab.suite.streams import LONGEST_CHARACTERS, shorten

EXECUTED_NAME = "executed.ipynb"
LIMIT_BYTES = 1_000_000
SHOWN_BYTES = 16_000_000  # in a report
MOST_OUTPUTS = 200  # of one cell
_LEFT_OUT = "is left out of this copy; report.html shows it"
_TOO_LARGE = "is left out, the report would be too large; write what is large to a file of its own"
_BANNER = "aiterlab-banner"
_SHORT_BYTES = 200  # about what a note takes that stands for an output
# What is shown somewhere. Scripts, widgets and what nobody knows stay out.
_PIXELS = ("image/png", "image/jpeg", "image/gif", "image/webp")
_TEXTS = ("text/plain", "text/html", "text/markdown", "text/latex", "image/svg+xml")
_JSON = "application/json"


def publishable(notebook: NotebookNode) -> NotebookNode:
    """Return a valid copy without home directories, secrets, widget state and the middle of endless output."""
    bare = {**notebook, "cells": [{**cell, "outputs": []} if "outputs" in cell else cell for cell in notebook.cells]}
    copy = nbformat.from_dict(_finite(scrub_tree(bare)))
    copy.metadata.pop("widgets", None)
    for cell, original in zip(copy.cells, notebook.cells, strict=True):
        if "outputs" in cell:
            cell.outputs = _fit_outputs(original.get("outputs") or [])
    _fit_notebook(copy, SHOWN_BYTES, _TOO_LARGE)
    return copy


def write_executed(notebook: NotebookNode, path: Path) -> None:
    """Write the executed copy atomically, leaving out the largest outputs if it would be too large otherwise."""
    copy = publishable(notebook)
    _add_banners(copy)
    atomic_write_text(path, _fit_notebook(copy, LIMIT_BYTES, _LEFT_OUT) + "\n")


def without_banners(notebook: NotebookNode) -> NotebookNode:
    """Return an executed copy that was read back as it was before its banners."""
    notebook.cells = [cell for cell in notebook.cells if not cell.metadata.get(_BANNER)]
    return notebook


def _add_banners(notebook: NotebookNode) -> None:
    """Say at the top how the run ended (`NotebookStatus.stamp`), and below the cell that ended it that it did."""
    run = without_banners(notebook).metadata.get(status.METADATA_KEY)  # an executed copy may have been run again
    if run is None:
        return
    said = run["finding"] if run["status"] == status.OK else run["reason"]
    banners = {0: f"**{run['status']}**{f': {escape(said, status.LONGEST_REASON)}' if said else ''}"}
    for place, cell in enumerate(notebook.cells, start=1):
        told = cell.metadata.get(status.METADATA_KEY, {})
        if run["error_cell"] and told.get("number") == run["error_cell"]:
            banners[place] = f"**{run['status']}** in the cell above; what follows was not run."
    for place, words in sorted(banners.items(), reverse=True):
        banner = nbformat.v4.new_markdown_cell(f"> {words}", id=f"banner-{place}", metadata={_BANNER: True})
        if notebook.nbformat_minor < 5:  # cells had no ids then
            del banner["id"]
        notebook.cells.insert(place, banner)


def _fit_outputs(outputs: list[Any]) -> list[NotebookNode]:
    left_out = len(outputs) - MOST_OUTPUTS
    if left_out > 0:
        half = MOST_OUTPUTS // 2
        said = _note(f"... {left_out} outputs of this cell left out ...")
        return [*map(_fit_output, outputs[:half]), said, *map(_fit_output, outputs[-half:])]
    return [_fit_output(output) for output in outputs]


def _fit_output(output: Any) -> NotebookNode:
    """Return a valid, scrubbed and short form of what a cell sent, whatever it sent."""
    kind = output.get("output_type") if isinstance(output, Mapping) else None
    if kind == "stream":
        name = "stderr" if output.get("name") == "stderr" else "stdout"
        return nbformat.v4.new_output("stream", name=name, text=_text(output.get("text")))
    if kind == "error":
        lines = output.get("traceback") or []
        lines = lines if isinstance(lines, list) else [lines]
        traceback = _text("\n".join(map(str, lines))).split("\n")
        name, value = _text(output.get("ename")), _text(output.get("evalue"))
        return nbformat.v4.new_output("error", ename=name, evalue=value, traceback=traceback)
    if kind not in ("display_data", "execute_result"):
        return _note(f"[an output of the unknown kind {str(kind)[:80]!r} is left out]")
    sent = output.get("data")
    sent = sent if isinstance(sent, Mapping) else {}
    data = {mime: fitted for mime, value in sent.items() if (fitted := _fit_data(mime, value)) is not None}
    if sent and not data:
        kinds = ", ".join(sorted(str(mime)[:80] for mime in sent))
        data["text/plain"] = _text(f"[an output is left out that is only to be had as {kinds}]")
    metadata = output.get("metadata")
    metadata = _finite(scrub_tree(metadata)) if isinstance(metadata, Mapping) else {}
    metadata = {name: told for name, told in metadata.items() if name not in data or isinstance(told, Mapping)}
    fitted = nbformat.v4.new_output(kind, data=data, metadata=nbformat.from_dict(metadata))
    if kind == "execute_result":
        count = output.get("execution_count")
        fitted.execution_count = count if isinstance(count, int) and count >= 0 else None
    return fitted


def _fit_data(mime: Any, value: Any) -> Any:
    """Return one form of an output, or None for one that is not shown anywhere or does not hold what it says."""
    if mime == _JSON:
        value = _finite(scrub_tree(value))
        return value if len(json.dumps(value, default=str)) <= LONGEST_CHARACTERS else None
    text = "".join(map(str, value)) if isinstance(value, list) else value
    if not isinstance(text, str):
        return None
    if mime in _PIXELS:
        # Encoded pixels hold no paths; a chance match in them would spoil the picture.
        return text.encode("ascii", "ignore").decode()
    if mime == "text/plain":
        return _text(text)
    return scrub_tree(text) if mime in _TEXTS else None


def _text(value: Any) -> str:
    """Return scrubbed text, its middle left out where it is long."""
    text = "".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
    # Scrubbed before it is cut: half a token is not recognized any more.
    return shorten(scrub_tree(text))


def _finite(value: Any) -> Any:
    """Return a JSON-like tree in which numbers that JSON does not have are words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _fit_notebook(notebook: NotebookNode, limit: int, why: str) -> str:
    """Replace the largest outputs by notes until the notebook takes less than `limit` bytes; returns it as text."""
    text = nbformat.writes(notebook)
    while (excess := len(text.encode()) - limit + 1) > 0 and _leave_out_largest(notebook, excess, why):
        text = nbformat.writes(notebook)
    return text


def _leave_out_largest(notebook: NotebookNode, excess: int, why: str) -> bool:
    """Replace outputs by notes, the largest first, until about `excess` bytes are saved; False if none is left."""
    sizes = [
        (len(json.dumps(output, ensure_ascii=False).encode()), cell, place)
        for cell in notebook.cells
        for place, output in enumerate(cell.get("outputs", []))
    ]
    found = sorted((entry for entry in sizes if entry[0] > _SHORT_BYTES), key=lambda entry: entry[0], reverse=True)
    for size, cell, place in found:
        if excess <= 0:
            break
        cell.outputs[place] = _note(f"[an output of {size / 1000:.1f} kB {why}]")
        excess -= size - _SHORT_BYTES
    return bool(found)


def _note(text: str) -> NotebookNode:
    return nbformat.v4.new_output("stream", name="stderr", text=f"{text}\n")
