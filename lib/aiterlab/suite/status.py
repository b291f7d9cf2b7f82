# SPDX-License-Identifier: Apache-2.0
"""Say truthfully how a notebook ended.

papermill marks the cell in which a kernel died, and every cell after it, "completed". The words here are the suite's
own: they go into `status.json`, into the executed notebook's metadata, and from there into the report.
"""

import json
import re
import signal
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
from pydantic import TypeAdapter

from aiterlab.records import atomic_write_text, dump_json
from aiterlab.security import scrub_tree
from aiterlab.suite.job import Job

OK = "ok"
FAILED = "failed"  # a cell raised, or what it left could not be written
TIMEOUT = "timeout"  # the budget of the notebook, or of one cell, ran out
KERNEL_DIED = "kernel-died"
OUT_OF_MEMORY = "out-of-memory"  # the kernel said so, or the system killed a process for it meanwhile
SKIPPED = "skipped"  # never begun, for a reason that is no fault of its own
INTERRUPTED = "interrupted"  # Ctrl-C, SIGTERM, or the runner itself was killed
SETUP_FAILED = "setup-failed"  # no cell was started

CELL_NOT_RUN = "not run"
CELL_SKIPPED = "skipped"

STATUS_NAME = "status.json"
METADATA_KEY = "aiterlab"
LONGEST_REASON = 1000
_LONGEST_TITLE = 72


@dataclass
class CellStatus:
    """One code cell: its place among the code cells, and how it ended."""

    number: int
    title: str
    status: str = CELL_NOT_RUN
    seconds: float | None = None


@dataclass
class NotebookStatus:
    """How one notebook of one run ended.

    It is born "interrupted" and saved at once: should the runner itself be killed, what lies on disk is already true.
    """

    stem: str
    run: str
    profile: str
    parameters: dict[str, Any]
    status: str = INTERRUPTED
    reason: str | None = "the runner ended before the notebook did"
    finding: str | None = None  # the sentence that the notebook's record gives as its answer
    error_cell: int | None = None
    started_utc: str | None = None
    ended_utc: str | None = None
    seconds: float | None = None  # on a clock that nobody can set
    peak_memory_bytes: int | None = None  # proportional set size of all its processes, seen every few seconds
    peak_gpu_memory_bytes: int | None = None  # taken on its GPUs since it began, likewise; None where nobody tells
    left_over: list[str] = field(default_factory=list)  # processes that outlived the kernel; GPU memory, them
    key: dict[str, str] | None = None  # hashes of all that the result depends on; None where it cannot be reused
    reused_from: str | None = None  # the run that computed this, where it is not the one that shows it
    reused_since_utc: str | None = None
    node: dict[str, Any] | None = None  # on a cluster: the node's id, what was asked of it, and at which attempt
    cells: list[CellStatus] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Tell whether every cell ran and none raised."""
        return self.status == OK

    def end(self, status: str, reason: str | None = None) -> None:
        """Settle the final status; `reason` is cut to its first line, the rest is in the log and the notebook."""
        self.status = status
        for cell in self.cells:
            if cell.status == INTERRUPTED:  # it was running
                cell.status, self.error_cell = status, cell.number
        self.reason = textwrap.shorten(first_line(reason), LONGEST_REASON, placeholder=" ...") if reason else None
        self.ended_utc = utc_now()

    def save(self, folder: Path) -> Path:
        """Write `status.json`, scrubbed like everything that a run leaves."""
        return atomic_write_text(folder / STATUS_NAME, dump_json(scrub_tree(asdict(self))))

    @classmethod
    def load(cls, folder: Path) -> "NotebookStatus | None":
        """Read `status.json` back; None where there is none that this version can read."""
        try:
            return _SAVED.validate_python(json.loads((folder / STATUS_NAME).read_bytes()))
        except (OSError, ValueError, RecursionError):
            return None

    def stamp(self, notebook: nbformat.NotebookNode) -> None:
        """Put the status into the notebook's metadata, so that a report can be rendered from the notebook alone."""
        notebook.metadata[METADATA_KEY] = {key: value for key, value in asdict(self).items() if key != "cells"}
        for cell, status in zip(code_cells(notebook), self.cells, strict=True):
            cell.metadata[METADATA_KEY] = asdict(status)


_SAVED = TypeAdapter(NotebookStatus)


def of(job: Job) -> NotebookStatus:
    """Return the status that a notebook is born with."""
    return NotebookStatus(
        stem=job.stem,
        run=job.run_dir.name,
        profile=job.profile,
        parameters=dict(job.parameters),
        started_utc=utc_now(),
        provenance=dict(job.provenance),
        key=dict(job.key) if job.key is not None else None,
        node=dict(job.node) if job.node is not None else None,
    )


def settle(job: Job, exit_code: int, word: str, account: Callable[[Job, NotebookStatus], None]) -> NotebookStatus:
    """Return how a notebook ended whose process is over.

    Args:
        job: the notebook.
        exit_code: of the process, negative for a signal.
        word: the status where the process was killed before it could write one.
        account: writes the notebook's folder in that case.
    """
    ending = NotebookStatus.load(job.folder) or of(job)
    if ending.ended_utc is None:
        how = f"killed by {signal_name(-exit_code)}" if exit_code < 0 else f"over with exit code {exit_code}"
        _end(job, ending, word, f"the process that ran the notebook was {how}", account)
    return ending


def end_unrun(job: Job, word: str, reason: str, account: Callable[[Job, NotebookStatus], None]) -> NotebookStatus:
    """Return the ending of a notebook that is not begun, and have its folder written by `account`."""
    ending = of(job)
    _end(job, ending, word, reason, account)
    return ending


def _end(
    job: Job, ending: NotebookStatus, word: str, reason: str, account: Callable[[Job, NotebookStatus], None]
) -> None:
    ending.end(word, reason)
    try:
        account(job, ending)
    except OSError as error:  # as on a full disk; whoever asked knows now
        ending.end(word, f"{ending.reason}, and its folder cannot be written: {error}")


def signal_name(number: int) -> str:
    """Return what people call a signal."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def utc_now() -> str:
    """Return the time of day, for people; never used to measure."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Return the cells that can run: code, and not empty."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def list_cells(notebook: nbformat.NotebookNode) -> list[CellStatus]:
    """Return one "not run" status per code cell, titled by the nearest heading above it and its own first comment."""
    statuses: list[CellStatus] = []
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found = re.findall(r"^#{1,6}\s+(.+?)\s*#*$", _without_fences(cell.source), flags=re.MULTILINE)
            heading = _plain(found[-1]) if found else heading
        elif cell.cell_type == "code" and cell.source.strip():
            opening = first_line(cell.source)
            comment = opening.lstrip("# ") if opening.startswith("#") else ""
            parts = [heading, comment] if comment != heading else [heading]
            title = ": ".join(part for part in parts if part) or opening
            statuses.append(CellStatus(len(statuses) + 1, textwrap.shorten(title, _LONGEST_TITLE, placeholder="...")))
    return statuses


def title_of(notebook: nbformat.NotebookNode, fallback: str) -> str:
    """Return the notebook's first top heading, which is its question."""
    for cell in notebook.cells:
        found = re.search(r"^#\s+(.+)$", cell.source, flags=re.MULTILINE) if cell.cell_type == "markdown" else None
        if found:
            return _plain(found.group(1))
    return fallback


def first_line(text: str) -> str:
    """Return the first line that holds something."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _without_fences(markdown: str) -> str:
    return re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)


def _plain(markdown: str) -> str:
    return re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", markdown).strip()
