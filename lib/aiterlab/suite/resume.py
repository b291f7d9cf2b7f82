# SPDX-License-Identifier: Apache-2.0
"""Tell whether a result that is there is the one that running its notebook again would give.

Everything that the answer may depend on is hashed part by part, so that what is asked again says why.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from aiterlab import paths, provenance, records
from aiterlab.suite import status
from aiterlab.suite.job import Job
from aiterlab.suite.parameters import load_notebook
from aiterlab.suite.report import REPORT_NAME

# Parameters that name folders or models elsewhere, whatever these are called.
_PLACES = ("models", "runs")
_OUTSIDE = frozenset({"path", "file", "installed"})  # between the colons of a tree's or a task's name
_MACHINE = ("platform", "cpu_model", "cpu_usable_count", "memory_bytes", "accelerators", "python")


def key(job: Job, reads: Sequence[str], needs: Sequence[status.NotebookStatus]) -> dict[str, str] | None:
    """Return a hash for each thing that the result of `job` depends on; None where that cannot be known.

    Args:
        job: the notebook, its parameters and the facts of this machine (`provenance.collect`).
        reads: folders of the project whose files the notebook reads.
        needs: endings of the notebooks whose records it reads.
    """
    if outside(job.parameters):
        return None
    parts = {
        "notebook": _source(job.notebook),
        "library": _folder(str(Path(__file__).parents[1])),
        "parameters": dict(job.parameters),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(provenance.ENVIRONMENT_PREFIXES)
        },
        "packages": _packages(),
        "machine": {name: job.provenance.get(name) for name in _MACHINE},
        "files read": [_folder(str(paths.project_root() / folder)) for folder in reads],
        "records read": [[one.stem, one.status, one.started_utc, one.key] for one in needs],
    }
    return {name: _digest(json.dumps(part, sort_keys=True).encode()) for name, part in parts.items()}


def outside(parameters: Mapping[str, Any]) -> str | None:
    """Return the parameter that names something outside the project, whose content no key can cover."""
    for name, value in parameters.items():
        for text in _strings(value):
            if name in _PLACES or "/" in text or text.startswith("~") or not _OUTSIDE.isdisjoint(text.split(":")):
                return name
    return None


def reusable(folder: Path, wanted: Mapping[str, str] | None) -> tuple[status.NotebookStatus | None, str]:
    """Return the result in `folder` if it is what `wanted` asks for, else None; and the reason either way."""
    found = status.NotebookStatus.load(folder)
    if found is None:
        return None, "not run yet"
    if not found.ok:
        return None, f"it was {found.status}"
    if wanted is None or found.key is None:
        return None, f"{outside(found.parameters) or 'a parameter'} names something outside the project"
    if changed := [name for name in wanted if wanted[name] != found.key.get(name)]:
        return None, f"changed since: {', '.join(changed)}"
    try:
        records.load_record(folder / records.RECORD_NAME)
    except (OSError, records.RecordError) as error:
        return None, f"its record cannot be read: {error}"
    if not (folder / REPORT_NAME).is_file():
        return None, "its report is gone"
    return found, "unchanged"


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    return [text for item in value for text in _strings(item)] if isinstance(value, list | tuple) else []


def _source(notebook: Path) -> list[Any]:
    cells = load_notebook(notebook).cells
    return [[cell.cell_type, cell.source, cell.metadata.get("tags", [])] for cell in cells]


@cache
def _folder(path: str) -> str:
    """Hash names and contents of a folder's files; what an interpreter or an editor leaves there does not count."""
    hashed = hashlib.sha256()
    for file in sorted(Path(path).rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith("."):
            hashed.update(f"{file.relative_to(path)}\0{_digest(file.read_bytes())}\n".encode())
    return hashed.hexdigest()


@cache
def _packages() -> list[str]:
    """Return name and version of every installed distribution, which is what their folders are called."""
    folders = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    return sorted(path.name for folder in folders for path in Path(folder).glob("*.dist-info"))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
