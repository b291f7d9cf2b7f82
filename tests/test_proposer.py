# SPDX-License-Identifier: Apache-2.0
"""vLLM's EAGLE proposer and AITER's metadata: what is expected, what a line says, and the trees' own code asked."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from aiterlab import paths, trees
from aiterlab.attention import reference
from aiterlab.machines import Machine
from aiterlab.machines.description import with_switch
from aiterlab.probes import EXPLICIT, TRAP, Cell, ask, drive, models, proposer

METADATA = "AiterFlashAttentionMetadata"
REFUSED = {"outcome": "error", "type": "ValueError", "message": f"{proposer.REFUSAL} for …", "rejected": True}
TRAPPED = {"outcome": "error", "type": "AttributeError", "message": f"{TRAP} 'f'", "rejected": False}
DRAFTED = {"outcome": "ok", "rejected": False, "max_abs_error": 0.001, "tolerance": 0.002}


def row(whole: dict, alone: dict, tree="regressed", switch="unset", count=3) -> dict:
    seen = {"metadata": [METADATA]}
    proposals = {str(count): {"whole": whole | seen, "without_attention": alone | seen}}
    facts = {"proposer": {"outcome": "ok", "proposals": proposals}}
    place = {"tree": tree, "arch": "gfx942", "switch": switch, "simulated": True}
    return place | {"facts": facts, "no_answer_reason": None}


@pytest.mark.parametrize(
    ("tree", "switch", "count", "said"),
    [
        ("release:0.15.1", "0", 3, ("accepted", "drafts")),
        ("regressed", "unset", 3, ("rejected", "builtin trap")),
        ("regressed", "unset", 1, ("not made", "builtin trap")),
        ("regressed", "1", 3, ("accepted", "drafts")),
        ("hotfixed-without-7", "0", 3, ("rejected", "rejected")),
        ("hotfixed-without-7", "0", 1, ("not made", "drafts")),
        ("hotfixed", "unset", 3, ("accepted", "drafts")),
        ("release:0.16.0", "unset", 3, ("accepted", "drafts")),
        ("hotfixed-without-2", "unset", 3, (None, None)),
        ("path:/somewhere", "unset", 3, (None, None)),
    ],
)
def test_what_the_pull_requests_say(tree, switch, count, said):
    assert proposer.expected(tree, switch, count) == said


def test_a_line_says_what_was_found_and_whether_it_was_expected():
    line = proposer.line(row(TRAPPED, REFUSED), 3)
    assert (line["check"], line["proposal"], line["agrees"], line["metadata"]) == (
        "rejected", "builtin trap", True, METADATA
    )  # fmt: skip
    assert proposer.line(row(DRAFTED, DRAFTED), 3)["agrees"] is False
    assert proposer.line(row(DRAFTED, DRAFTED, switch="1"), 3)["agrees"] is True
    wrong = proposer.line(row(DRAFTED | {"outcome": "wrong"}, DRAFTED, switch="1"), 3)
    assert (wrong["check"], wrong["proposal"], wrong["agrees"]) == ("accepted", "wrong attention", False)
    assert proposer.line(row(DRAFTED, DRAFTED, tree="path:x"), 3)["agrees"] is None
    other = {"outcome": "error", "type": "ValueError", "message": "another", "rejected": False}
    assert proposer.line(row(other, other), 3)["check"] == "not reached"


def test_no_answer_is_no_agreement_and_has_its_reason():
    crashed = row(DRAFTED, DRAFTED) | {"facts": {}, "no_answer_reason": "timed out"}
    failed = row(DRAFTED, DRAFTED) | {
        "facts": {"proposer": {"outcome": "error", "type": "ImportError", "message": "gone"}}
    }
    lines = pd.DataFrame([proposer.line(crashed, 3), proposer.line(failed, 3)])
    assert lines["agrees"].isna().all() and lines["check"].isna().all()
    assert list(lines["no_answer_reason"]) == ["timed out", "ImportError: gone"]
    assert "0 of 0 lines agree with the pull requests, 2 gave no answer" in proposer.finding(lines)


def remembered(broken_pass: int | None = None) -> tuple:
    """A batch, and a draft whose three passes attended as they should, but for the one that is broken."""
    batch = drive.Batch.make(proposer.LENGTHS, torch.float16, seed=0)
    generator = torch.Generator().manual_seed(3)
    known = [[k[:n], v[:n]] for k, v, (n, _) in zip(batch.keys, batch.values, proposer.LENGTHS, strict=True)]
    passes = []
    for number in range(3):
        parts = []
        for i, (_, new) in enumerate(proposer.LENGTHS):
            tokens = new if number == 0 else 1
            query, key, value = (
                torch.randn(tokens, heads, models.HEAD_SIZE, generator=generator).half()
                for heads in (models.HEADS, models.KV_HEADS, models.KV_HEADS)
            )
            known[i] = [torch.cat([old, more]) for old, more in zip(known[i], (key, value), strict=True)]
            seen = [part[:-1] if number == broken_pass else part for part in known[i]]  # blind to its own token
            parts.append((query, key, value, reference.attend(query, *seen, drive.SCALE).half()))
        passes.append(["metadata", *(torch.cat(column).flatten(1) for column in zip(*parts, strict=True))])
    return batch, SimpleNamespace(passes=passes)


def test_the_attention_of_every_pass_is_held_against_float64():
    error, limit = proposer._error(*remembered())
    assert 0 < error <= limit < 0.02
    for broken in range(3):
        error, limit = proposer._error(*remembered(broken))
        assert error > limit, broken


def test_the_table_asks_every_tree_at_every_switch_by_name(monkeypatch):
    def ask(cells, **options):
        assert all((cell.explicit, cell.draft_tokens) == (EXPLICIT, (3,)) for cell in cells)
        assert (options, len(cells)) == ({"workers": 1, "progress": None}, 4)
        return [row(DRAFTED, DRAFTED, cell.tree.name, cell.machine.switch) for cell in cells]

    monkeypatch.setattr(proposer.pool, "ask", ask)
    monkeypatch.setattr(proposer.states, "get", lambda name: SimpleNamespace(name=name))
    table = proposer.table(("regressed", "hotfixed"), ("0", "1"), (3,), workers=1)
    assert list(zip(table["tree"], table["switch"], table["agrees"], strict=True)) == [
        ("regressed", "0", False), ("regressed", "1", True), ("hotfixed", "0", True), ("hotfixed", "1", True)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The lines of five cells: each tree where it matters, and the regressed one where its switch hides the fault."""
    places = [(tree, "unset") for tree in proposer.TREES[1:]] + [("regressed", "1")]
    cells = [
        Cell(trees.get(tree), with_switch(Machine(arch="gfx942"), switch), EXPLICIT, proposer.DRAFT_TOKENS)
        for tree, switch in places
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path_factory.mktemp("run")))
        return pd.DataFrame([proposer.line(row, count) for row in ask(cells) for count in proposer.DRAFT_TOKENS])


@pytest.mark.slow
def test_the_trees_do_what_the_pull_requests_say(table):
    assert table["no_answer_reason"].isna().all()
    assert list(table["agrees"]) == [True] * 10
    assert set(table["metadata"]) == {METADATA}
    rejected = table[table["check"] == "rejected"]
    assert list(zip(rejected["tree"], rejected["switch"], rejected["draft_tokens"], strict=True)) == [
        ("regressed", "unset", 3),
        ("hotfixed-without-7", "unset", 3),
    ]
    named = rejected["check_message"].str.partition("Supported types are: ")
    assert named[0].str.contains(METADATA).all() and not named[2].str.contains(METADATA).any()


@pytest.mark.slow
def test_a_proposal_that_drafts_runs_every_pass_with_right_attention(table):
    drafting = table[table["proposal"] == "drafts"]
    assert len(drafting) == 7
    assert (drafting["passes"] == drafting["draft_tokens"]).all()
    assert drafting["max_abs_error"].between(0, drafting["tolerance"], inclusive="right").all()
    assert (drafting["tolerance"] < 0.02).all()


@pytest.mark.slow
def test_the_sentence(table):
    assert proposer.finding(table) == (
        "With more than one draft token, vLLM's EAGLE proposer rejects AITER's metadata in 2 of 5 cases (regressed at"
        " unset; hotfixed-without-7 at unset); 10 of 10 lines agree with the pull requests, 0 gave no answer."
    )


def test_a_tree_that_cannot_be_had_is_a_line_with_its_reason():
    table = proposer.table(["release:0.0.0", "nosuch"], ("unset", "1"), (3,))
    assert len(table) == 4 and table["check"].isna().all() and table["agrees"].isna().all()
    assert all("nosuch" in reason for reason in table.set_index("tree").loc["nosuch", "no_answer_reason"])
    assert proposer.finding(table).endswith("4 gave no answer.")
