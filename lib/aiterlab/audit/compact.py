# SPDX-License-Identifier: Apache-2.0
"""Answers and judgements small enough for a record: all that figures and tables need, without the facts behind them.

Most trees are asked the same questions. So each question is kept once, and of each tree a line with one character for
each question.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

import pandas as pd

from aiterlab.audit import history, reading
from aiterlab.audit.findings import findings
from aiterlab.audit.judgement import Judgement

NO_ANSWER = "no answer"
_QUESTION = ["arch", "aiter", "switch", "settings", "selection", *reading.LAYER]
_SIGNS = string.ascii_letters + string.digits
_UNASKED, _BETWEEN = " ", "|"


def outcomes(rows: Sequence[dict]) -> pd.DataFrame:
    """One line per cell: its tree, its question in plain columns, and what came of it in a word or two."""
    lines = [
        {
            "tree": row["tree"],
            **{name: row[name] for name in _QUESTION if name != "settings"},
            "settings": " ".join(f"{name}={value}" for name, value in reading.others(row)),
            "block_size": "vllm" if row["block_size"] is None else str(row["block_size"]),
            "head_size": str(row["head_size"]),
            "outcome": history.outcome(row) if reading.answered(row) else NO_ANSWER,
        }
        for row in rows
    ]
    return pd.DataFrame(lines, columns=["tree", *_QUESTION, "outcome"])


def pack(table: pd.DataFrame) -> dict:
    """Fold `outcomes` into plain JSON."""
    asked = [_BETWEEN.join(line) for line in table[_QUESTION].itertuples(index=False, name=None)]
    questions = list(dict.fromkeys(asked))
    signs = dict(zip(table["outcome"].unique(), _SIGNS, strict=False))
    answers = {tree: dict.fromkeys(questions, _UNASKED) for tree in table["tree"].unique()}
    for tree, question, outcome in zip(table["tree"], asked, table["outcome"], strict=True):
        answers[tree][question] = signs[outcome]
    return {
        "question_columns": _BETWEEN.join(_QUESTION),
        "questions": questions,
        "answer_signs": {sign: outcome for outcome, sign in signs.items()},
        "answers": {tree: "".join(said.values()) for tree, said in answers.items()},
    }


def unpack(packed: Mapping) -> pd.DataFrame:
    """Make the table of `outcomes` again."""
    columns = packed["question_columns"].split(_BETWEEN)
    lines = [
        {
            "tree": tree,
            **dict(zip(columns, question.split(_BETWEEN), strict=True)),
            "outcome": packed["answer_signs"][sign],
        }
        for tree, signs in packed["answers"].items()
        for question, sign in zip(packed["questions"], signs, strict=True)
        if sign != _UNASKED
    ]
    return pd.DataFrame(lines, columns=["tree", *columns, "outcome"])


def verdicts(judgements: Sequence[Judgement]) -> dict[str, dict[str, str]]:
    """Tree -> statement -> verdict, with the number of contradictions and of cases."""
    kept: dict[str, dict[str, str]] = {}
    for judged in judgements:
        told = f"{judged.verdict} {len(judged.violations)}/{judged.cases}"
        kept.setdefault(judged.tree, {})[judged.statement.name] = told
    return kept


def found(judgements: Sequence[Judgement]) -> list[dict]:
    """Every finding with its command, the newest tree's first."""
    trees = list(dict.fromkeys(judged.tree for judged in judgements))
    return [
        {
            "tree": finding.tree,
            "statement": finding.statement.name,
            "what": finding.what,
            "violations": finding.violations,
            "command": finding.command,
        }
        for tree in reversed(trees)
        for finding in findings(judgements, tree)
    ]
