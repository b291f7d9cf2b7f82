# SPDX-License-Identifier: Apache-2.0
"""Run small notebooks through the real command line, break things meanwhile, and hold what is left to one standard."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import nbformat
import psutil
from suite_notebooks import write_notebook

import run_all
from aiterlab.suite import status

WAYS = ("fork", "spawn")
HARD_LIMIT_S = 150  # of one runner; a harness must not hang
GONE_S = 5.0
MARK = "FAULT_HARNESS_RUN"  # in the environment of a runner, and so of all that it starts

# The project's command line, with rows of its own. `torch` is not worth its seconds here.
_RUNNER = """
import json, os, sys
from pathlib import Path
import run_all
from aiterlab.suite import resume, warm
from aiterlab.suite.runs import Row
way, rows, notebooks, *argv = sys.argv[1:]
warm.SHARED = ()
if way == "spawn":
    warm.preload = lambda **_: False
if os.environ.get("FAULT_HARNESS_LIBRARY"):
    folder = resume._folder
    resume._folder = lambda path: folder(path) + os.path.basename(path).replace("aiterlab", "changed")
every = {"smoke": {}, "standard": {}, "full": {}}
rows = [Row(**{"minutes": 1, "needs": "", "profiles": every, **row}) for row in json.loads(rows)]
sys.exit(run_all.main(argv, rows, Path(notebooks)))
"""

TABLE: list[str] = []


class Bench:
    """A folder of notebooks, and runs of them."""

    def __init__(self, folder: Path, way: str = "fork", results: Path | None = None):
        self.notebooks, self.results, self.way = folder / "notebooks", results or folder / "results", way
        self.rows: dict[str, dict] = {}
        self._temporary = tempfile.TemporaryDirectory(prefix="fh-")  # a short path: sockets lie there
        self.temporary = Path(self._temporary.name)

    def add(self, stem: str, *cells: str, parameters: str | None = None, **row) -> None:
        """Write a notebook, and list it."""
        options = {} if parameters is None else {"parameters": parameters}
        write_notebook(self.notebooks / f"{stem}.ipynb", *cells, **options)
        self.rows[stem] = {"stem": stem, **row}

    def start(self, *argv: str, shell: str | None = None, **environment: str) -> "Run":
        """Start the command line; `shell` is a bash line in which "$@" stands for the command."""
        mark = uuid.uuid4().hex
        command = [sys.executable, "-c", _RUNNER, self.way, json.dumps(list(self.rows.values())), str(self.notebooks)]
        command += ["--results", str(self.results), *argv]
        if shell:
            command = ["bash", "-c", shell, "runner", *command]
        root = str(Path(run_all.__file__).parent)
        path = os.pathsep.join([*environment.pop("PYTHONPATH", "").split(), root, *sys.path])
        before = set(self.results.glob("*Z-*"))
        # ipykernel leaves file descriptors alone where it sees pytest, and shows less than users get.
        inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**inherited, "PYTHONPATH": path, "TMPDIR": str(self.temporary), **environment, MARK: mark},
        )
        return Run(self, process, mark, before)

    def run(self, *argv: str, **options) -> "Run":
        """Start the command line and wait for its end."""
        run = self.start(*argv, **options)
        run.wait()
        return run


class Run:
    """A runner at work, all that it said, and all that it started."""

    def __init__(self, bench: Bench, process: subprocess.Popen, mark: str, before: set[Path]):
        self.bench, self.process, self.mark, self._before = bench, process, mark, before
        self.lines: list[str] = []
        self.peak_bytes = 0  # resident set of the largest process
        self.peak_of = ""
        self.began = time.monotonic()
        self._done = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def text(self) -> str:
        return "".join(self.lines)

    @property
    def folder(self) -> Path:
        """The folder of this run."""
        (folder,) = set(self.bench.results.glob("*Z-*")) - self._before or [self.bench.results / "latest"]
        return folder.resolve()

    def until(self, said: str, timeout_s: float = 60) -> None:
        """Wait until a line that matches was said."""
        self.until_true(lambda: re.search(said, self.text), timeout_s, f"{said!r} to be said")

    def until_true(self, test, timeout_s: float = 60, what: str = "something") -> None:
        """Wait until `test` holds."""
        deadline = time.monotonic() + timeout_s
        while not test():
            assert time.monotonic() < deadline, f"waited in vain for {what}; said so far:\n{self.text}"
            assert self.process.poll() is None or test(), f"ended before {what}; said:\n{self.text}"
            time.sleep(0.05)

    def wait(self, timeout_s: float = HARD_LIMIT_S) -> int:
        """Wait for the end of the runner; kills everything where there is none."""
        try:
            self.process.wait(max(1.0, timeout_s))
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"the runner did not end within {timeout_s} s; it said:\n{self.text}") from None
        finally:
            self._done.set()
        self._reader.join(1)  # what holds its output still is found by `left`
        return self.process.returncode

    def watch_memory(self) -> None:
        """Sample the resident sets of all processes, to be asked for at the end."""

        def sample():
            while not self._done.wait(0.1):
                for process in self.processes():
                    try:
                        seen = process.memory_info().rss
                        if seen > self.peak_bytes:
                            self.peak_bytes, self.peak_of = seen, " ".join(process.cmdline())[:80]
                    except psutil.Error:
                        pass

        threading.Thread(target=sample, daemon=True).start()

    def processes(self) -> list[psutil.Process]:
        """Everything that this run has started and that lives, wherever it hangs in the tree."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and wanted in (entry / "environ").read_bytes():
                    process = psutil.Process(int(entry.name))
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
            except (OSError, psutil.Error):
                pass
        return sorted(found, key=lambda process: process.create_time())

    def left(self) -> list[str]:
        """What is still there some seconds after the end."""
        deadline = time.monotonic() + GONE_S
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        said = [f"{process.pid} {' '.join(process.cmdline())[:150]}" for process in left]
        self.kill_all()
        return said

    def kill_all(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)


def check_notebook(
    folder: Path, word: str, cells: list[str] | None = None, reason: str = "", case: str = ""
) -> status.NotebookStatus:
    """Everything that one notebook leaves tells the same, true story, and every file is whole."""
    saved = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    outcome = status.NotebookStatus.load(folder)
    told = f"{folder.name}: {saved['status']}: {saved['reason']}; {[cell['status'] for cell in saved['cells']]}"
    assert outcome is not None, told
    assert saved["status"] == word and re.search(reason, saved["reason"] or ""), told
    assert saved["ended_utc"] is not None and (saved["seconds"] is None or 0 <= saved["seconds"] < HARD_LIMIT_S), told
    notebook = nbformat.read(folder / "executed.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.aiterlab["status"] == word
    assert notebook.cells[0].source.startswith(f"> **{word}**"), notebook.cells[0].source
    states = [cell["status"] for cell in saved["cells"]]
    code = status.code_cells(notebook)
    assert [cell.metadata.aiterlab["status"] for cell in code] == states, told
    if cells is not None:
        assert states == cells, told
    if word == status.OK:
        assert set(states) <= {status.OK, status.CELL_SKIPPED}, told
    else:
        stops = [place for place, state in enumerate(states) if state not in (status.OK, status.CELL_SKIPPED)]
        assert stops or not states, told
        assert not stops or set(states[stops[0] + 1 :]) <= {status.CELL_NOT_RUN}, told
    for cell, state in zip(code, states, strict=True):
        papermill = cell.metadata.get("papermill", {}).get("status")
        if papermill is not None and state == status.CELL_NOT_RUN:
            assert papermill in ("not run", "pending"), (state, papermill)
        if papermill is not None and state == status.OK:
            assert papermill == "completed"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.index(f"<strong>{word}</strong>") < page.index("<main>") and page.rstrip().endswith("</html>")
    if (folder / "log.txt").exists():
        (folder / "log.txt").read_text(encoding="utf-8")
    if (folder / "record.json").exists():
        json.loads((folder / "record.json").read_text(encoding="utf-8"))
    TABLE.append(f"{case or folder.name:<44} {word:<14} {(saved['reason'] or '-')[:90]}")
    return outcome


def check_run(run: Run, word: str, exit_code: int | None, returned: int | None = None, may_hold: bool = False) -> None:
    """What the run leaves as a whole: one word, no half-written file, no process, nothing of theirs elsewhere."""
    left = run.left()
    assert left == [], f"still running: {left}"
    assert [str(path) for path in run.bench.temporary.rglob("*")] == []
    assert list(Path("/dev/shm").glob(f"*{run.mark}*")) == []
    said = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    assert (said["status"], said["exit_code"]) == (word, exit_code), (said["status"], said["exit_code"], run.text)
    assert run.process.returncode == (exit_code if returned is None else returned), run.text
    odd = [
        str(path.relative_to(run.folder))
        for path in run.folder.rglob("*")
        if path.name.startswith(".") or path.suffix == ".tmp" or (path.suffix == ".json" and path.stat().st_size == 0)
    ]
    # Nobody is left to delete the lock of a killed runner; it holds nobody up, and the next run deletes it.
    odd = [path for path in odd if not (may_hold and path == ".lock")]
    assert odd == [], f"left lying about: {odd}"
    assert [path.name for path in run.bench.results.glob(".*")] == []
    for file in run.folder.rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))
