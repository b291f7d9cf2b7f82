# SPDX-License-Identifier: Apache-2.0
"""What the detector reads in the trees' source, beside what the probes saw of the same places."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from aiterlab import paths, records
from aiterlab import scan as scanner
from aiterlab.audit import reading, wording
from aiterlab.audit.judgement import Judgement
from aiterlab.trees import Tree

AVAILABILITY = ("availability-reads-preference", "preference-gate")  # rules that the statement `availability` is about
STAND_IN = "builtin-stand-in"
NAMES = (STAND_IN, "conditional-name")
_ATTENTION = ("attention/", "v1/attention/", "platforms/rocm.py")
_OPERATORS = "vllm/_aiter_ops.py"


@dataclass(frozen=True)
class Found:
    """One finding of the detector, in the tree's own paths."""

    rule: str
    severity: str
    file: str  # from vllm/ on
    line: int
    message: str
    mend: str

    @property
    def names(self) -> set[str]:
        """What the message sets in code."""
        return set(re.findall(r"`([\w.]+)`", self.message.partition(" is bound")[0].partition(" are bound")[0]))

    @property
    def of_attention(self) -> bool:
        """Whether it is in the code that chooses or computes attention, or that says whether AITER can be used."""
        return self.file.removeprefix("vllm/").startswith(_ATTENTION) or self.file == _OPERATORS


@dataclass(frozen=True)
class Scanned:
    """What the detector found in source that one tree or several have in common."""

    trees: tuple[str, ...]
    files: int
    seconds: float
    found: tuple[Found, ...]


def scan(trees: Sequence[Tree], workers: int) -> list[Scanned]:
    """Read every tree once; trees of equal files (a hotfix is laid over them as they run) are read together.

    What was found is kept as soon as it is there: the same files are not read again by the same detector.
    """
    same: dict[str, list[Tree]] = {}
    for tree in trees:
        same.setdefault(tree.fingerprint, []).append(tree)
    folder = paths.cache_dir() / "scans" / _detector()
    kept = {fingerprint: folder / _file(group[0]) for fingerprint, group in same.items()}
    found = {fingerprint: _kept(file) for fingerprint, file in kept.items()}
    if unread := [one for one, read in found.items() if read is None]:
        # Forked from a notebook's kernel, a process would inherit its threads.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as processes:
            list(processes.map(_read, [kept[one] for one in unread], [same[one][0].source for one in unread]))
        found |= {one: _kept(kept[one]) for one in unread}
    return [Scanned(tuple(tree.name for tree in group), **found[one]) for one, group in same.items()]


def _detector() -> str:
    """A digest of all that a kept finding depends on besides the files: the detector, how it is kept, the parser."""
    digest = hashlib.sha256(sys.version.encode())
    for source in (Path(__file__), *sorted(Path(scanner.__file__).parent.glob("*.py"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _file(tree: Tree) -> str:
    digest = hashlib.sha256(tree.fingerprint.encode())
    for stub in sorted(tree.source.rglob("*.pyi")):  # read by the detector, and no part of what a tree runs
        digest.update(f"{stub.relative_to(tree.source)}\0".encode() + stub.read_bytes())
    return f"{digest.hexdigest()}.json"


def _kept(file: Path) -> dict | None:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return read | {"found": tuple(Found(**one) for one in read["found"])}


def _read(file: Path, package: Path) -> None:
    report, root = scanner.scan([package]), package.resolve().parent
    found = [
        Found(one.rule, one.severity, one.path.relative_to(root).as_posix(), one.line, one.message, one.mend)
        for one in report.findings
    ]
    told = {"files": report.files, "seconds": report.seconds, "found": [asdict(one) for one in found]}
    records.atomic_write_text(file, json.dumps(told))


def counts(scanned: Sequence[Scanned]) -> pd.DataFrame:
    """Findings per tree and rule; notes, which name what no probe and no call runs into, apart."""
    rules = [name for name in scanner.RULES if name != "suppression"]
    lines = []
    for one in scanned:
        told = Counter(found.rule for found in one.found if found.severity != "note")
        notes = sum(found.severity == "note" for found in one.found)
        lines.append({"tree": wording.listed(one.trees), **{rule: told[rule] for rule in rules}, "notes": notes})
    return pd.DataFrame(lines, columns=["tree", *rules, "notes"])


def beside(
    scanned: Sequence[Scanned], rows: Sequence[dict], judgements: Sequence[Judgement], looked_at: str
) -> pd.DataFrame:
    """Every builtin that may stand in, and what else one tree's attention has, beside what the probes say of it."""
    lines = []
    for one in scanned:
        answered = [row for row in rows if row["tree"] in one.trees and reading.answered(row)]
        verdicts = {j.tree: str(j.verdict) for j in judgements if j.statement.id == "availability"}
        for found in one.found:
            shown = looked_at in one.trees and found.of_attention and found.severity != "note"
            if found.rule == STAND_IN or shown:
                said = _bound(found, answered) if found.rule in NAMES else ""
                if found.rule in AVAILABILITY and found.file == _OPERATORS:
                    said = "; ".join(f"availability: {verdicts[tree]}" for tree in one.trees)
                lines.append(
                    {
                        "tree": wording.listed(one.trees),
                        "rule": found.rule,
                        "finding": f"{found.file}:{found.line}: {found.message}",
                        "the probes": said or "do not speak to it",
                    }
                )
    return pd.DataFrame(lines, columns=["tree", "rule", "finding", "the probes"])


def _bound(found: Found, answered: Sequence[dict]) -> str:
    """In how many of the cells that chose the backend of this file one of the names was not bound."""
    module = found.file.removesuffix(".py").replace("/", ".")
    chose = [
        row["facts"]["selection"]
        for row in answered
        if (row["facts"]["selection"].get("backend_class") or "").rpartition(".")[0] == module
        and row["facts"]["selection"].get("unbound") is not None
    ]
    if not chose:
        return ""
    missing = sum(
        any(name["file"] == found.file and name["name"] in found.names and not name.get("kept_off") for name in unbound)
        for unbound in (selection["unbound"] for selection in chose)
    )
    cells = f"{wording.counted(len(chose), 'cell')} that chose this backend"
    return f"not bound in {missing} of {cells}" if missing else f"bound in {cells}"
