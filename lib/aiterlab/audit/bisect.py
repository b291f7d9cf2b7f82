# SPDX-License-Identifier: Apache-2.0
"""Which commit of a local clone broke a statement?

git's own `bisect` chooses the commits, in a temporary worktree that has bisect state of its own: the clone's working
tree, its index and a search that its user may have under way stay as they are. Only commits that change `vllm/` are
tried.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from aiterlab import trees
from aiterlab.trees import Tree, TreeError

FOUND, ONLY_SKIPPED = 0, 2  # exit codes of `git bisect good|bad|skip`
_FIRST_BAD = re.compile(r"^([0-9a-f]{40,64}) is the first bad commit$", re.M)
# Names another repository where a hook of it has started us.
_OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR")
_COMMIT = re.compile(r"^[0-9a-f]{40,64}$", re.M)


class BisectError(ValueError):
    """The search cannot be made, or not with these two ends; the message says why."""


@dataclass(frozen=True)
class Answer:
    """What a commit says to the question; `skip` where it cannot be asked."""

    verdict: Literal["good", "bad", "skip"]
    reason: str


@dataclass(frozen=True)
class Commit:
    """A commit and what it answered; no answer, if the search did not need one."""

    sha: str
    subject: str
    answer: Answer | None = None

    def __str__(self) -> str:
        return f"{self.sha[:12]} ({self.subject})"


@dataclass(frozen=True)
class Found:
    """What a search ends with."""

    candidates: list[Commit]  # one, unless commits had to be skipped right where the change is
    asked: list[Commit] = field(default_factory=list)  # in the order in which they were

    @property
    def first_bad(self) -> Commit | None:
        return self.candidates[0] if len(self.candidates) == 1 else None

    def __str__(self) -> str:
        skipped = sum(commit.answer.verdict == "skip" for commit in self.asked)
        steps = f"{len(self.asked)} steps" + (f", {skipped} of them skipped" if skipped else "")
        if self.first_bad:
            return f"the first bad commit is {self.first_bad}, found in {steps}"
        return f"the first bad commit is one of {', '.join(map(str, self.candidates))}; {steps}"


Question = Callable[[Tree], Answer]


def bisect(
    repository: Path, good: str, bad: str, question: Question, *, say: Callable[[str], None] = lambda line: None
) -> Found:
    """Find the first commit after `good`, up to `bad`, to which the question's answer is bad.

    Both ends are asked first: a search between two that answer alike would end at a commit that changed nothing.

    Args:
        repository: a folder in a local git clone of vLLM; nothing in it is changed.
        question: asked of a tree at each step; a commit that is no vLLM tree is skipped without asking.
        say: called with a line after each step.

    Raises:
        BisectError: no such commit, or the ends do not answer as they should.
    """
    ends = [_commit(repository, revision) for revision in (bad, good)]
    asked: list[Commit] = []
    with _worktree(repository, ends[0].sha) as folder:

        def ask(commit: Commit) -> Answer:
            with _tree(folder, commit) as tree:
                answer = Answer("skip", str(tree)) if isinstance(tree, TreeError) else question(tree)
            asked.append(replace(commit, answer=answer))
            say(f"step {len(asked)}: {commit} is {answer.verdict}: {answer.reason}")
            return answer

        for name, revision, commit in zip(("bad", "good"), (bad, good), ends, strict=True):
            _git(folder, "checkout", "--quiet", "--detach", commit.sha)
            if (answer := ask(commit)).verdict != name:
                raise BisectError(f"{revision} was to be the {name} end, but is {answer.verdict}: {answer.reason}")
        told = _step(folder, "start", ends[0].sha, ends[1].sha, "--", "vllm")
        while not (shas := _candidates(told)):
            told = _step(folder, ask(_commit(folder, "HEAD")).verdict)
    known = {commit.sha: commit for commit in asked}
    return Found([known.get(sha) or _commit(repository, sha) for sha in shas], asked)


def _candidates(told: subprocess.CompletedProcess) -> list[str]:
    """What git has narrowed the search down to; nothing while it goes on."""
    if told.returncode == ONLY_SKIPPED:
        return _COMMIT.findall(told.stdout)
    return _FIRST_BAD.findall(told.stdout)


def _step(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    told = _run(folder, "bisect", *arguments)
    if told.returncode not in (FOUND, ONLY_SKIPPED):
        raise BisectError(f"git bisect: {_reason(told)}")
    return told


@contextlib.contextmanager
def _worktree(repository: Path, sha: str) -> Iterator[Path]:
    """A checkout beside the clone's own, gone afterwards however the search ends."""
    above = Path(tempfile.mkdtemp(prefix="aiterlab-bisect-")).resolve()
    folder = above / "vllm-checkout"
    try:
        _git(repository, "worktree", "add", "--quiet", "--detach", str(folder), sha)
        yield folder
    finally:
        _run(repository, "worktree", "remove", "--force", str(folder))
        shutil.rmtree(above, ignore_errors=True)
        _run(repository, "worktree", "prune")


@contextlib.contextmanager
def _tree(folder: Path, commit: Commit) -> Iterator[Tree | TreeError]:
    """The tree of what is checked out, or why it is none; what the cache keeps of it goes with it."""
    try:
        tree = replace(trees.get(f"path:{folder}"), name=f"commit:{commit.sha[:12]}")
    except TreeError as error:
        yield error
        return
    try:
        yield tree
    finally:
        trees.forget(tree)


def _commit(repository: Path, revision: str) -> Commit:
    # %x00 cannot stand in a subject, and a revision may not be taken for an option
    told = _git(repository, "log", "-1", "--format=%H%x00%s", "--end-of-options", f"{revision}^{{commit}}", "--")
    sha, _, subject = told.strip().partition("\0")
    return Commit(sha, subject)


def _git(folder: Path, *arguments: str) -> str:
    done = _run(folder, *arguments)
    if done.returncode:
        raise BisectError(f"git {arguments[0]}: {_reason(done)}")
    return done.stdout


def _reason(done: subprocess.CompletedProcess) -> str:
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    lines = [line for line in lines if line.startswith("fatal:")] or lines or [f"status {done.returncode}"]
    return lines[0].removeprefix("fatal: ")


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_HOOK}
    command = ["git", "-C", str(folder), "-c", "core.hooksPath=/dev/null", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, env=environment | {"LC_ALL": "C"}, check=False)
    except FileNotFoundError as error:
        raise BisectError("git is not installed") from error
