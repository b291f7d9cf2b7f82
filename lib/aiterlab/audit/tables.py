# SPDX-License-Identifier: Apache-2.0
"""Judgements and answers as tables for the notebook and the report."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from aiterlab.audit import history, reading, wording
from aiterlab.audit.findings import findings
from aiterlab.audit.judgement import Judgement

_GIVEN = {
    "asked for": "selection",
    "kind": "kind",
    "role": "role",
    "head size": "head_size",
    "dtype": "dtype",
    "KV cache": "kv_cache_dtype",
}


def overview(judgements: Sequence[Judgement]) -> pd.DataFrame:
    """Tree x statement, with the verdict in words."""
    trees = list(dict.fromkeys(judged.tree for judged in judgements))
    names = list(dict.fromkeys(judged.statement.name for judged in judgements))
    verdicts = {(judged.tree, judged.statement.name): str(judged.verdict) for judged in judgements}
    data = [[verdicts.get((tree, name)) for name in names] for tree in trees]
    return pd.DataFrame(data, index=pd.Index(trees, name="tree"), columns=pd.Index(names, name="statement"))


def counts(judgements: Sequence[Judgement]) -> pd.DataFrame:
    """Tree x statement, with the number of cases and of violations behind each verdict."""
    return pd.DataFrame(
        [
            {
                "tree": judged.tree,
                "statement": judged.statement.name,
                "verdict": str(judged.verdict),
                "cases": judged.cases,
                "violations": len(judged.violations),
                "reason": judged.reason,
            }
            for judged in judgements
        ],
        columns=["tree", "statement", "verdict", "cases", "violations", "reason"],
    )


def found(judgements: Sequence[Judgement], tree: str | None = None) -> pd.DataFrame:
    """Every finding with its place and the command that shows it."""
    return pd.DataFrame(
        [
            {
                "tree": finding.tree,
                "statement": finding.statement.name,
                "finding": finding.what,
                "where": finding.where,
                "command": finding.command,
                "mend": finding.statement.mend,
            }
            for finding in findings(judgements, tree)
        ],
        columns=["tree", "statement", "finding", "where", "command", "mend"],
    )


def drill_down(rows: Sequence[dict], tree: str) -> pd.DataFrame:
    """One tree's selections: what was asked of which layer, against the machine; equal lines appear once."""
    mine = [row for row in rows if row["tree"] == tree]
    lines = [
        {
            **{given: row[name] for given, name in _GIVEN.items()},
            "block size": "vLLM's" if row["block_size"] is None else str(row["block_size"]),
            "set": ", ".join(f"{name}={value}" for name, value in reading.others(row)) or "–",
            "machine": (row["arch"], f"AITER {row['aiter']}", row["switch"]),
            "selection": history.outcome(row) if reading.answered(row) else "no answer",
        }
        for row in mine
    ]
    table = pd.DataFrame(lines, columns=[*_GIVEN, "block size", "set", "machine", "selection"])
    index = [*_GIVEN, "block size", "set"]
    wide = table.pivot_table(index=index, columns="machine", values="selection", aggfunc="first", sort=False)
    wide.columns = pd.MultiIndex.from_tuples(list(wide.columns), names=["GPU", "AITER", "switch"])
    return wide.fillna("–")


def changed(rows: Sequence[dict], before: str, after: str) -> pd.DataFrame:
    """What two trees answer differently, one line per kind of change."""
    return pd.DataFrame(
        [
            {
                "asked for": change.rows[0]["selection"],
                before: change.before,
                after: change.after,
                "cells": len(change.rows),
                "where": wording.where(change.rows),
            }
            for change in history.changes(rows, before, after)
        ],
        columns=["asked for", before, after, "cells", "where"],
    )


def spans(judgements: Sequence[Judgement]) -> pd.DataFrame:
    """First and last tree per broken statement."""
    return pd.DataFrame(
        [
            {
                "statement": span.statement.name,
                "first broken": span.first,
                "last broken": span.last,
                "trees": span.trees,
                "held before in": span.before,
                "holds again in": span.after,
            }
            for span in history.spans(judgements)
        ],
        columns=["statement", "first broken", "last broken", "trees", "held before in", "holds again in"],
    )
