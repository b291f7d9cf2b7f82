# SPDX-License-Identifier: Apache-2.0
"""Lay every raw sample of a run into one tidy table: one row a sample, one column a label, so that any tool reads it.

The columns are the same in every run, and the first three tell runs apart that were put together. A value that is
missing is an empty field, and `reason` says why.
"""

import csv
import functools
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

from aiterlab.records import atomic_write_text
from aiterlab.security import scrub
from aiterlab.suite.metrics import METRICS, Observation, metrics_of, observe
from aiterlab.suite.results import Entry, Run, number, text

SAMPLES_NAME = "samples.csv"
LABELS = tuple(dict.fromkeys(["cell", *(label for metric in METRICS if metric.listed for label in metric.labels)]))
COLUMNS = ("run", "commit", "machine", "stem", "metric", "unit", *LABELS, "sample", "value", "reason")


def write_samples(run: Run) -> Path:
    """Write `samples.csv` of a run that has been read; a broken or unfinished run gives the rows that there are."""
    whole = io.StringIO()
    writer = csv.writer(whole, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in run.entries:
        facts = (entry.record or {}).get("provenance") or entry.status.get("provenance") or run.provenance
        facts = facts if isinstance(facts, Mapping) else {}
        machine = ", ".join(map(str, facts.get("accelerators") or ())) or facts.get("cpu_model") or ""
        origin = [_scrubbed(str(word)) for word in (run.name, (facts.get("git_commit") or "")[:12], machine)]
        writer.writerows(origin + row for row in rows_of_entry(entry))
    return atomic_write_text(run.folder / SAMPLES_NAME, whole.getvalue())


def rows_of_entry(entry: Entry) -> Iterator[list[str]]:
    """Yield the rows of one notebook: how long it and its cells took, then what its record holds."""
    reason = "" if entry.seconds is not None else entry.ending
    yield _row(entry.stem, "notebook_seconds", "s", {}, 0, entry.seconds, reason)
    cells = entry.status.get("cells")
    for cell in cells if isinstance(cells, list) else []:
        if isinstance(cell, dict):
            seconds = number(cell.get("seconds"))
            words = "" if seconds is not None else text(cell.get("status")) or "not recorded"
            yield _row(entry.stem, "notebook_cell_seconds", "s", {"cell": str(cell.get("number"))}, 0, seconds, words)
    for metric in metrics_of(entry.stem) if entry.record else ():
        if metric.listed:
            for seen in observe(metric, entry.record):
                yield from _observed(seen)


def _observed(seen: Observation) -> Iterator[list[str]]:
    metric, case = seen.metric, dict(seen.case)
    # A list of samples counts, even if their median is recorded beside it.
    values = seen.samples or (seen.value,)
    for index, value in enumerate(values):
        reason = "" if value is not None else seen.reason or "not recorded"
        yield _row(metric.stem, metric.name, metric.unit, case, index, value, reason)


def _row(
    stem: str, metric: str, unit: str, case: dict[str, str], index: int, value: float | None, reason: str
) -> list[str]:
    labels = [_scrubbed(case.get(label, "")) for label in LABELS]
    return [stem, metric, unit, *labels, str(index), "" if value is None else repr(value), _scrubbed(reason)]


@functools.lru_cache(maxsize=4096)
def _scrubbed(words: str) -> str:
    return scrub(words)
