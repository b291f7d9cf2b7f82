# SPDX-License-Identifier: Apache-2.0
"""A report for people, for programs (JSON) and for code hosts (SARIF 2.1.0)."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from aiterlab import __version__
from aiterlab.scan.engine import Report
from aiterlab.scan.findings import RULES, Finding

SARIF_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def as_text(report: Report) -> str:
    """One block a finding: `file:line:column: severity: rule: what is wrong`, and how to mend it."""
    lines = []
    for finding in report.findings:
        where = f"{shown(finding.path)}:{finding.line}:{finding.column}"
        lines += [f"{where}: {finding.severity}: {finding.rule}: {finding.message}", f"    mend: {finding.mend}"]
    counts = {
        severity: sum(f.severity == severity for f in report.findings) for severity in ("error", "warning", "note")
    }
    told = ", ".join(f"{number} {severity}{'s' * (number != 1)}" for severity, number in counts.items() if number)
    accepted = f", {len(report.accepted)} suppressed" if report.accepted else ""
    unread = f", {len(report.notices)} not looked at whole" if report.notices else ""
    lines.append(f"{report.files} files in {report.seconds:.1f} s: {told or 'no findings'}{accepted}{unread}")
    return "\n".join(lines)


def as_json(report: Report) -> str:
    """All that is known, as one JSON object."""
    return json.dumps(
        {
            "files": report.files,
            "seconds": round(report.seconds, 3),
            "findings": [_plain(finding) for finding in report.findings],
            "suppressed": [_plain(finding) | {"reason": reason} for finding, reason in report.accepted],
            "notices": [{"path": shown(path), "text": text} for path, text in report.notices],
        },
        indent=1,
        ensure_ascii=False,
    )


def as_sarif(report: Report) -> str:
    """A SARIF log with one run."""
    rules = list(RULES.values())
    results = [_result(finding) for finding in report.findings]
    for finding, reason in report.accepted:
        suppression = {"kind": "inSource", "status": "accepted", "justification": reason}
        results.append(_result(finding) | {"suppressions": [suppression]})
    log = {
        "$schema": SARIF_SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "aiterlab scan",
                        "version": __version__,
                        "rules": [
                            {
                                "id": rule.name,
                                "shortDescription": {"text": rule.title},
                                "fullDescription": {"text": rule.why},
                            }
                            for rule in rules
                        ],
                    }
                },
                "columnKind": "unicodeCodePoints",
                "results": results,
                "invocations": [
                    {
                        "executionSuccessful": True,
                        "toolExecutionNotifications": [
                            {"level": "warning", "message": {"text": text}, "locations": [_location(path, 1)]}
                            for path, text in report.notices
                        ],
                    }
                ],
            }
        ],
    }
    return json.dumps(log, indent=1, ensure_ascii=False)


def shown(path: Path) -> str:
    """A path as the reader would type it: relative if it lies below the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _plain(finding: Finding) -> dict:
    return {
        "rule": finding.rule,
        "severity": finding.severity,
        "path": shown(finding.path),
        "line": finding.line,
        "column": finding.column,
        "message": finding.message,
        "mend": finding.mend,
        "related": [
            {"path": shown(related.path or finding.path), "line": related.line, "text": related.text}
            for related in finding.related
        ],
    }


def _result(finding: Finding) -> dict:
    rules = list(RULES)
    same = f"{finding.rule}\0{finding.path.name}\0{finding.message.partition(' (missing')[0]}"
    return {
        "ruleId": finding.rule,
        "ruleIndex": rules.index(finding.rule),
        "level": finding.severity,
        "message": {"text": f"{finding.message}. Mend: {finding.mend}."},
        "locations": [_location(finding.path, finding.line, finding.column)],
        "relatedLocations": [
            _location(related.path or finding.path, related.line) | {"message": {"text": related.text}}
            for related in finding.related
        ],
        "partialFingerprints": {"aiterlab/v1": hashlib.sha256(same.encode()).hexdigest()[:32]},
    }


def _location(path: Path, line: int, column: int | None = None) -> dict:
    text = shown(path)
    uri = Path(text).as_uri() if os.path.isabs(text) else Path(text).as_posix()
    region = {"startLine": line} | ({"startColumn": column} if column else {})
    return {"physicalLocation": {"artifactLocation": {"uri": uri}, "region": region}}
