# SPDX-License-Identifier: Apache-2.0
"""The audit as Markdown and as JUnit XML."""

from xml.etree import ElementTree as xml

from audit_rows import crashed, picked, row, unanswered

from aiterlab.audit import report, statements

FA, ROCM = "ROCM_AITER_FA", "ROCM_ATTN"


def judgements(*trees: str):
    """Every tree chooses another backend than the documented one; the last also replaces an explicit choice."""
    rows = [row(picked(ROCM), switch="1", tree=tree, arch=arch) for tree in trees for arch in ("gfx942", "gfx950")]
    rows.append(row(picked(ROCM), FA, tree=trees[-1]))
    return statements.judge(rows)


def test_markdown_says_the_verdict_first_and_gives_every_command():
    text = report.markdown(judgements("release:1", "release:2"))
    lines = text.splitlines()
    assert lines[0] == "# Audit of AITER's backend selection"
    assert "release:2 breaks 2 statements: explicit choice and documented default." in lines[2]
    assert "| release:1 | – | – | – | ✗ |" in text
    assert text.count("python -m aiterlab audit --tree release:2") == 2
    assert text.index("## release:2: explicit choice") < text.index("## Since when") < text.index("## release:1")
    assert "What can be done: put ROCM_AITER_FA before ROCM_ATTN" in text
    assert "Since when" not in report.markdown(judgements("release:2"))
    assert "Nothing was judged" in report.markdown([])


def test_markdown_stays_below_its_limit_and_says_what_is_left_out():
    many = judgements(*(f"release:0.{i}" for i in range(400)))
    text = report.markdown(many)
    assert len(text.encode()) <= report.LIMIT_BYTES < len(report.markdown(many, 10**7).encode())
    assert "sections more left out" in text
    assert "## release:0.399: explicit choice" in text


def test_a_message_cannot_break_the_report():
    rows = [row(crashed("KeyError", "a\n| b | ```\x1b[31m</failure>"), FA, tree="path:a|b")]
    text = report.markdown(statements.judge(rows))
    assert "| path:a\\|b |" in text
    tree = xml.fromstring(report.junit(statements.judge(rows)))
    (failure,) = tree.iter("failure")
    assert failure.get("message").startswith("ROCM_AITER_FA is asked for and ends in KeyError: a | b |")


def test_junit_has_a_suite_per_tree_and_a_case_per_statement():
    found = judgements("release:1", "release:2") + statements.unprobed("release:3", "no wheel\x00")
    tree = xml.fromstring(report.junit(found))
    suites = {suite.get("name"): suite for suite in tree}
    assert list(suites) == ["release:1", "release:2", "release:3"]
    assert [suites["release:2"].get(name) for name in ("tests", "failures", "errors", "skipped")] == [
        "11", "2", "0", "9",
    ]  # fmt: skip
    assert suites["release:3"].get("errors") == "11"
    failures = [case for case in suites["release:2"] if case.find("failure") is not None]
    assert [case.find("failure").get("type") for case in failures] == ["explicit-choice", "documented-default"]
    assert "python -m aiterlab audit --tree release:2" in failures[0].find("failure").text
    assert "What can be done" in failures[0].find("failure").text
    (error, *_) = suites["release:3"].iter("error")
    assert error.get("message") == "no wheel"


def test_a_row_without_an_answer_is_named_in_both_reports():
    rows = [row(unanswered("timed out after 240 s"), FA)]
    assert "- no answer from 1 of 1 cell: timed out after 240 s" in report.markdown(statements.judge(rows))
    assert "- t: no answer from 1 of 1 cell: timed out after 240 s" in report.markdown(statements.judge(rows))
    assert "timed out after 240 s" in report.junit(statements.judge(rows))
