# SPDX-License-Identifier: Apache-2.0
"""`python -m aiterlab scan PATH…`: find the regression's class of fault in any Python source, unrun."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

from aiterlab.scan.findings import RULES, SEVERITIES

DESCRIPTION = """\
Look for names that are bound only under a condition and used without it, for builtins that silently take their place,
and for code that says "can" and asks "should". Sources are read, never imported: no vLLM, torch or GPU is needed.
"""
EPILOG = f"""\
rules:
{chr(10).join(f"  {rule.name:30} {rule.title}" for rule in RULES.values())}

A finding is accepted by a comment on its line, or on a line of its own above:
  # aiterlab: allow RULE because REASON

exit codes: 0 no findings, 1 findings, 2 wrong usage

examples:
  python -m aiterlab scan vllm
  python -m aiterlab scan --severity note --rule conditional-name vllm/v1/attention
  python -m aiterlab scan --format sarif vllm > scan.sarif
"""


def add_parser(subparsers) -> None:
    """Add the command to a parser of commands."""
    parser = subparsers.add_parser(
        "scan",
        help="find the regression's class of fault in source code, without running it",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a Python file, or a folder of them")
    parser.add_argument("--format", choices=("text", "json", "sarif"), default="text", help="default: text")
    parser.add_argument(
        "--severity",
        choices=SEVERITIES,
        default="warning",
        help="report findings of this severity and above (default: warning)",
    )
    parser.add_argument("--rule", action="append", choices=tuple(RULES), help="report this rule alone (repeatable)")
    parser.add_argument(
        "--library", action="append", default=[], metavar="DIR",
        help="a folder that holds further packages, such as site-packages: imports are followed there (repeatable)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Scan and print; return the exit code."""
    from aiterlab.scan import output
    from aiterlab.scan.engine import scan

    paths, libraries = [Path(path) for path in options.paths], [Path(path) for path in options.library]
    for path in (*paths, *libraries):
        if not path.exists():
            print(f"aiterlab scan: {path}: no such file or folder", file=sys.stderr)
            return 2
    gc.disable()  # this process ends with the report
    report = scan(paths, libraries)
    report.findings = [
        finding
        for finding in report.findings
        if finding.at_least(options.severity) and (not options.rule or finding.rule in options.rule)
    ]
    for path, text in report.notices:
        print(f"{output.shown(path)}: {text}", file=sys.stderr)
    print({"text": output.as_text, "json": output.as_json, "sarif": output.as_sarif}[options.format](report))
    return 1 if report.findings else 0
