# SPDX-License-Identifier: Apache-2.0
"""The audit for people and for CI: Markdown that fits a job summary, JUnit XML for a test report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree as xml

from aiterlab.audit import findings, history, wording
from aiterlab.audit.judgement import Judgement, Verdict

LIMIT_BYTES = 64_000  # a comment on a pull request holds 65,536 characters, a job summary more
_SIGNS = {Verdict.HOLDS: "✓", Verdict.BROKEN: "✗", Verdict.NOT_APPLICABLE: "–", Verdict.UNKNOWN: "?"}
# What XML 1.0 cannot carry at all; a log line that vLLM colours holds such characters.
_UNFIT = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def markdown(judgements: Sequence[Judgement], limit_bytes: int = LIMIT_BYTES) -> str:
    """Verdict first, then the findings of the last tree, the table, when it changed, and what else was found."""
    if not judgements:
        return "# Audit of AITER's backend selection\n\nNothing was judged.\n"
    last = judgements[-1].tree
    parts = [
        f"# Audit of AITER's backend selection\n\n{findings.verdict(judgements)} {findings.newest(judgements)}",
        _overview(judgements),
        *_found(judgements, last),
        *_spans(judgements),
    ]
    for tree in reversed(list(dict.fromkeys(judged.tree for judged in judgements))[:-1]):
        parts += _found(judgements, tree)
    return _cut(parts, limit_bytes)


def _overview(judgements: Sequence[Judgement]) -> str:
    trees = list(dict.fromkeys(judged.tree for judged in judgements))
    statements = list(dict.fromkeys(judged.statement for judged in judgements))
    verdicts = {(judged.tree, judged.statement): judged.verdict for judged in judgements}
    numbered = [f"{i}. **{statement.name}**: {statement.sentence}" for i, statement in enumerate(statements, 1)]
    header = [f"| tree | {' | '.join(map(str, range(1, len(statements) + 1)))} |", f"|---|{':-:|' * len(statements)}"]
    lines = [
        f"| {_cell(tree)} | {' | '.join(_SIGNS[verdicts[tree, statement]] for statement in statements)} |"
        for tree in trees
    ]
    key = ", ".join(f"{sign} {verdict}" for verdict, sign in _SIGNS.items())
    silent = dict.fromkeys(f"- {_line(judged.tree)}: {_line(judged.silent)}" for judged in judgements if judged.silent)
    return "\n".join(["## Statements", "", *numbered, "", *header, *lines, "", key, *(["", *silent] if silent else [])])


def _found(judgements: Sequence[Judgement], tree: str) -> list[str]:
    """One part per broken statement, so that a cut falls between two of them."""
    parts = []
    for judged in judgements:
        if judged.tree != tree or judged.verdict is not Verdict.BROKEN:
            continue
        lines = [f"## {tree}: {judged.statement.name}", "", f"> {judged.statement.sentence}", ""]
        for finding in findings.findings([judged]):
            lines += [f"- {_line(finding.sentence)}", "", f"  ```\n  {finding.command}\n  ```", ""]
        parts.append(
            "\n".join([*lines, f"What can be done: {judged.statement.mend}. Source: {judged.statement.source}."])
        )
    untold = [j for j in judgements if j.tree == tree and j.verdict is Verdict.UNKNOWN]
    if untold:
        reasons = dict.fromkeys(f"- {_line(judged.reason)}" for judged in untold)
        parts.append(
            "\n".join([f"## {tree}: {wording.counted(len(untold), 'statement')} without an answer", "", *reasons])
        )
    return parts


def _spans(judgements: Sequence[Judgement]) -> list[str]:
    if len({judged.tree for judged in judgements}) < 2:
        return []
    lines = [f"- {span.sentence}" for span in history.spans(judgements)]
    return ["\n".join(["## Since when", "", *(lines or ["- Nothing is broken."])])]


def _cut(parts: Sequence[str], limit_bytes: int) -> str:
    """Whole parts as long as they fit; what is left out is said."""
    kept: list[str] = []
    notice = "\n\n*{} more left out: the report would be larger than {:,} bytes.*\n"
    room = limit_bytes - len(notice.encode()) - 20
    for part in parts:
        room -= len(part.encode()) + 2
        if room < 0:
            break
        kept.append(part)
    text = "\n\n".join(kept)
    missing = len(parts) - len(kept)
    return text + (notice.format(wording.counted(missing, "section"), limit_bytes) if missing else "\n")


def _line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def junit(judgements: Sequence[Judgement]) -> str:
    """One suite per tree, one case per statement; what has no answer is an error, not a success."""
    root = xml.Element("testsuites", name="aiterlab audit")
    for tree in dict.fromkeys(judged.tree for judged in judgements):
        mine = [judged for judged in judgements if judged.tree == tree]
        suite = xml.SubElement(root, "testsuite", name=_fit(tree), tests=str(len(mine)))
        for word, verdict in (
            ("failures", Verdict.BROKEN),
            ("errors", Verdict.UNKNOWN),
            ("skipped", Verdict.NOT_APPLICABLE),
        ):
            suite.set(word, str(sum(judged.verdict is verdict for judged in mine)))
        for judged in mine:
            _case(suite, judged)
    xml.indent(root)
    return xml.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: xml.Element, judged: Judgement) -> None:
    case = xml.SubElement(suite, "testcase", classname=_fit(judged.tree), name=_fit(judged.statement.sentence))
    if judged.verdict is Verdict.BROKEN:
        told = findings.findings([judged])
        failure = xml.SubElement(case, "failure", type=judged.statement.id, message=_fit(told[0].sentence))
        lines = [f"{finding.sentence}\n    {finding.command}" for finding in told]
        failure.text = _fit("\n".join([*lines, f"What can be done: {judged.statement.mend}."]))
    elif judged.verdict is Verdict.UNKNOWN:
        xml.SubElement(case, "error", type="no answer", message=_fit(judged.reason))
    elif judged.verdict is Verdict.NOT_APPLICABLE:
        xml.SubElement(case, "skipped", message=_fit(judged.reason))


def _fit(text: str) -> str:
    return _UNFIT.sub("", text)
