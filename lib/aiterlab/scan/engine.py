# SPDX-License-Identifier: Apache-2.0
"""Scan files: every rule over every file, nothing imported, nothing run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from aiterlab import garbage
from aiterlab.scan import claims, signatures, suppressions, unbound
from aiterlab.scan.findings import Finding
from aiterlab.scan.preference import Preferences
from aiterlab.scan.project import Project, Source, Unreadable, python_files


@dataclass
class Report:
    """What one scan found."""

    findings: list[Finding] = field(default_factory=list)
    accepted: list[tuple[Finding, str]] = field(default_factory=list)  # suppressed, with the reason given
    notices: list[tuple[Path, str]] = field(default_factory=list)  # files, or parts, that could not be looked at
    files: int = 0
    seconds: float = 0.0


def scan(
    paths: Iterable[Path], libraries: Iterable[Path] = (), progress: Callable[[int, int], None] | None = None
) -> Report:
    """Look at every Python file below the paths.

    Args:
        libraries: folders that hold further packages (such as site-packages), so that imports can be followed there.
        progress: called with the number of files done and of all files.
    """
    started, report = time.perf_counter(), Report()
    project = Project(libraries)
    preferences = Preferences(project)
    files = dict.fromkeys(file.resolve() for path in paths for file in python_files(path))
    sources = [project.source(file) for file in files]
    with garbage.uncollected():  # millions of syntax nodes and no cycles worth finding: looking doubles the time
        for done, source in enumerate(sources):
            _one(source, project, preferences, sources, report)
            if progress is not None:
                progress(done + 1, len(sources))
    report.findings.sort(key=lambda finding: (str(finding.path), finding.line, finding.column, finding.rule))
    report.files, report.seconds = len(sources), time.perf_counter() - started
    return report


def _one(source: Source, project: Project, preferences: Preferences, sources: list[Source], report: Report) -> None:
    findings: list[Finding] = []
    try:
        _ = source.tree  # a file that cannot be parsed is told of, whether or not a rule would look into it
        try:
            findings += unbound.check(source, preferences)
        except unbound.TooManyConditions as error:
            report.notices.append((source.path, str(error)))
        findings += claims.check(source, preferences)
        findings += signatures.check(source, project, sources)
        standing, accepted = suppressions.apply(source, findings)
    except Unreadable as error:
        report.notices.append((source.path, str(error)))
        return
    finally:
        source.forget()
    report.findings += standing
    report.accepted += accepted
