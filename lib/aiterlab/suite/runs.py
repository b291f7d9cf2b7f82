# SPDX-License-Identifier: Apache-2.0
"""Plan several notebook runs, check all of it first, and put their results into one folder.

A plan is complete before the first kernel starts: a typing error in the last notebook's parameters must not cost the
hour that the first ones take.
"""

import contextlib
import functools
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aiterlab import host, provenance, records, security
from aiterlab.suite import gpus, hold, resume, schedule, status, warm, worker
from aiterlab.suite.job import Job
from aiterlab.suite.parameters import (
    Parameter,
    ParameterError,
    effective_values,
    load_notebook,
    read_parameters,
    unknown,
)
from aiterlab.suite.report import say_reused
from aiterlab.suite.results import LATEST_NAME, RUN_NAME, led_to
from aiterlab.suite.wording import reused_words


@dataclass(frozen=True)
class Row:
    """One line of the list of runs: a notebook, what it costs, and its parameters in each profile."""

    stem: str
    minutes: float  # expected, profile `standard`, two cores
    needs: str
    profiles: Mapping[str, Mapping[str, Any]]
    after: tuple[str, ...] = ()  # notebooks whose records it reads
    reads: tuple[str, ...] = ()  # folders of the project that it reads, beside the package
    memory_gb: float = 2.0
    measures_time: str = "never"  # always, on a GPU, never: while it does, nothing else runs
    budget_minutes: float = 60.0  # the wall clock after which the notebook is stopped
    cell_budget_minutes: float = 60.0  # and that of each of its cells
    # what it asks of a Ray cluster beside memory, by profile: cpu (2 unless said), gpu, or what its nodes declare
    resources: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


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
    rows: Sequence[Row],
    notebooks: Path,
    *,
    profile: str,
    only: Iterable[str] = (),
    settings: Iterable[str] = (),
    given: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Plan]:
    """Read and check everything that was asked for; raises ParameterError with one line on the first mistake.

    Args:
        rows: the notebooks that there are.
        notebooks: their folder.
        profile: which of each row's profiles.
        only: stems of those to run; none for all.
        settings: parameters as `STEM.name=value`; they win over `given`, and that over the profile.
        given: parameters by stem and name, as from a file.
    """
    by_stem = {row.stem: row for row in rows}
    chosen = list(dict.fromkeys(only)) or list(by_stem)
    _require(chosen, by_stem)
    texts = _read_settings(settings, by_stem, chosen)
    plans = []
    for row in rows:
        if profile not in row.profiles:
            raise ParameterError(unknown("unknown profile", profile, row.profiles))
        if row.stem in chosen:
            overrides = {**row.profiles[profile], **(given or {}).get(row.stem, {})}
            plans.append(_plan(row, notebooks / f"{row.stem}.ipynb", overrides, texts.get(row.stem, {})))
    return plans


def choose(plans: Sequence[Plan], only: Sequence[str]) -> list[Plan]:
    """Return the plans with these stems, all if none is named; raises ParameterError over one that is not there."""
    by_stem = {plan.row.stem: plan for plan in plans}
    _require(only, by_stem)
    return [plan for stem, plan in by_stem.items() if not only or stem in only]


@dataclass(frozen=True)
class Run:
    """A results folder and what was asked for; `run.json` in it says so, and how it ended."""

    folder: Path
    profile: str
    only: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    given: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    resumed: bool = False
    started_utc: str = field(default_factory=status.utc_now)  # for the first time, where it was resumed

    def save(self, plans: Sequence[Plan], ending: str, exit_code: int | None, seconds: float | None) -> None:
        """Write `run.json`; a run is born interrupted, so that a killed runner has told the truth."""
        records.atomic_write_text(
            self.folder / RUN_NAME,
            records.dump_json(
                security.scrub_tree(
                    {
                        "run": self.folder.name,
                        "profile": self.profile,
                        "only": list(self.only),
                        "settings": list(self.settings),
                        "given": self.given,
                        "status": ending,
                        "exit_code": exit_code,
                        "started_utc": self.started_utc,
                        "seconds": seconds,
                        "notebooks": [plan.row.stem for plan in plans],
                        "provenance": provenance.collect(),
                    }
                )
            ),
        )


def new_run(results: Path, profile: str) -> Run:
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
            return Run(folder, profile)


def old_run(results: Path, name: str) -> Run:
    """Return a run that is there, to go on with it; raises ParameterError if there is none."""
    folder = led_to(Path(name) if Path(name).is_dir() else results / name)
    try:
        said = json.loads((folder / RUN_NAME).read_text(encoding="utf-8"))
        asked = said["profile"], tuple(said["only"]), tuple(said["settings"]), said["given"]
        started_utc = said["started_utc"]
    except (OSError, ValueError, KeyError, TypeError):
        known = sorted(file.parent.name for file in results.glob(f"*/{RUN_NAME}") if not file.parent.is_symlink())
        raise ParameterError(unknown("--resume: there is no run", name, known)) from None
    return Run(folder.resolve(), *asked, resumed=True, started_utc=started_utc)


@contextlib.contextmanager
def held(run: Run) -> Iterator[None]:
    """Keep a second runner out of the folder; raises ParameterError where one is at work in it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold.alone(run.folder))
        except BlockingIOError:
            raise ParameterError(f"{run.folder}: another run_all.py is at work in this run; wait for its end") from None
        yield


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
    plans: Sequence[Plan],
    run: Run,
    say: Callable[[str], None],
    *,
    at_once: int = 0,
    fail_fast: bool = False,
    start: Callable[[Job], schedule.Running] | None = None,
) -> Iterator[status.NotebookStatus]:
    """Run the plans as a graph, yielding each ending as it comes; a failure does not stop the rest, an interrupt does.

    Args:
        plans: what to run, in the order in which it is preferred.
        run: where the results go, and whether those that are there may stay.
        say: gets each line of progress.
        at_once: notebooks at the same time; 0 for one more than there are usable cores (each has stretches of one
            process, or of waiting), or for as many as there are elsewhere.
        fail_fast: skip what has not begun when one has failed.
        start: starts a notebook elsewhere, where others see to memory, cores and quiet.
    """
    facts = provenance.collect()
    limit = at_once or host.usable_cores() + 1
    if start is not None:
        # Of this machine nothing counts but the code; a result from elsewhere is not one from here.
        code = {name: value for name, value in facts.items() if name.startswith("git_")}
        nodes = [replace(_node(plan, run, code, say), memory_bytes=0, alone=False) for plan in plans]
        limit = at_once or len(nodes)
    else:
        start = _start_here(shared=len(plans) > 1)
        nodes = [_node(plan, run, facts, say) for plan in plans]
    graph = schedule.Graph(nodes, start, limit, say, _account, fail_fast)
    yield from graph.run()


def _start_here(*, shared: bool) -> Callable[[Job], schedule.Running]:
    """Return what starts a notebook on this machine; the imports that warm kernels share come before the first."""
    kind = functools.cache(lambda: worker.fork if warm.preload(shared=shared) else worker.spawn)
    return lambda job: kind()(job)


def _node(plan: Plan, run: Run, facts: Mapping[str, Any], say: Callable[[str], None]) -> schedule.Node:
    row = plan.row
    job = Job(
        notebook=plan.notebook,
        run_dir=run.folder,
        profile=run.profile,
        parameters=plan.values,
        overrides=plan.overrides,
        budget_s=row.budget_minutes * 60,
        cell_budget_s=row.cell_budget_minutes * 60,
        provenance=facts,
    )

    def prepare(job: Job, ended: Mapping[str, status.NotebookStatus]) -> Job | status.NotebookStatus:
        # Of one that is not run this time its record may lie there from an earlier time.
        found = [ended.get(stem) or status.NotebookStatus.load(run.folder / stem) for stem in row.after]
        needs = [ending for ending in found if ending]
        job = replace(job, key=resume.key(job, row.reads, needs))
        if run.resumed:
            found, why = resume.reusable(job.folder, job.key)
            if found is not None:
                return _reused(found, job, say)
            say(f"{job.stem}  runs again: {why}")
        say(f"{job.stem}  {plan.title}")
        return job

    # Without a GPU the times of kernels mean nothing, and nothing is lost when they share the cores.
    measures = row.measures_time == "always" or (row.measures_time == "on a GPU" and bool(gpus.visible()))
    return schedule.Node(job, row.after, int(row.memory_gb * 1e9), measures, prepare)


def _reused(found: status.NotebookStatus, job: Job, say: Callable[[str], None]) -> status.NotebookStatus:
    found.reused_from = found.reused_from or found.run
    found.reused_since_utc = found.reused_since_utc or found.ended_utc
    found.save(job.folder)
    say_reused(job.folder, reused_words(asdict(found)))
    say(f"{job.stem}  unchanged since {found.reused_since_utc}; its result is reused")
    return found


def _account(job: Job, ending: status.NotebookStatus) -> None:
    from aiterlab.suite import execution  # seconds, and hardly ever needed here

    execution.settle_unrun(job, ending)


def _require(stems: Iterable[str], known: Iterable[str]) -> None:
    for stem in stems:
        if stem not in known:
            raise ParameterError(unknown("unknown notebook", stem, known))


def _plan(row: Row, notebook: Path, overrides: dict[str, Any], texts: Mapping[str, str]) -> Plan:
    content = load_notebook(notebook)
    try:
        parameters = read_parameters(content)
    except ParameterError as error:
        raise ParameterError(f"{notebook}: {error}") from None
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
        _require([stem], known)
        if stem not in chosen:
            raise ParameterError(f"--set {setting!r}: --only leaves {stem} out of this run")
        texts.setdefault(stem, {})[name] = text
    return texts
