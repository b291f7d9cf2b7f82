# SPDX-License-Identifier: Apache-2.0
"""Bisect on histories made here: it names the commit, skips what cannot be asked, and leaves the clone as it was."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from aiterlab import __main__ as program
from aiterlab import paths, trees
from aiterlab.audit import bisect, bisect_cli
from aiterlab.audit.bisect import Answer, BisectError
from aiterlab.machines import Machine
from aiterlab.machines.description import with_switch
from aiterlab.probes import Cell, pool
from aiterlab.trees.edits import REGRESSION


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, request):
    """An empty cache, and a folder of this test's own for worktrees."""
    if "slow" not in request.keywords:
        monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(bisect.tempfile, "tempdir", str(tmp_path / "temporary"))


class Clone:
    """A repository with one commit per state of `vllm/state.py`; a state of None is a commit that is no tree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.git("init", "--quiet", "--initial-branch=main")

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=A Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(self.folder), *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def commit(self, state: str | None, subject: str, elsewhere: str = "") -> str:
        package = self.folder / "vllm"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").unlink(missing_ok=True)
        if state is not None:
            (package / "__init__.py").touch()
        (package / "state.py").write_text(f"state = {state!r}\n")
        (self.folder / "README").write_text(elsewhere)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", subject)
        return self.git("rev-parse", "HEAD")

    def everything(self) -> tuple:
        """What a search may not change."""
        settings = (self.folder / ".git" / "config").read_text()
        return self.git("status", "--porcelain"), self.git("worktree", "list"), self.git("for-each-ref"), settings


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path / "clone")


def read(tree) -> Answer:
    state = (tree.source / "state.py").read_text().split("'")[1]
    verdict = {"skip": "skip"}.get(state.split()[0], "bad" if "bad" in state else "good")
    return Answer(verdict, state)


def test_the_first_bad_commit_is_named_with_its_subject_and_the_number_of_steps(clone, tmp_path):
    shas = [clone.commit(f"{'bad' if n >= 11 else 'good'} {n}", f"Change {n}") for n in range(16)]
    before, said = clone.everything(), []
    found = bisect.bisect(clone.folder, "HEAD~15", "main", read, say=said.append)
    assert (found.first_bad.sha, found.first_bad.subject) == (shas[11], "Change 11")
    assert len(found.asked) == 6, "two ends and four in between"
    assert found.first_bad.answer == Answer("bad", "bad 11")
    assert str(found) == f"the first bad commit is {shas[11][:12]} (Change 11), found in 6 steps"
    assert said[0] == f"step 1: {shas[15][:12]} (Change 15) is bad: bad 15"
    assert clone.everything() == before
    assert not list((tmp_path / "temporary").iterdir())


def test_commits_that_are_no_tree_or_have_no_answer_are_skipped(clone):
    states = ["good", "good", "good", None, "skip", "good", "bad", "bad", "bad"]
    shas = [clone.commit(state and f"{state} {n}", f"Change {n}") for n, state in enumerate(states)]
    found = bisect.bisect(clone.folder, shas[0], shas[-1], read)
    assert found.first_bad.sha == shas[6]
    skipped = [commit for commit in found.asked if commit.answer.verdict == "skip"]
    assert skipped
    assert {commit.sha for commit in skipped} <= {shas[3], shas[4]}
    assert "of them skipped" in str(found)
    if no_tree := [commit for commit in skipped if commit.sha == shas[3]]:
        assert "holds no vLLM source" in no_tree[0].answer.reason


def test_where_the_change_hides_behind_skipped_commits_all_that_it_may_be_are_named(clone):
    shas = [
        clone.commit(f"{state} {n}", f"Change {n}")
        for n, state in enumerate(["good", "good", "skip", "skip", "bad", "bad"])
    ]
    found = bisect.bisect(clone.folder, shas[0], shas[-1], read)
    assert found.first_bad is None
    assert {commit.sha for commit in found.candidates} == set(shas[2:5])
    assert str(found).startswith("the first bad commit is one of ")
    assert all(f"Change {n}" in str(found) for n in (2, 3, 4))


def test_a_change_that_came_with_a_branch_is_found_on_the_branch(clone):
    first = clone.commit("good 0", "Start")
    clone.git("checkout", "--quiet", "-b", "side")
    clone.commit("good 1", "Side, harmless")
    wanted = clone.commit("bad 2", "Side, harmful")
    clone.git("checkout", "--quiet", "main")
    clone.git("commit", "--quiet", "--allow-empty", "--message", "Nothing")
    clone.git("merge", "--quiet", "--no-edit", "side")
    last = clone.commit("bad 4", "After the merge")
    assert bisect.bisect(clone.folder, first, last, read).first_bad.sha == wanted


def test_commits_that_do_not_touch_vllm_are_not_tried(clone):
    shas = [clone.commit("good", "Start")]
    shas += [clone.commit("good", f"Words {n}", elsewhere=f"{n}") for n in range(20)]
    shas.append(clone.commit("bad", "Harm"))
    shas += [clone.commit("bad", f"More words {n}", elsewhere=f"more {n}") for n in range(20)]
    found = bisect.bisect(clone.folder, shas[0], shas[-1], read)
    assert found.first_bad.sha == shas[21]
    assert len(found.asked) == 3, "two ends and the harm itself"


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("HEAD~2", "HEAD~1", r"^HEAD~1 was to be the bad end, but is good: good 1$"),
        ("HEAD~1", "HEAD~2", r"^HEAD~2 was to be the bad end, but is good: good 0$"),
        ("HEAD", "main", r"^HEAD was to be the good end, but is bad: bad 2$"),
        ("nothing", "main", r"^git log: .*nothing"),
        ("--all", "main", r"^git log: "),
    ],
)
def test_ends_that_are_none_are_refused_in_one_line(clone, tmp_path, good, bad, message):
    for n, state in enumerate(["good", "good", "bad"]):
        clone.commit(f"{state} {n}", f"Change {n}")
    before = clone.everything()
    with pytest.raises(BisectError, match=message) as caught:
        bisect.bisect(clone.folder, good, bad, read)
    assert "\n" not in str(caught.value)
    assert clone.everything() == before
    assert not list((tmp_path / "temporary").iterdir())


def test_a_folder_that_is_no_clone_is_refused(tmp_path):
    with pytest.raises(BisectError, match="not a git repository"):
        bisect.bisect(tmp_path, "a", "b", read)


def test_ctrl_c_leaves_nothing(clone, tmp_path):
    for n in range(8):
        clone.commit(f"{'bad' if n > 3 else 'good'} {n}", f"Change {n}")
    before, asked = clone.everything(), []

    def interrupted(tree):
        asked.append(tree)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return read(tree)

    with pytest.raises(KeyboardInterrupt):
        bisect.bisect(clone.folder, "HEAD~7", "HEAD", interrupted)
    assert clone.everything() == before
    assert not list((tmp_path / "temporary").iterdir())
    assert not any(tree.folder.exists() for tree in asked)


def test_the_users_own_search_changes_and_hooks_are_left_alone(clone, tmp_path, monkeypatch):
    for n in range(8):
        clone.commit(f"{'bad' if n > 3 else 'good'} {n}", f"Change {n}")
    clone.git("bisect", "start", "HEAD", "HEAD~7")
    (clone.folder / "vllm" / "state.py").write_text("state = 'bad, not committed'\n")
    hook = clone.folder / ".git" / "hooks" / "post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path / 'hooked'}\n")
    hook.chmod(0o755)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as in a hook of another repository
    before = (clone.folder / ".git" / "BISECT_LOG").read_text()
    found = bisect.bisect(clone.folder, "main~7", "main", read)
    monkeypatch.delenv("GIT_DIR")
    assert found.first_bad.subject == "Change 4"
    assert (clone.folder / ".git" / "BISECT_LOG").read_text() == before
    assert "not committed" in (clone.folder / "vllm" / "state.py").read_text()
    assert not (tmp_path / "hooked").exists()


def test_a_step_is_named_by_its_commit_and_seen_as_it_was_committed(clone):
    shas = [clone.commit(f"{state} {n}", f"Change {n}") for n, state in enumerate(["good", "good", "bad"])]
    seen = {}

    def question(tree):
        seen[tree.name] = (tree.folder / "vllm" / "state.py").read_text()
        return read(tree)

    bisect.bisect(clone.folder, shas[0], shas[2], question)
    assert seen[f"commit:{shas[2][:12]}"] == "state = 'bad 2'\n"
    assert seen[f"commit:{shas[1][:12]}"] == "state = 'good 1'\n"
    assert set(os.listdir(clone.folder)) == {".git", "README", "vllm"}


def facts(cell: Cell) -> dict:
    """What a tree answers whose state is `bad`: there the switch moves availability on gfx942."""
    state = (cell.tree.source / "state.py").read_text()
    moved = "bad" in state and cell.machine.switch != "1" and cell.machine.arch == "gfx942"
    policy = {"outcome": "ok", "available": not moved, "enabled": False, "enabled_features": []}
    if "broken" in state:
        policy = {"outcome": "error", "type": "SyntaxError", "message": "invalid syntax", "raised_at": None}
    chosen = {"outcome": "ok", "backend": "ROCM_ATTN", "backend_class": "R", "requested": None, "asked_with": {}}
    return {"platform": {"outcome": "ok", "is_rocm": True}, "policy": policy, "selection": chosen, "aiter_imports": []}


@pytest.fixture
def asked(monkeypatch):
    """Answers made up from the tree's state, and the number of cells at each step."""
    numbers = []

    def ask(cells, *, workers=None):
        numbers.append(len(cells))
        silent = {
            c: "it crashed" for c, cell in enumerate(cells) if "silent" in (cell.tree.source / "state.py").read_text()
        }
        row = {"reused": False, "verdict": "other backend", "facts": {}}
        return [
            cell.coordinates() | row | {"no_answer_reason": silent.get(c), **({} if silent else {"facts": facts(cell)})}
            for c, cell in enumerate(cells)
        ]

    def matrix(tree):
        machines = [
            with_switch(Machine(arch=a), p) for a in ("gfx90a", "gfx942", "gfx950") for p in ("unset", "0", "1")
        ]
        return [Cell(tree, machine, None, drive=False) for machine in machines]

    monkeypatch.setattr(pool, "ask", ask)
    monkeypatch.setattr(bisect_cli.matrix, "default", matrix)
    return numbers


def test_the_command_finds_the_commit_that_broke_a_statement(clone, asked, capsys, monkeypatch):
    states = ["good", "good", "broken", "good", "silent", "bad", "bad", "bad", "bad"]
    shas = [clone.commit(f"{state} {n}", f"Change {n}") for n, state in enumerate(states)]
    monkeypatch.chdir(clone.folder.parent)
    words = ["bisect", "clone", "--good", shas[0], "--bad", "main", "--statement", "availability"]
    code = program.main(words)
    said = capsys.readouterr()
    assert code == 1, "the silent commit before it may be the first bad one"
    assert f"{shas[4][:12]} (Change 4)" in said.out
    assert f"{shas[5][:12]} (Change 5)" in said.out
    assert "is skip: it crashed" in said.err
    assert (asked[0], set(asked[1:])) == (9, {2}), "the bad end is asked everything, the others what contradicts there"
    clone.git("checkout", "--quiet", "-b", "clear", shas[3])
    clone.git("cherry-pick", "--strategy-option=theirs", shas[5])
    assert program.main(["bisect", "clone", "--good", shas[1], "--bad", "clear", "--statement", "availability"]) == 0
    said = capsys.readouterr()
    assert "(Change 5), found in " in said.out
    assert "AITER is available with" in said.err


def test_the_command_narrows_the_question_and_refuses_ends_that_agree(clone, asked, capsys):
    for n, state in enumerate(["good", "bad"]):
        clone.commit(f"{state} {n}", f"Change {n}")
    words = ["bisect", str(clone.folder), "--good", "HEAD~1", "--bad", "HEAD", "--statement", "availability"]
    assert program.main([*words, "--arch", "gfx950", "--switch", "unset,1"]) == 2
    assert "HEAD was to be the bad end, but is good: holds: 1 case" in capsys.readouterr().err
    assert program.main([*words, "--arch", "gfx942", "--switch", "unset,1"]) == 0
    assert asked == [2, 2, 2]


@pytest.mark.long
def test_the_edit_that_bound_availability_to_the_switch_is_found_among_the_regressions(clone, capsys):
    release = trees.get("release:0.15.1").source
    shutil.copytree(release, clone.folder / "vllm")
    clone.git("add", "--all")
    clone.git("commit", "--quiet", "--message", "Release")
    for edit in reversed(REGRESSION):
        edit.apply(clone.folder)
        clone.git("commit", "--quiet", "--all", "--message", edit.why)
    (clone.folder / "vllm" / "platforms" / "rocm.py").write_text("def (:\n")
    clone.git("commit", "--quiet", "--all", "--message", "Half a merge")
    clone.git("revert", "--no-edit", "HEAD")
    words = ["bisect", str(clone.folder), "--good", "HEAD~7", "--bad", "HEAD", "--statement", "availability"]
    assert program.main([*words, "--switch", "unset,1"]) == 0
    assert "(availability starts to read the user's preference), found in" in capsys.readouterr().out
