# SPDX-License-Identifier: Apache-2.0
"""Read back what a run left, whatever is missing or broken in it: everything that is shown of a run starts here.

A run that was killed has no `run.json` worth the name, a notebook that never started has no record. Each of them is
still shown, with the reason where a fact should stand.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiterlab.records import RECORD_NAME
from aiterlab.suite import status

RUN_NAME = "run.json"
LATEST_NAME = "latest"
# The files of one notebook's folder that pages link to, in this order, with the words of the link.
LINKED = {
    "report.html": "report",
    "record.json": "record",
    "executed.ipynb": "notebook",
    "status.json": "status",
    "log.txt": "log",
}


@dataclass(frozen=True)
class Entry:
    """One notebook of a run: its `status.json` and its `record.json`, or why there is none."""

    stem: str
    folder: Path
    status: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] | None = None
    record_problem: str | None = None

    @property
    def ending(self) -> str:
        """How the notebook ended, in the words of `suite.status`; "not run" if it left no status."""
        return text(self.status.get("status")) or status.CELL_NOT_RUN

    @property
    def ok(self) -> bool:
        """Tell whether every cell ran and none raised."""
        return self.ending == status.OK

    @property
    def finding(self) -> str | None:
        """The sentence that the notebook's record gives as its answer."""
        return text(self.status.get("finding")) or text((self.record or {}).get("finding"))

    @property
    def said(self) -> str:
        """What the notebook found if it ended well, else why it did not."""
        return (self.finding if self.ok else text(self.status.get("reason"))) or "-"

    @property
    def seconds(self) -> float | None:
        """How long the notebook took."""
        return number(self.status.get("seconds"))

    @property
    def files(self) -> dict[str, str]:
        """The linked files that are really there: name to the words of the link."""
        return {name: words for name, words in LINKED.items() if (self.folder / name).is_file()}


@dataclass(frozen=True)
class Run:
    """A run's folder, read: the runner's own facts and one entry per notebook, in the order of the run."""

    folder: Path
    facts: Mapping[str, Any]
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        """The run's name, which is its folder's."""
        return text(self.facts.get("run")) or self.folder.name

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the run comes from: the runner's account, else that of the first notebook which has one."""
        told = [self.facts.get("provenance"), *(entry.status.get("provenance") for entry in self.entries)]
        return next((facts for facts in told if isinstance(facts, Mapping) and facts), {})

    @property
    def records(self) -> dict[str, Mapping[str, Any]]:
        """The records that can be read, by the notebook's stem."""
        return {entry.stem: entry.record for entry in self.entries if entry.record is not None}


def led_to(path: Path) -> Path:
    """Return where `latest` leads to: where links cannot be made it is a file that names the run."""
    if path.name == LATEST_NAME and path.is_file():
        return path.parent / path.read_text(encoding="utf-8").strip()
    return path


def read_run(folder: Path | str) -> Run:
    """Read the run in `folder`; never raises over what lies in it."""
    folder = Path(folder)
    facts, _ = read_json(folder / RUN_NAME)
    listed = facts.get("notebooks") if facts else None
    stems = [stem for stem in listed if _is_stem(stem)] if isinstance(listed, list) else []
    if folder.is_dir():
        stems += sorted(path.parent.name for path in folder.glob(f"*/{status.STATUS_NAME}"))
    return Run(folder, facts or {}, tuple(read_entry(folder / stem) for stem in dict.fromkeys(stems)))


def read_entry(folder: Path) -> Entry:
    """Read one notebook's folder."""
    record, problem = read_json(folder / RECORD_NAME)
    told, trouble = read_json(folder / status.STATUS_NAME)
    if told is None and (folder / status.STATUS_NAME).exists():
        told = {"status": status.INTERRUPTED, "reason": f"{status.STATUS_NAME}: {trouble}"}
    return Entry(folder.name, folder, told or {}, record, problem)


def read_json(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Return the JSON object in `path`, or None and why there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except FileNotFoundError:
        return None, "there is none"
    except (OSError, ValueError, RecursionError) as error:
        return None, f"cannot be read ({type(error).__name__})"
    return (value, None) if isinstance(value, dict) else (None, "is no JSON object")


def text(value: Any) -> str | None:
    """Return `value` if it is a string that says something; files may hold anything."""
    return value if isinstance(value, str) and value else None


def mapping(value: Any) -> Mapping[str, Any]:
    """Return `value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """Return `value` as a float if it is a number; true and false count as 1 and 0."""
    return float(value) if isinstance(value, int | float) else None


def _is_stem(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")
