# SPDX-License-Identifier: Apache-2.0
"""Each tag does what notebooks/README.md says of it: under run_all.py, and where it says so under papermill alone."""

import re

import nbformat
import papermill
import pytest
from suite_notebooks import write_notebook

from aiterlab.paths import notebooks_dir
from aiterlab.suite import runs
from aiterlab.suite.executed import without_banners
from aiterlab.suite.runs import Row
from aiterlab.suite.tags import TAGS


@pytest.fixture
def notebook(tmp_path):
    path = write_notebook(tmp_path / "01_x.ipynb", "1 / 0", "print('ran on with', workers)")

    def tagged(*tags):
        content = nbformat.read(path, 4)
        content.cells[1].metadata["tags"] = list(tags)
        nbformat.write(content, path)
        return path

    return tagged


def run(path, *settings):
    plans = runs.plan_runs(
        [Row("01_x", 1, "a CPU", {"smoke": {}})], path.parent, profile="smoke", settings=list(settings)
    )
    (outcome,) = runs.run_plans(plans, runs.Run(path.parent, "smoke"), say=lambda line: None)
    return outcome, without_banners(nbformat.read(path.parent / "01_x" / "executed.ipynb", 4))


def printed(executed):
    return [output.text for cell in executed.cells for output in cell.get("outputs", []) if "text" in output]


def test_the_documented_tags_are_those_that_there_are():
    told = (notebooks_dir() / "README.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `([\w-]+)` \| (.+) \|$", told, re.MULTILINE)) == TAGS


def test_parameters_and_injected_parameters(notebook):
    _, executed = run(notebook("raises-exception"), "01_x.workers=3")
    tags = [cell.metadata.get("tags") for cell in executed.cells]
    assert tags[:2] == [["parameters"], ["injected-parameters"]]
    assert "workers = 3" in executed.cells[1].source and "names" not in executed.cells[1].source
    assert printed(executed) == ["ran on with 3\n"]


def test_without_overrides_nothing_is_injected(notebook):
    _, executed = run(notebook("raises-exception"))
    injected = [cell for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert all(cell.source.strip() in ("", "# Parameters") for cell in injected)


def test_skip_execution(notebook):
    outcome, executed = run(notebook("skip-execution"))
    assert outcome.ok and "skipped" in [cell.status for cell in outcome.cells]
    assert printed(executed) == ["ran on with 1\n"]
    assert "skipped" in (notebook("skip-execution").parent / "01_x" / "report.html").read_text()


def test_skip_execution_under_papermill_alone(notebook):
    path = notebook("skip-execution")
    assert printed(papermill.execute_notebook(path, None, progress_bar=False)) == ["ran on with 1\n"]


def test_raises_exception(notebook):
    outcome, executed = run(notebook("raises-exception"))
    assert outcome.ok and printed(executed) == ["ran on with 1\n"]
    assert "ZeroDivisionError" in (notebook().parent / "01_x" / "report.html").read_text()


def test_raises_exception_under_papermill_alone_runs_on_and_then_fails(notebook):
    path = notebook("raises-exception")
    done = path.with_name("done.ipynb")
    with pytest.raises(papermill.PapermillExecutionError, match="ZeroDivisionError"):
        papermill.execute_notebook(path, done, progress_bar=False)
    assert printed(nbformat.read(done, 4)) == ["ran on with 1\n"]


def test_without_a_tag_an_error_ends_the_run(notebook):
    outcome, executed = run(notebook())
    assert outcome.status == "failed" and printed(executed) == []
