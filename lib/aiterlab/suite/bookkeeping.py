# SPDX-License-Identifier: Apache-2.0
"""Keep papermill's account of the cells, truthfully: what did not run has not run, and no clock that is set counts."""

import asyncio
import contextlib
from pathlib import Path
from time import monotonic
from typing import Any

import nbformat
from papermill.engines import NotebookExecutionManager

from aiterlab.suite import status
from aiterlab.suite.executed import EXECUTED_NAME, write_executed
from aiterlab.suite.watch import Watch

_SAVE_INTERVAL_S = 2.0


class TruthfulManager(NotebookExecutionManager):
    """papermill's bookkeeping, except that what did not run is said not to have run, and writing is atomic."""

    def __init__(self, nb: nbformat.NotebookNode, watch: Watch, folder: Path):
        super().__init__(nb, progress_bar=False)
        self.watch = watch
        self.folder = folder
        self._began = self._cell_began = monotonic()
        self._next_save = self._began + _SAVE_INTERVAL_S
        self._unsaved = False

    def save(self, **_: Any) -> None:
        """Write notebook and status as they stand, so that a long run can be looked into and a killed one is kept."""
        self._unsaved = True
        began = monotonic()
        if began >= self._next_save:
            with contextlib.suppress(Exception):  # what cannot be written now may be at the end, which is what counts
                self.watch.status.stamp(self.nb)
                write_executed(self.nb, self.folder / EXECUTED_NAME)
                self.watch.status.save(self.folder)
            self._unsaved = False
            # Saving what is large takes long; it must not become what the run does most of the time.
            self._next_save = monotonic() + max(_SAVE_INTERVAL_S, 5 * (monotonic() - began))

    async def keep_saving(self) -> None:
        """Save what `save` has put off, from time to time, until cancelled."""
        while True:
            await asyncio.sleep(_SAVE_INTERVAL_S)
            if self._unsaved:
                self.save()

    def autosave_cell(self) -> None:
        """Save after a message; papermill asks the time of day whether it should."""
        self.save()

    def cell_start(self, cell: nbformat.NotebookNode, cell_index: int | None = None, **options: Any) -> None:
        """Begin a cell."""
        self._cell_began = monotonic()
        super().cell_start(cell, cell_index, **options)

    def cell_complete(self, cell: nbformat.NotebookNode, cell_index: int | None = None, **options: Any) -> None:
        """End a cell."""
        super().cell_complete(cell, cell_index, **options)
        cell.metadata.papermill["duration"] = round(monotonic() - self._cell_began, 6)

    def notebook_complete(self, **options: Any) -> None:
        """Finish the metadata; papermill would call every pending cell completed."""
        settle_cells(self.nb)
        super().notebook_complete(**options)
        self.nb.metadata.papermill["duration"] = round(monotonic() - self._began, 6)


def settle_cells(notebook: nbformat.NotebookNode) -> None:
    """Say of each cell that papermill has left pending or running how it ended; nothing runs any more."""
    ended = {TruthfulManager.PENDING: status.CELL_NOT_RUN, TruthfulManager.RUNNING: TruthfulManager.FAILED}
    for cell in notebook.cells:
        if account := cell.metadata.get("papermill"):
            account["status"] = ended.get(account["status"], account["status"])
