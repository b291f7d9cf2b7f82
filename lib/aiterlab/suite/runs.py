# SPDX-License-Identifier: Apache-2.0
"""Plan several notebook runs, check all of it first, and put their results into one folder.

A plan is complete before the first kernel starts: a typing error in the last notebook's parameters must not cost the
hour that the first ones take.
"""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aiterlab import provenance, records
from aiterlab.suite import status
from aiterlab.suite.execution import Job, run_notebook
from aiterlab.suite.parameters import (
    Parameter,
    ParameterError,
    effective_values,
    load_notebook,
    read_parameters,
    unknown,
)

LATEST_NAME = "latest"


@dataclass(frozen=True)
class Row:
    """One line of the list of runs: a notebook, what it costs, and its parameters in each profile."""

    stem: str
    minutes: float  # expected, profile `standard`, two cores
    needs: str
    profiles: Mapping[str, Mapping[str, Any]]
    budget_minutes: float = 60.0  # the wall clock after which the notebook is stopped


@dataclass(frozen=True)
class Plan:
    """A row, read and checked: ready to run."""

    row: Row
    notebook: Path
    title: str
    parameters: dict[str, Parameter]
    overrides: dict[str, Any]
    values: dict[str, Any]


def plan_runs(
    rows: Sequence[Row], notebooks: Path, *, profile: str, only: Iterable[str] = (), settings: Iterable[str] = ()
) -> list[Plan]:
    """Read and check everything that was asked for; raises ParameterError with one line on the first mistake."""
    by_stem = {row.stem: row for row in rows}
    chosen = list(dict.fromkeys(only)) or list(by_stem)
    for stem in chosen:
        if stem not in by_stem:
            raise ParameterError(unknown("unknown notebook", stem, by_stem))
    texts = _read_settings(settings, by_stem, chosen)
    plans = []
    for row in rows:
        if profile not in row.profiles:
            raise ParameterError(unknown("unknown profile", profile, row.profiles))
        if row.stem in chosen:
            plans.append(_plan(row, notebooks / f"{row.stem}.ipynb", profile, texts.get(row.stem, {})))
    return plans


def new_run_dir(results: Path, profile: str) -> Path:
    """Create the folder of a new run, named by time and profile, unique even within one second."""
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{profile}"
    results.mkdir(parents=True, exist_ok=True)
    count = 1
    while True:
        folder = results.absolute() / (name if count == 1 else f"{name}-{count}")
        try:
            folder.mkdir()
        except FileExistsError:
            count += 1
        else:
            return folder


def point_latest(run_dir: Path) -> None:
    """Make `latest` beside the run lead to it: a symbolic link, or where there are none a text file with its name."""
    latest = run_dir.parent / LATEST_NAME
    temporary = latest.with_name(f".{LATEST_NAME}.{secrets.token_hex(6)}")
    try:
        temporary.symlink_to(run_dir.name, target_is_directory=True)
    except OSError:
        records.atomic_write_text(latest, run_dir.name + "\n")
    else:
        os.replace(temporary, latest)


def run_plans(
    plans: Sequence[Plan], run_dir: Path, profile: str, say: Callable[[str], None]
) -> Iterator[status.NotebookStatus]:
    """Run the plans one after the other, yielding each outcome; a failure does not stop the rest, an interrupt does."""
    facts = provenance.collect()
    for plan in plans:
        say(f"{plan.row.stem}  {plan.title}")
        job = Job(
            notebook=plan.notebook,
            run_dir=run_dir,
            profile=profile,
            parameters=plan.values,
            overrides=plan.overrides,
            budget_s=plan.row.budget_minutes * 60,
            provenance=facts,
        )
        outcome = run_notebook(job, say)
        yield outcome
        if outcome.status == status.INTERRUPTED:
            return


def _plan(row: Row, notebook: Path, profile: str, texts: Mapping[str, str]) -> Plan:
    content = load_notebook(notebook)
    try:
        parameters = read_parameters(content)
    except ParameterError as error:
        raise ParameterError(f"{notebook}: {error}") from None
    overrides = dict(row.profiles[profile])
    for name, text in texts.items():
        if name not in parameters:
            raise ParameterError(unknown(f"{row.stem}: unknown parameter", name, parameters))
        overrides[name] = parameters[name].from_text(text, f"{row.stem}.{name}")
    values = effective_values(parameters, overrides, row.stem)
    return Plan(row, notebook.absolute(), status.title_of(content, row.stem), parameters, overrides, values)


def _read_settings(settings: Iterable[str], known: Iterable[str], chosen: Sequence[str]) -> dict[str, dict[str, str]]:
    """Split `STEM.name=value` settings; the value stays text until its parameter's type is known."""
    texts: dict[str, dict[str, str]] = {}
    for setting in settings:
        target, equals, text = setting.partition("=")
        stem, dot, name = target.partition(".")
        if not (equals and dot and stem and name):
            raise ParameterError(f"--set {setting!r}: write it as STEM.name=value")
        if stem not in known:
            raise ParameterError(unknown("unknown notebook", stem, known))
        if stem not in chosen:
            raise ParameterError(f"--set {setting!r}: --only leaves {stem} out of this run")
        texts.setdefault(stem, {})[name] = text
    return texts
