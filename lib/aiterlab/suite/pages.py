# SPDX-License-Identifier: Apache-2.0
"""Render the pages that are no notebook, a run's index and a comparison, in the one style that all pages share.

Jinja escapes every word. A page holds its style and its pictures, no script, and loads nothing; its policy says so to
the browser as well.
"""

import base64
import functools
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from aiterlab.records import atomic_write_text
from aiterlab.security import scrub
from aiterlab.suite import changes, status, wording
from aiterlab.suite.comparison import Comparison
from aiterlab.suite.executed import EXECUTED_NAME
from aiterlab.suite.report import REPORT_NAME
from aiterlab.suite.results import Entry, Run, mapping, number, read_json, text
from aiterlab.suite.samples import SAMPLES_NAME
from aiterlab.suite.schema import SCHEMA_NAME
from aiterlab.suite.summary import (
    INDEX_NAME,
    SUMMARY_NAME,
    found_by,
    key_metrics,
    verdict_of,
)

_MOST_CHANGES = 40
_MOST_FIGURES = 3  # of each notebook
_FIGURE_PIXELS, _LONE_FIGURE_PIXELS = 720, 1200  # one that stands alone has the whole width
_LARGEST_FIGURE_BYTES = 4_000_000  # encoded; larger ones stay in the report


@dataclass(frozen=True)
class Figure:
    """A figure of a report, small: its data URI, its description, and where the report shows it."""

    source: str
    alt: str
    target: str


def write_index(run: Run, comparison: Comparison | None) -> Path:
    """Write `index.html` of a run that has been read and compared."""
    return atomic_write_text(run.folder / INDEX_NAME, index_page(run, comparison))


def index_page(run: Run, comparison: Comparison | None) -> str:
    """Return the page of a whole run."""
    words, good = verdict_of(run, comparison)
    facts = run.provenance
    shown = [
        ("Profile", run.facts.get("profile")),
        ("Started", wording.time_words(run.facts.get("started_utc") or facts.get("utc"))),
        ("Duration", wording.duration_words(number(run.facts.get("seconds")))),
        ("Commit", wording.commit_words(facts)),
        ("Python", facts.get("python")),
        ("Machine", facts.get("platform")),
        ("Processor", wording.processor_words(facts)),
    ]
    files_here = (SUMMARY_NAME, SAMPLES_NAME, SCHEMA_NAME, "run.json")
    return _render(
        "run.html.j2",
        run=run,
        verdict=words,
        tone="good" if good else "bad",
        facts=[(name, value) for name, value in shown if value],
        provenance=list(wording.provenance_rows(facts)),
        found=found_by(run),
        metrics={entry.stem: list(key_metrics(entry)) for entry in run.entries},
        figures={entry.stem: _figures(entry) for entry in run.entries},
        on_gpu=any(number(entry.status.get("peak_gpu_memory_bytes")) is not None for entry in run.entries),
        changes=_changes(comparison) if comparison else None,
        files=[name for name in files_here if (run.folder / name).is_file()],
    )


def comparison_page(comparison: Comparison) -> str:
    """Return the page of a comparison."""
    return _render("comparison.html.j2", changes=_changes(comparison))


def style() -> str:
    """Return the style that all pages share."""
    return (files("aiterlab.suite") / "template" / "style.css").read_text(encoding="utf-8")


def _changes(comparison: Comparison) -> dict[str, Any]:
    """Return all that the templates show of a comparison."""
    notebooks = []
    for notebook in comparison.notebooks:
        lines = changes.lines_of(notebook)
        notebooks.append(
            {
                "stem": notebook.stem,
                "counts": notebook.counts,
                "cells": notebook.cell_counts,
                "agreeing": notebook.cell_counts[0] - len(notebook.cells),
                "lines": lines[:_MOST_CHANGES],
                "more": len(lines[_MOST_CHANGES:]),
                "obstacles": changes.obstacles_of(notebook),
            }
        )
    tones = {changes.Verdict.WORSE: "bad", changes.Verdict.BETTER: "good", changes.Verdict.SAME: "good"}
    return {
        "called": comparison.called,
        "first": comparison.first,
        "second": comparison.second,
        "verdict": comparison.verdict,
        "words": changes.counts_words(comparison),
        "tone": tones.get(comparison.verdict, "idle"),
        "notebooks": notebooks,
        "parameters": changes.differences_of(comparison, "parameters"),
        "environment": changes.differences_of(comparison, "environment"),
        "findings": changes.findings_of(comparison),
    }


def _figures(entry: Entry) -> list[Figure]:
    """Return the first figures of the executed notebook, made small."""
    found = list(itertools.islice(_shrunk(entry, _FIGURE_PIXELS), _MOST_FIGURES))
    return found if len(found) != 1 else list(_shrunk(entry, _LONE_FIGURE_PIXELS))


def _shrunk(entry: Entry, size: int) -> Iterator[Figure]:
    notebook, _ = read_json(entry.folder / EXECUTED_NAME)
    for cell in map(mapping, _list((notebook or {}).get("cells"))):
        about = mapping(mapping(cell.get("metadata")).get(status.METADATA_KEY))
        for output in map(mapping, _list(cell.get("outputs"))):
            pixels = mapping(output.get("data")).get("image/png")
            pixels = "".join(map(str, pixels)) if isinstance(pixels, list) else pixels
            small = _shrink(pixels, size) if isinstance(pixels, str) else None
            if small:
                told = mapping(mapping(output.get("metadata")).get("image/png")).get("alt")
                place = f"#cell-{about['number']}" if isinstance(about.get("number"), int) else ""
                alt = text(told) or text(about.get("title")) or entry.stem
                yield Figure(small, alt, f"{entry.stem}/{REPORT_NAME}{place}")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _shrink(pixels: str, size: int) -> str | None:
    """Return a PNG, given as base64, as the data URI of a smaller one; None if it is none, or far too large."""
    from PIL import Image  # matplotlib brings it; only pages with figures need it

    if len(pixels) > _LARGEST_FIGURE_BYTES:
        return None
    try:
        with Image.open(io.BytesIO(base64.b64decode(pixels))) as image:
            small = image.convert("RGB")
            small.thumbnail((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
            written = io.BytesIO()
            # Drawings have few colours: a palette makes them a third of the size.
            small.quantize(64, method=Image.Quantize.FASTOCTREE).save(written, "PNG", compress_level=6)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (files("aiterlab.suite") / "template" / name).read_text("utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "duration": wording.duration_words,
        "value": wording.value_words,
        "spread": wording.spread_words,
        "tone": wording.tone_of,
        "reused": lambda entry: wording.reused_words(entry.status),
        "bytes": _bytes_words,
    }
    environment.globals["verdicts"] = list(changes.Verdict)
    return environment


def _bytes_words(size: Any) -> str:
    return f"{size / 2**30:.2f} GiB" if isinstance(size, int | float) else "-"


def _render(template: str, **context: Any) -> str:
    page = _environment().get_template(template).render(style=style(), **context)
    return scrub(page)
