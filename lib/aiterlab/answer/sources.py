# SPDX-License-Identifier: Apache-2.0
"""Which records are there to answer from, on which machine was each made, and why is one missing?

Every place that was looked in gives a line, also where nothing lies: what is missing is told, never left out.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiterlab import paths, records

REPRODUCE, FIX = "01_reproduce_regression", "02_apply_fix"
KERNELS, EAGLE = "04_run_attention_kernels", "05_run_eagle_spec_decode"
STEMS = (REPRODUCE, FIX, KERNELS, EAGLE)
THIS_RUN, REFERENCE = "this run", "reference"
SIMULATED = "simulated AMD GPUs"


@dataclass(frozen=True)
class Source:
    """One place where a notebook's record was looked for.

    Attributes:
        origin: this run, a given run by its name, or reference
        record: as it was read; None with a `reason` why there is none
    """

    stem: str
    origin: str
    record: dict[str, Any] | None = None
    reason: str | None = None

    @property
    def commit(self) -> str | None:
        """The commit that the record was made from, with a plus where the tree had changes."""
        commit = self._provenance.get("git_commit")
        return commit and commit[:7] + ("+" if self._provenance.get("git_dirty") else "")

    @property
    def made(self) -> str | None:
        """The moment the record was written, ISO 8601 in UTC."""
        return self._provenance.get("utc")

    @property
    def _provenance(self) -> dict[str, Any]:
        found = (self.record or {}).get("provenance")
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Machine:
    """What a record's numbers were measured on.

    Attributes:
        kind: gpu, cpu (times say nothing about a GPU) or simulated (a described machine: there are no times)
    """

    name: str
    kind: str


def gather(stem: str, runs: Sequence[str] = (), reference: bool = True) -> list[Source]:
    """Look for the records of this run, of `runs` and of the reference, in this order; the newest run first.

    Args:
        stem: the notebook that asks; its own folder lies in this run's.
        runs: results folders as their user typed them, oldest first.
        reference: look under results/reference/ too, where a machine may have a folder of its own.
    """
    own = paths.output_dir(stem).parent
    found = [_look(folder.name, THIS_RUN, folder) for folder in (own / name for name in STEMS)]
    seen = {own.resolve()}
    for typed in reversed(runs):
        folder = paths.as_typed(typed)
        if folder in seen:
            continue
        seen.add(folder)
        absent = None if folder.is_dir() else f"no such folder: {typed}"
        found += [_look(name, folder.name, folder / name, absent) for name in STEMS]
    if reference:
        home = paths.results_dir() / "reference"
        found += [source for name in STEMS for source in _referenced(name, home)]
    return found


def machine_of(record: dict[str, Any]) -> Machine:
    """Say what machine a record is of; raises KeyError or TypeError where the record does not say."""
    if record["stem"] in (REPRODUCE, FIX):
        return Machine(SIMULATED, "simulated") if record["machine_simulated"] else Machine("native ROCm machine", "gpu")
    card = record["card"]
    name = card["device_name"] or "unnamed"
    return Machine(name, "gpu") if card["device_kind"] == "gpu" else Machine(f"CPU ({name})", "cpu")


def _referenced(stem: str, home: Path) -> Iterator[Source]:
    folders = [path.parent for path in sorted(home.glob(f"**/{stem}/{records.RECORD_NAME}"))]
    yield from (_look(stem, REFERENCE, folder) for folder in folders)
    if not folders:
        yield Source(stem, REFERENCE, reason="no record")


def _look(stem: str, origin: str, folder: Path, absent: str | None = None) -> Source:
    path = folder / records.RECORD_NAME
    if not path.is_file():
        return Source(stem, origin, reason=absent or _ending(folder) or "no record")
    try:
        record = records.load_record(path)
    except (OSError, records.RecordError) as error:
        # Without the folder, which may name a home directory; origin and stem say where it is.
        return Source(stem, origin, reason=str(error).replace(str(path), path.name).splitlines()[0])
    if record.get("stem") != stem:
        return Source(stem, origin, reason=f"{path.name} is not a record of {stem}")
    return Source(stem, origin, record)


def _ending(folder: Path) -> str | None:
    """What the runner says of a notebook that left no record."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        said = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        return ": ".join(_words(said.get("status"), said.get("reason"))) or None
    return None


def _words(*texts: str | None) -> Iterable[str]:
    return (text for text in texts if text)
