# SPDX-License-Identifier: Apache-2.0
"""Run one notebook in this very interpreter, and leave a true account of it however it ends.

papermill does the running. Its bookkeeping is replaced where it is wrong: after a dead kernel or a timeout it marks all
cells completed, and it writes the notebook in place. Here each cell is marked as it ended, every write is atomic, and a
failed, stopped or dead run leaves the same files as a good one.
"""

import contextlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any, TextIO

import nbformat
import papermill
from jupyter_client.manager import KernelManager
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines

from aiterlab import provenance, records
from aiterlab.paths import RUN_DIR_VARIABLE, STARTED_IN_VARIABLE
from aiterlab.suite import report, status
from aiterlab.suite.executed import EXECUTED_NAME, publishable, write_executed
from aiterlab.suite.parameters import load_notebook
from aiterlab.suite.watch import Watch

ENGINE_NAME = "aiterlab"
KERNEL_NAME = "python3"
LOG_NAME = "log.txt"
_SAVE_INTERVAL_S = 2.0
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Job:
    """One notebook to run: where it lies, where its results go, and how long it may take."""

    notebook: Path
    run_dir: Path
    profile: str
    parameters: Mapping[str, Any]  # effective values, for the status and the report
    overrides: Mapping[str, Any]  # those of them that the notebook itself does not say
    budget_s: float
    provenance: Mapping[str, Any]
    heartbeat_s: float = 30.0

    @property
    def stem(self) -> str:
        """Name of the notebook, of its results folder and of its row."""
        return self.notebook.stem

    @property
    def folder(self) -> Path:
        """Folder of this notebook's results, the same that `paths.output_dir` gives inside the kernel."""
        return self.run_dir / self.stem


class SetupError(RuntimeError):
    """Something that keeps any cell from running; one line."""


def run_notebook(job: Job, say: Callable[[str], None]) -> status.NotebookStatus:
    """Run one notebook and write its folder; returns a status, whatever the notebook does."""
    began = monotonic()
    outcome = status.NotebookStatus(
        stem=job.stem,
        run=job.run_dir.name,
        profile=job.profile,
        parameters=dict(job.parameters),
        started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        provenance=dict(job.provenance),
    )
    outcome.save(job.folder)
    notebook = load_notebook(job.notebook)
    watch = Watch(outcome, job.budget_s, job.heartbeat_s, say)
    with watch.signals():
        with watch, open(job.folder / LOG_NAME, "a", encoding="utf-8") as log:
            try:
                _execute(job, notebook, watch, log)
            except BaseException as error:  # the error is the result: it becomes the status
                _settle(outcome, watch, error)
            else:
                outcome.end(status.OK)
        outcome.seconds = round(monotonic() - began, 3)
        _write_results(job, watch.notebook or notebook, outcome)
    return outcome


class TruthfulManager(NotebookExecutionManager):
    """papermill's bookkeeping, except that what did not run is said not to have run, and writing is atomic."""

    def __init__(self, nb: nbformat.NotebookNode, watch: Watch, folder: Path):
        super().__init__(nb, progress_bar=False)
        self.watch = watch
        self.folder = folder

    def save(self, **_: Any) -> None:
        """Write notebook and status as they stand, so that a long run can be looked into and a killed one is kept."""
        if (self.now() - self.last_save_time).total_seconds() >= _SAVE_INTERVAL_S:
            write_executed(self.nb, self.folder / EXECUTED_NAME)
            self.watch.status.save(self.folder)
            self.last_save_time = self.now()

    def notebook_complete(self, **options: Any) -> None:
        """Finish the metadata; papermill would call every pending cell completed."""
        for cell in self.nb.cells:
            if cell.metadata.papermill["status"] == self.PENDING:
                cell.metadata.papermill["status"] = status.CELL_NOT_RUN
        super().notebook_complete(**options)


class WatchedClient(PapermillNotebookClient):
    """papermill's client, reporting each cell to the watch and raising whatever ends the run."""

    def __init__(self, manager: TruthfulManager, log: TextIO, **options: Any):
        super().__init__(manager, stdout_file=log, stderr_file=log, **options)
        self.watch = manager.watch

    def start_new_kernel(self, **options: Any) -> None:
        """Start the kernel, and hand its process to the watch before anything can go wrong in it."""
        super().start_new_kernel(**options)
        self.watch.attach(self.km.provisioner.pid, self.km.provisioner.pgid)

    def papermill_execute_cells(self) -> None:
        """Execute the cells one by one until one of them ends the run."""
        statuses = iter(self.watch.status.cells)
        for index, cell in enumerate(self.nb.cells):
            cell_status = next(statuses) if cell.cell_type == "code" and cell.source.strip() else None
            if cell_status:
                self.watch.cell_started(cell_status)
            self.nb_man.cell_start(cell, index)
            try:
                if cell_status:
                    self._execute_code(cell, index, cell_status)
            finally:
                self.nb_man.cell_complete(cell, cell_index=index)

    def _execute_code(self, cell: nbformat.NotebookNode, index: int, cell_status: status.CellStatus) -> None:
        self.stdout_file.write(f"\n=== [{cell_status.number}] {cell_status.title}\n")
        self.stdout_file.flush()
        try:
            self.execute_cell(cell, index)
        except BaseException as error:
            if isinstance(error, DeadKernelError):
                error.args = (self._last_words(),)
            self.nb_man.cell_exception(cell, cell_index=index, exception=error)
            self.watch.status.error_cell = cell_status.number
            self.watch.cell_ended(cell_status, self.watch.stop_status or _status_of(error))
            raise
        finally:
            for output in cell.outputs:
                if output.output_type == "error":
                    self.stderr_file.write(_ANSI.sub("", "\n".join(output.traceback)) + "\n")
        skipped = self.skip_cells_with_tag in cell.metadata.get("tags", [])
        self.watch.cell_ended(cell_status, status.CELL_SKIPPED if skipped else status.OK)

    def _last_words(self) -> str:
        """Say how the kernel's process ended, which is known only until the client cleans it up."""
        process = getattr(self.km.provisioner, "process", None)
        code = process.poll() if process is not None else None
        if code is None:
            return "the kernel died"
        if code >= 0:
            return f"the kernel ended with exit code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"the kernel was killed by {name}" + ("; out of memory is the usual reason" if name == "SIGKILL" else "")


class AiterlabEngine(NBClientEngine):
    """The papermill engine `aiterlab`: NBClientEngine with the truthful manager and the watched client."""

    @classmethod
    def execute_notebook(
        cls,
        nb: nbformat.NotebookNode,
        kernel_name: str,
        *,
        watch: Watch,
        log: TextIO,
        job: Job,
        environment: dict[str, str],
        **_: Any,
    ) -> nbformat.NotebookNode:
        """Execute `nb`; papermill passes its own options along, which have no meaning here."""
        watch.notebook = nb
        watch.status.cells = status.list_cells(nb)
        manager = TruthfulManager(nb, watch, job.folder)
        manager.notebook_start()
        client = WatchedClient(
            manager,
            log,
            kernel_name=kernel_name,
            log_output=False,
            startup_timeout=120,
            # After its reply a busy kernel may need a while to deliver its output; the default is four seconds.
            iopub_timeout=60,
            coalesce_streams=True,
            # A crash in native code then leaves its stack in the log; the kernel's stderr is a pipe that dies with it.
            extra_arguments=[f"--IPKernelApp.exec_lines=__import__('faulthandler').enable({log.fileno()})"],
            store_widget_state=False,
        )
        try:
            # What the kernel's process itself writes goes to the log as well, not into the progress lines.
            files = {"stdout": log.fileno(), "stderr": log.fileno(), "pass_fds": (log.fileno(),)}
            client.execute(env=environment, **files)
        finally:
            manager.notebook_complete()
        # The watch holds the notebook. From what is returned papermill would make a failure of any error output, also
        # in cells that are tagged `raises-exception`.
        return nbformat.v4.new_notebook()


papermill_engines.register(ENGINE_NAME, AiterlabEngine)


def check_kernel() -> None:
    """Raise SetupError unless the kernel `python3` is this very interpreter; installed kernelspecs may be anyone's."""
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    try:
        program = KernelManager(kernel_name=KERNEL_NAME).format_kernel_cmd()[0]
    except Exception as error:  # jupyter_client raises what it likes over a broken kernelspec
        raise SetupError(f"no usable kernel {KERNEL_NAME!r}: {error}; install ipykernel") from error
    ours, theirs = Path(sys.executable), Path(program)
    # Every virtual environment's python links to the same base file, so the folders have to agree as well.
    if not theirs.exists() or theirs.parent != ours.parent or theirs.resolve() != ours.resolve():
        mend = f"run: {ours} -m ipykernel install --sys-prefix"
        raise SetupError(f"the kernel {KERNEL_NAME!r} would run {theirs} instead of {ours}; {mend}")


def kernel_environment(run_dir: Path) -> dict[str, str]:
    """Return our environment with the run's folder, and with import paths that survive the kernel's working folder."""
    environment = {**os.environ, RUN_DIR_VARIABLE: str(run_dir.absolute()), STARTED_IN_VARIABLE: os.getcwd()}
    if environment.get("PYTHONPATH"):
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, environment["PYTHONPATH"].split(os.pathsep)))
    return environment


def _execute(job: Job, notebook: nbformat.NotebookNode, watch: Watch, log: TextIO) -> None:
    check_kernel()
    with _quiet("papermill", "traitlets"):
        papermill.execute_notebook(
            notebook,
            None,
            parameters=dict(job.overrides),
            engine_name=ENGINE_NAME,
            kernel_name=KERNEL_NAME,
            language="python",
            progress_bar=False,
            cwd=job.notebook.parent,
            watch=watch,
            log=log,
            job=job,
            environment=kernel_environment(job.run_dir),  # made here: papermill changes into the notebook's folder
        )


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silence loggers that repeat, or contradict, what the progress lines and the status say."""
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _status_of(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return status.INTERRUPTED
    return status.KERNEL_DIED if isinstance(error, DeadKernelError) else status.FAILED


def _settle(outcome: status.NotebookStatus, watch: Watch, error: BaseException) -> None:
    """Turn what ended the run into its status; a stop that the watch asked for explains every later error."""
    ending = watch.stop_status or _status_of(error)
    started = any(cell.status != status.CELL_NOT_RUN for cell in outcome.cells)
    if ending == status.TIMEOUT:
        outcome.end(ending, f"stopped after its budget of {watch.budget_s:.0f} s")
    elif ending == status.INTERRUPTED:
        outcome.end(ending, "stopped by Ctrl-C or SIGTERM")
    elif isinstance(error, CellExecutionError):
        outcome.end(ending, f"{error.ename}: {error.evalue}")
    elif isinstance(error, SetupError | DeadKernelError):
        outcome.end(ending if started else status.SETUP_FAILED, str(error))
    else:
        outcome.end(ending if started else status.SETUP_FAILED, f"{type(error).__name__}: {error}")


def _write_results(job: Job, notebook: nbformat.NotebookNode, outcome: status.NotebookStatus) -> None:
    """Write the executed copy, the report, the log and, last, the status that vouches for them."""
    outcome.cells = outcome.cells or status.list_cells(notebook)
    outcome.finding = _finding(job.folder / records.RECORD_NAME)
    outcome.stamp(notebook)
    write_executed(notebook, job.folder / EXECUTED_NAME)
    log = job.folder / LOG_NAME
    records.atomic_write_text(log, provenance.scrub(log.read_text(encoding="utf-8", errors="replace")))
    try:
        # From the notebook in memory: the executed copy may have lost its largest figures.
        report.write_report(publishable(notebook), job.folder)
    except Exception as error:  # a run without its report is a failed run, not a lost one
        outcome.end(status.FAILED, f"the report could not be rendered: {type(error).__name__}: {error}")
    outcome.save(job.folder)


def _finding(record: Path) -> str | None:
    """Return the record's `finding`, the one sentence that answers the notebook's question, if it wrote one."""
    with contextlib.suppress(OSError, records.RecordError):
        finding = records.load_record(record).get("finding")
        return finding if isinstance(finding, str) else None
    return None
