# SPDX-License-Identifier: Apache-2.0
"""Since when a statement is broken, what two trees answer differently, and the sentences and tables made of it."""

from audit_rows import picked, refused, row, unanswered

from aiterlab.audit import findings, history, statements, tables, wording
from aiterlab.probes.layer import Layer

FA, ROCM, TRITON = "ROCM_AITER_FA", "ROCM_ATTN", "TRITON_ATTN"
ANSWERS = {"r1": ROCM, "r2": FA, "r3": None, "r4": ROCM, "r5": ROCM, "r6": FA, "r7": ROCM}


def releases() -> list[dict]:
    """A history of the documented default: broken, holds, no answer, broken twice, holds, broken."""
    rows = []
    for tree, backend in ANSWERS.items():
        facts = picked(backend) if backend else unanswered("no such wheel")
        rows += [row(facts, switch="1", tree=tree, arch=arch) for arch in ("gfx942", "gfx950")]
    return rows


def test_spans_are_runs_of_broken_trees_and_what_is_unknown_ends_none():
    spans = [s for s in history.spans(statements.judge(releases())) if s.statement.name == "documented default"]
    assert [(s.first, s.last, s.trees, s.before, s.after) for s in spans] == [
        ("r1", "r1", 1, None, "r2"),
        ("r4", "r5", 2, "r2", "r6"),
        ("r7", "r7", 1, "r6", None),
    ]
    assert [s.sentence for s in spans] == [
        "documented default: broken from the first tree asked (r1); holds again in r2",
        "documented default: broken since r4 to r5, 2 trees; holds again in r6",
        "documented default: broken since r7 to the last tree asked (r7)",
    ]


def test_changes_are_grouped_by_question_and_answers():
    rows = [*releases(), row(refused("no"), FA, tree="r6"), row(picked(FA), FA, tree="r7")]
    found = history.changes(rows, "r6", "r7")
    assert [change.sentence for change in found] == [
        "ROCM_AITER_FA becomes ROCM_ATTN (on gfx942 and gfx950; AITER present; VLLM_ROCM_USE_AITER 1; 2 cells)",
        "refused becomes ROCM_AITER_FA (on gfx942; AITER present; VLLM_ROCM_USE_AITER unset; asked for ROCM_AITER_FA;"
        " 1 cell)",
    ]
    assert history.compared(rows, "r6", "r7") == 3
    assert history.changes(rows, "r2", "r3") == []
    table = tables.changed(rows, "r6", "r7")
    assert list(table["cells"]) == [2, 1]
    assert list(table.columns) == ["asked for", "r6", "r7", "cells", "where"]


def test_findings_are_sentences_with_a_command():
    judgements = statements.judge(releases())
    (found,) = findings.findings(judgements, "r7")
    assert found.sentence == (
        "Auto-selection takes ROCM_ATTN, not ROCM_AITER_FA, although the switch is on"
        " (on gfx942 and gfx950; AITER present; VLLM_ROCM_USE_AITER 1; 2 cells)."
    )
    assert (
        found.command == "python -m aiterlab audit --tree r7 --arch gfx942 --aiter present --switch 1 --explicit auto"
    )
    assert findings.newest(judgements) == "r7 breaks 1 statement: documented default."
    assert findings.newest([j for j in judgements if j.tree == "r6"]) == "r6 breaks no statement."
    assert findings.newest([]) == "Nothing was judged."
    assert findings.verdict(judgements).startswith("7 trees: 2 holds, 4 broken, ")
    assert findings.verdict(judgements).endswith("nothing is broken in r2, r3 and r6.")


def test_the_overview_has_a_line_per_tree_and_a_column_per_statement():
    table = tables.overview(statements.judge(releases()))
    assert list(table.index) == list(ANSWERS)
    assert list(table["documented default"]) == ["broken", "holds", "unknown", "broken", "broken", "holds", "broken"]
    assert set(table["draft and target"]) == {"not applicable", "unknown"}
    assert tables.counts(statements.judge(releases())).query("tree == 'r4'")["violations"].sum() == 2
    assert list(tables.spans(statements.judge(releases()))["first broken"]) == ["r1", "r4", "r7"]
    assert list(tables.found(statements.judge(releases()), "r1")["statement"]) == ["documented default"]


def test_the_drill_down_has_every_cell_of_one_tree():
    rows = [
        *releases(),
        row(refused("no"), FA, tree="r7"),
        row(picked(FA), FA, tree="r7", switch="1", layer=Layer(block_size=None)),
        row(unanswered("timed out"), tree="r7", layer=Layer(kind="mla")),
    ]
    table = tables.drill_down(rows, "r7")
    assert table.shape == (4, 3)
    assert (table != "–").to_numpy().sum() == 5
    assert set(table.to_numpy().ravel()) == {ROCM, FA, "refused", "no answer", "–"}
    assert ("gfx942", "AITER present", "1") in table.columns
    assert "vLLM's" in table.index.get_level_values("block size")


def test_words_name_what_is_common_and_count_what_varies():
    rows = [row(picked(FA), FA, layer=Layer(head_size=size)) for size in (32, 64, 96, 128, 256)]
    assert wording.where(rows) == (
        "on gfx942; AITER present; VLLM_ROCM_USE_AITER unset; asked for ROCM_AITER_FA; head size 5 values; 5 cells"
    )
    layer = Layer(kind="mla", block_size=None)
    told = wording.where([row(picked(FA), layer=layer, others={"VLLM_X": "a b"})])
    assert told.endswith("unset; mla layer; block size left to vLLM; with VLLM_X=a b; 1 cell")
    command = wording.command([row(picked(FA), layer=layer, others={"VLLM_X": "a b"})])
    assert command.endswith("--switch unset --explicit auto --kind mla --block-size vllm --set 'VLLM_X=a b'")
    assert wording.listed(["a", "b", "c"]) == "a, b and c"
    assert wording.listed([]) == ""
