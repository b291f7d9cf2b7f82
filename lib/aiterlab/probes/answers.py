# SPDX-License-Identifier: Apache-2.0
"""Answers on disk: kept as soon as they are there, read back as long as the question stays the same."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import re
import sys
from pathlib import Path

from aiterlab.probes.cells import Cell, Verdict, verdict, why_unanswered

# Read answers, and have no part in giving them.
_READERS = ("comparisons.py", "findings.py", "tables.py")


@functools.cache
def versions() -> str:
    """The packages of this environment, one per line."""
    return "\n".join(sorted(f"{d.name}=={d.version}" for d in importlib.metadata.distributions()))


def context() -> str:
    """All that an answer depends on besides the cell: this code, the packages, the interpreter."""
    digest = hashlib.sha256(f"{sys.version}\n{versions()}".encode())
    package = Path(__file__).parents[1]
    for part in ("machines", "probes", "trees", "attention", "hotfix.py", "policy.py", "importing.py", "children.py"):
        path = package / part
        for source in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if (source.suffix == ".py" and source.name not in _READERS) or source.parent.name == "bin":
                digest.update(source.read_bytes())
    return digest.hexdigest()


def read(cell: Cell, file: Path, ending: dict | None = None) -> dict | None:
    """The row of one cell from its answer's file; None if there is no answer yet.

    Args:
        ending: how the process ended that has just given it; without one the answer is an older one, reused.
    """
    if not file.exists():
        return None
    facts = json.loads(file.read_text())
    about = {name: facts.pop(name, None) for name in ("began_with", "answered_utc")}
    return cell.coordinates() | {
        "verdict": str(verdict(facts)),
        "facts": facts,
        "reused": ending is None,
        "seconds": ending and ending["seconds"],
        "peak_memory_bytes": ending and ending["peak_memory_bytes"],
        "no_answer_reason": why_unanswered(facts),
        "aiter_log": _aiter_log(file.with_suffix(".log")),
        **about,
    }


def unanswered(cell: Cell, ending: dict, log: Path) -> dict:
    """The row of a cell whose process ended without an answer."""
    tail = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    why = "timed out" if ending["timed_out"] else f"ended with status {ending['exit_status']}"
    row = unasked(cell, f"{why}: {tail[-1]}" if tail else why)
    return row | {
        "seconds": ending["seconds"],
        "peak_memory_bytes": ending["peak_memory_bytes"],
        "aiter_log": _aiter_log(log),
    }


def unasked(cell: Cell, reason: str) -> dict:
    """The row of a cell that was not asked, or whose answer does not count."""
    return cell.coordinates() | {
        "verdict": str(Verdict.UNANSWERED),
        "facts": {},
        "reused": False,
        "seconds": None,
        "peak_memory_bytes": None,
        "no_answer_reason": reason,
        "aiter_log": [],
        "began_with": None,
        "answered_utc": None,
    }


def _aiter_log(log: Path) -> list[str]:
    """What AITER printed while the cell was asked, without the paths of this machine."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [re.sub(r"\S*/(?=[^/\s])", "", line) for line in lines if line.startswith("[aiter]")]
