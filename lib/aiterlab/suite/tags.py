# SPDX-License-Identifier: Apache-2.0
"""The tags that a cell may carry, and what each does; a tag that nothing reads would be a promise that is not kept."""

TAGS = {
    "parameters": "marks the one cell of typed literals; papermill adds its own cell behind it",
    "injected-parameters": "papermill's own cell, in executed copies: the values that differ from the defaults",
    "skip-execution": "the cell is not run, the report calls it skipped, and those after it run",
    "raises-exception": (
        "the cell may raise: its error is shown and those after it run; papermill alone then calls the run failed"
    ),
}
