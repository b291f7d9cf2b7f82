# SPDX-License-Identifier: Apache-2.0
"""A process that holds the imports which no answer depends on, and starts the processes that answer.

Run as `python -m aiterlab.probes.server`. It reads one JSON request per line from standard input and writes one JSON
line for each thing that happens to standard output; it ends, with everything that it started, when standard input
closes. It imports neither vLLM nor AITER and never touches a GPU: what it forks is as clean as a new interpreter.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import sys
import time
from dataclasses import asdict
from pathlib import Path

from aiterlab import importing
from aiterlab.probes import ahead, child, forks, nest, pages, preload

_ENVIRONMENT = dict(os.environ)  # before anything that is imported could change it
_TICK_S, _PAUSE_S = 0.05, 0.0005
_FAREWELL_ROUNDS = 5


def main() -> None:
    """Preload what the first request line names, then serve until standard input closes."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library that prints while it is imported must not speak on the channel
    first = json.loads(sys.stdin.readline())
    gc.disable()  # what is imported stays, and a cell lives for less than a second
    importing.skip_address_grammars()
    if spoilt_by := preload.import_all(first.get("modules", ())):
        channel.write(json.dumps({"leave_out": spoilt_by}) + "\n")
        return
    ahead.prepare()
    gc.collect()
    gc.freeze()  # children share these pages; a collection in a child would copy them
    pages.collapse()
    channel.write(json.dumps({"ready": True}) + "\n")
    _Server(channel).serve()


class _Server:
    def __init__(self, channel) -> None:
        self.channel = channel
        self.units: dict[int, dict] = {}  # id -> the request, with its process
        self.started: dict[int, list[int]] = {}  # id -> the processes that the unit's own has started since
        self.events, self.report_to = os.pipe()
        os.set_blocking(0, False)
        os.set_blocking(self.events, False)
        self.heard = {0: b"", self.events: b""}

    def serve(self) -> None:
        try:
            while True:
                pipes = [unit["process"].pipe for unit in self.units.values()]
                select.select([0, self.events, *pipes], [], [], _TICK_S)
                time.sleep(_PAUSE_S)  # between closing its pipe and being reapable
                for request in (lines := self._lines(0)) or ():
                    self._start(request)
                if lines is None:
                    return
                self._relay()
                self._reap()
        finally:
            self._farewell()

    def _lines(self, source: int) -> list[dict] | None:
        """What has been said since; None once the other side has closed."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(source, 1 << 20):
                self.heard[source] += chunk
            return None
        *lines, self.heard[source] = self.heard[source].split(b"\n")
        return [json.loads(line) for line in lines]

    def _say(self, message: dict) -> None:
        self.channel.write(json.dumps(message) + "\n")

    def _start(self, unit: dict) -> None:
        if unit["kind"] != "cold":
            _hold_code(unit)
        run = {"nest": nest.serve, "imports": nest.try_imports, "cold": _cold}[unit["kind"]]

        def report(event: dict) -> None:
            os.write(self.report_to, (json.dumps({"unit": unit["id"]} | event) + "\n").encode())

        unit["process"] = forks.fork(lambda: run(unit, report), unit["log"])
        self.units[unit["id"]] = unit
        self.started[unit["id"]] = []

    def _relay(self) -> None:
        for event in self._lines(self.events):
            started = self.started[event["unit"]]
            if "process" in event:
                started.append(event["process"])
                continue
            if "group" in event:  # a cell dies with its group; what the cell has started does not
                self._kill(started)
            self._say(event)

    def _kill(self, processes: list[int]) -> None:
        while processes:
            forks.kill(processes.pop())

    def _reap(self) -> None:
        for number, unit in list(self.units.items()):
            if (ending := unit["process"].ended(unit["limit_s"])) is not None:
                self._relay()
                del self.units[number]
                self._kill(self.started[number])
                self._say({"unit": number, "ended_unit": True, **asdict(ending)})

    def _farewell(self) -> None:
        """End everything: the units' own processes first, then what they say that they had started."""
        for unit in self.units.values():
            forks.kill(unit["process"].pid)
        for _ in range(_FAREWELL_ROUNDS):
            for event in self._lines(self.events):
                if "process" in event:
                    forks.kill(event["process"])
            for processes in self.started.values():
                self._kill(processes)
            time.sleep(0.01)


def _hold_code(unit: dict) -> None:
    """Have the code at hand that processes forked from this one will execute: the probes', the tree's and AITER's."""
    from aiterlab.probes import questions  # noqa: F401

    sys.pycache_prefix = child.compiled_files()
    request = unit["groups"][0]["request"] if "groups" in unit else unit["request"]
    ahead.hold_code([Path(request["tree"]["folder"]) / nest.TREE, *ahead.folders_of("aiter")])


def _cold(unit: dict, report) -> None:
    """Become a new interpreter that answers one cell."""
    read, write = os.pipe()
    os.write(write, json.dumps(unit["request"]).encode())
    os.close(write)
    os.dup2(read, 0)
    forks.keep_pipe()
    command = [sys.executable, "-P", "-m", "aiterlab.probes.child", unit["answer"]]
    os.execve(sys.executable, command, _ENVIRONMENT)


if __name__ == "__main__":
    main()
