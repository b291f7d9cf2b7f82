# SPDX-License-Identifier: Apache-2.0
"""Who imports AITER, and when: every import statement that names it is written down as it runs."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path

from aiterlab import hotfix
from aiterlab.machines import ledger


class ImportLedger:
    """Records import statements of the package `aiter` that stand in the code of one tree, or in the hotfix over it.

    A module can be imported once and named a hundred times, and it is the naming that matters here: a statement that
    runs after the first import is recorded too, with `first` false.
    """

    def __init__(self, package: Path) -> None:
        self.package = str(package)
        self.entries: list[dict] = []
        self._import = builtins.__import__

    def watch(self) -> None:
        builtins.__import__ = self._recording_import

    def _recording_import(self, name, globals=None, locals=None, fromlist=(), level=0):
        if level == 0 and name.partition(".")[0] == "aiter":
            self._note(name, sys._getframe(1))
        return self._import(name, globals, locals, fromlist, level)

    def _note(self, name: str, frame) -> None:
        file = frame.f_code.co_filename
        if file.startswith(self.package):
            file = f"vllm{file.removeprefix(self.package)}"
        elif file == hotfix.__file__:
            file = "aiterlab/hotfix.py"
        else:
            return  # AITER importing its own parts
        entry = {
            "module": name,
            "file": file,
            "line": frame.f_lineno,
            "importer": _importer(file, frame.f_code.co_name),
            "step": ledger.step(),
            "first": not any(e["first"] for e in self.entries) and "aiter" not in sys.modules,
        }
        if all(
            (entry["file"], entry["line"], entry["module"]) != (e["file"], e["line"], e["module"]) for e in self.entries
        ):
            self.entries.append(entry)


def _importer(file: str, function: str) -> str:
    """The three moments the investigation tells apart."""
    if function != "<module>":
        return "call"
    return "operator module" if file.endswith("_aiter_ops.py") else "backend module"
