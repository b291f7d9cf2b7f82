# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of the runner makes of its timings."""

import pytest

from aiterlab.suite.benchmark import CELLS, FEW, GOALS, MANY, SHAPES, summary


def timings(start_s, notebook_s, cell_s):
    """Three turns of somebody with these costs; all but one of them were disturbed."""
    shapes = {"few": (FEW, 0), "many": (MANY, 0), "long": (MANY, MANY * CELLS)}
    exact = {name: start_s + notebooks * notebook_s + cells * cell_s for name, (notebooks, cells) in shapes.items()}
    return {name: [value + 3.3, value, 10 * value] for name, value in exact.items()}


def test_a_notebook_costs_what_the_whole_command_takes_longer_with_it():
    measured = {f"command_{shape}_s": values for shape, values in timings(3.0, 1.25, 0.010).items()}
    measured |= {f"nbclient_{shape}_s": values for shape, values in timings(0.0, 1.00, 0.006).items()}
    expected = {"command_start_s": 3.0, "overhead_notebook_s": 0.25, "overhead_cell_s": 0.004}
    assert summary(measured) == pytest.approx(expected)


def test_notebooks_that_were_not_run_have_no_ratio():
    measured = {"single_runner_s": [9.0, 6.0], "single_papermill_s": [10.0], "single_papermill_busy": [0.5]}
    assert summary(measured) == {"single_ratio": 0.75, "single_least_ratio": 0.5}
    assert summary({}) == {}


def test_every_goal_is_about_something_that_is_measured():
    names = [f"{who}_{shape}_s" for who in ("command", "nbclient") for shape in SHAPES]
    names += [f"{what}_{key}" for what in ("whole", "single") for key in ("runner_s", "papermill_s", "papermill_busy")]
    assert GOALS.keys() <= summary({name: [1.0] for name in names}).keys()
