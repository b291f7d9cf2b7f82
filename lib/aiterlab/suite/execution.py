# SPDX-License-Identifier: Apache-2.0
"""Run one notebook in this very interpreter, and leave a true account of it however it ends.

papermill does the running. Its bookkeeping is replaced where it is wrong: after a dead kernel or a timeout it marks all
cells completed, and it writes the notebook in place. Here each cell is marked as it ended, every write is atomic, and a
failed, stopped or dead run leaves the same files as a good one.
"""

import asyncio
import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import nbformat
import papermill
from jupyter_client.manager import KernelManager
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbclient.util import run_sync
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

from aiterlab import records
from aiterlab.paths import RUN_DIR_VARIABLE, STARTED_IN_VARIABLE
from aiterlab.suite import packing, report, room, signals, status, warm
from aiterlab.suite.bookkeeping import TruthfulManager, settle_cells
from aiterlab.suite.executed import EXECUTED_NAME, publishable, without_banners, write_executed
from aiterlab.suite.job import Job
from aiterlab.suite.log import CappedLog
from aiterlab.suite.parameters import ParameterError, load_notebook
from aiterlab.suite.streams import Streams
from aiterlab.suite.watch import Stopped, Watch

ENGINE_NAME = "aiterlab"
KERNEL_NAME = "python3"
LOG_NAME = "log.txt"
OUTPUT_LIMIT_BYTES = 64_000_000  # of one cell; more fills the memory of the kernel, of this process and of readers
RENDER_S = 300.0  # outputs can be made so that rendering them takes for ever
_NEVER_S = 10**9
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_MEMORY_ERRORS = ("MemoryError", "OutOfMemoryError")  # Python's; torch's on a GPU


class SetupError(RuntimeError):
    """Something that keeps any cell from running; one line."""


def run_notebook(
    job: Job, say: Callable[[str], None], kernel: warm.Kernel | None = None, *, own_process: bool = False
) -> status.NotebookStatus:
    """Run one notebook and write its folder; returns a status, whatever the notebook does.

    Args:
        job: what to run.
        say: gets each line of progress.
        kernel: a process that waits to become the kernel; without one a new interpreter is started.
        own_process: this process runs nothing else, and may end when waiting for the kernel's sockets gets stuck.
    """
    began = monotonic()
    outcome = status.of(job)
    try:
        notebook = load_notebook(job.notebook)
    except ParameterError as error:  # it was there and whole when the run was planned
        outcome.end(status.SETUP_FAILED, str(error))
        write_results(job, nbformat.v4.new_notebook(), outcome)
        return outcome
    watch = Watch(outcome, job.budget_s, job.heartbeat_s, say, job.cell_budget_s)

    held = contextlib.ExitStack()

    def give_up() -> None:
        try:
            held.close()
            outcome.end(watch.stop_status, watch.stop_reason)
            outcome.seconds = round(monotonic() - began, 3)
            write_results(job, watch.notebook or notebook, outcome)
        finally:
            os._exit(1)

    watch.stuck = give_up if own_process else None
    with watch.signals():
        try:
            with held:
                held.enter_context(room.reserved(job.folder))
                outcome.save(job.folder)
                with CappedLog(job.folder / LOG_NAME) as log, watch:
                    _execute(job, notebook, watch, log, kernel)
        except BaseException as error:  # the error is the result: it becomes the status
            _settle(outcome, watch, error)
        else:
            outcome.end(status.OK)
        outcome.seconds = round(monotonic() - began, 3)
        write_results(job, watch.notebook or notebook, outcome)
    return outcome


class WatchedClient(PapermillNotebookClient):
    """papermill's client, reporting each cell to the watch and raising whatever ends the run."""

    def __init__(self, manager: TruthfulManager, log: CappedLog, **options: Any):
        super().__init__(manager, stdout_file=log, stderr_file=log, **options)
        self.watch = manager.watch
        self._output_bytes, self._streams = 0, Streams()

    def create_kernel_manager(self) -> KernelManager:
        """Connect through sockets in a folder: a free port may be taken a moment later, and anyone can listen."""
        manager = super().create_kernel_manager()
        self._sockets = tempfile.TemporaryDirectory(prefix="k-")
        # Without a name of its own a kernel's sockets are called like any other's in the working folder.
        manager.transport, manager.ip = "ipc", f"{self._sockets.name}/kernel"
        return manager

    def start_new_kernel(self, **options: Any) -> None:
        """Start the kernel, and hand its process to the watch before anything can go wrong in it."""
        super().start_new_kernel(**options)
        self.watch.attach(self.km.provisioner.pid)

    def papermill_execute_cells(self) -> None:
        """Execute the cells one by one until one of them ends the run."""
        self.watch.kernel_ready()
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

    async def async_execute_cell(self, cell: nbformat.NotebookNode, cell_index: int, **options: Any) -> Any:
        """Execute a cell, and save what there is also while it says nothing for long."""
        saving = asyncio.ensure_future(self.nb_man.keep_saving())
        try:
            return await super().async_execute_cell(cell, cell_index, **options)
        finally:
            saving.cancel()

    execute_cell = run_sync(async_execute_cell)

    def output(self, outs: list, msg: dict, display_id: str | None, cell_index: int) -> nbformat.NotebookNode | None:
        """Keep an output, unless its cell has written more than anyone can use: that ends the run."""
        content = msg["content"]
        self._output_bytes += len(content.get("text", "")) + sum(map(len, map(str, content.get("data", {}).values())))
        if self._output_bytes <= OUTPUT_LIMIT_BYTES:
            output = super().output(outs, msg, display_id, cell_index)
            if output is not None and output.output_type == "stream" and outs and outs[-1] is output:
                self._streams.add(outs)
            return output
        limit = f"more than {OUTPUT_LIMIT_BYTES / 1e6:.0f} MB of output in one cell"
        self.watch.stop(status.FAILED, f"{limit}; write what is large to a file of its own")
        return None

    def _execute_code(self, cell: nbformat.NotebookNode, index: int, cell_status: status.CellStatus) -> None:
        self.stdout_file.write(f"\n=== [{cell_status.number}] {cell_status.title}\n")
        self._output_bytes, self._streams = 0, Streams()
        try:
            self.execute_cell(cell, index)
            if self._output_bytes > OUTPUT_LIMIT_BYTES:  # though it came to its end before it was stopped
                raise Stopped
        except BaseException as error:
            if isinstance(error, DeadKernelError):
                error.args = (self._last_words(),)
            self.nb_man.cell_exception(cell, cell_index=index, exception=error)
            self.watch.status.error_cell = cell_status.number
            self.watch.cell_ended(cell_status, _status_of(error, self.watch))
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
        name = status.signal_name(-code)
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
        log: CappedLog,
        job: Job,
        environment: dict[str, str],
        kernel: warm.Kernel | None,
        **_: Any,
    ) -> nbformat.NotebookNode:
        """Execute `nb`; papermill passes its own options along, which have no meaning here."""
        watch.notebook = nb
        watch.status.cells = status.list_cells(nb)
        manager = TruthfulManager(nb, watch, job.folder)
        manager.notebook_start()
        if kernel is not None:
            warm.offer(kernel)
        client = WatchedClient(
            manager,
            log,
            kernel_name=kernel_name,
            log_output=False,
            startup_timeout=_NEVER_S,  # jupyter_client looks at the time of day; the watch has a clock that nobody sets
            # After its reply a busy kernel may need a while to deliver its output; the default is four seconds.
            iopub_timeout=60,
            coalesce_streams=True,
            # A crash in native code then leaves its stack in the log; the kernel's stderr is a pipe that dies with it.
            extra_arguments=[
                f"--IPKernelApp.exec_lines=__import__('faulthandler').enable({log.descriptor})",
                f"--Session.packer={packing.__name__}.{packing.pack.__name__}",
            ],
            store_widget_state=False,
        )
        try:
            # What the kernel's process itself writes goes to the log as well, not into the progress lines.
            files = {"stdout": log.descriptor, "stderr": log.descriptor, "pass_fds": (log.descriptor,)}
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


def _execute(
    job: Job, notebook: nbformat.NotebookNode, watch: Watch, log: CappedLog, kernel: warm.Kernel | None
) -> None:
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
            kernel=kernel,
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


def _status_of(error: BaseException, watch: Watch) -> str:
    """Word an ending; a stop that the watch asked for explains every later error."""
    if watch.stop_status:
        return watch.stop_status
    if isinstance(error, KeyboardInterrupt):
        return status.INTERRUPTED
    if isinstance(error, CellExecutionError) and error.ename.split(".")[-1] in _MEMORY_ERRORS:
        return status.OUT_OF_MEMORY
    if isinstance(error, DeadKernelError):
        return status.OUT_OF_MEMORY if watch.out_of_memory() else status.KERNEL_DIED
    return status.FAILED


def _settle(outcome: status.NotebookStatus, watch: Watch, error: BaseException) -> None:
    """Turn what ended the run into its status."""
    ending = _status_of(error, watch)
    started = any(cell.status != status.CELL_NOT_RUN for cell in outcome.cells)
    if watch.stop_status:
        outcome.end(ending, watch.stop_reason)
    elif isinstance(error, CellExecutionError):
        killed = "; the system killed a process for want of memory meanwhile" if watch.out_of_memory() else ""
        outcome.end(ending, status.first_line(f"{error.ename}: {error.evalue}") + killed)
    elif isinstance(error, SetupError | DeadKernelError):
        outcome.end(ending if started else status.SETUP_FAILED, str(error))
    else:
        outcome.end(ending if started else status.SETUP_FAILED, f"{type(error).__name__}: {error}")


def settle_unrun(job: Job, outcome: status.NotebookStatus) -> None:
    """Write the folder of a notebook whose process cannot do it: it was killed, or it was never begun."""
    with contextlib.suppress(ParameterError):
        notebook = without_banners(load_notebook(job.folder / EXECUTED_NAME))
        if len(status.code_cells(notebook)) == len(outcome.cells):
            write_results(job, notebook, outcome)
            return
    outcome.cells = []
    try:
        notebook = load_notebook(job.notebook)
    except ParameterError:
        notebook = nbformat.v4.new_notebook()
    write_results(job, notebook, outcome)


def write_results(job: Job, notebook: nbformat.NotebookNode, outcome: status.NotebookStatus) -> None:
    """Write the log, the executed copy, the report and, last, the status that vouches for them."""
    outcome.cells = outcome.cells or status.list_cells(notebook)
    outcome.finding = _finding(job.folder / records.RECORD_NAME)
    outcome.stamp(notebook)
    settle_cells(notebook)
    writers = {
        "log": lambda _: _scrub_logs(job.folder),
        "executed copy": lambda shown: write_executed(shown, job.folder / EXECUTED_NAME),
        # From the notebook in memory: the executed copy may have lost its largest figures.
        "report": lambda shown: _write_report(shown, job.folder),
    }
    broken = set()
    for what, write in writers.items():
        try:
            write(notebook)
        except Exception as error:  # a run without its report is a failed run, not a lost one
            broken.add(what)
            if outcome.ok:
                outcome.end(status.FAILED, f"the {what} could not be written: {type(error).__name__}: {error}")
                outcome.stamp(notebook)
    if broken:  # once more, with the ending that it has now: what an output has prevented tells it without outputs
        bare = nbformat.from_dict({**notebook, "cells": [{**cell, "outputs": []} for cell in notebook.cells]})
        for what, write in writers.items():
            with contextlib.suppress(Exception):
                write(bare if what in broken else notebook)
    outcome.save(job.folder)


def _write_report(notebook: nbformat.NotebookNode, folder: Path) -> None:
    with signals.within(RENDER_S):
        report.write_report(publishable(notebook), folder)


def _scrub_logs(folder: Path) -> None:
    """Take home directories and secrets out of the run's own log, and out of those of processes that it has started."""
    own = folder / LOG_NAME
    own.touch()
    for log in (own, *folder.rglob("*.log")):
        records.scrub_file(log)


def _finding(record: Path) -> str | None:
    """Return the record's `finding`, the one sentence that answers the notebook's question, if it wrote one."""
    with contextlib.suppress(OSError, records.RecordError):
        finding = records.load_record(record).get("finding")
        return finding if isinstance(finding, str) else None
    return None
