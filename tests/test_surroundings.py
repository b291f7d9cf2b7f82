# SPDX-License-Identifier: Apache-2.0
"""Containers, workflows and hooks: they parse, name what exists, and agree with environments/ and the Makefile."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aiterlab import leaks, provenance
from aiterlab.security import is_secret_name
from aiterlab.suite import summary

ROOT = Path(__file__).resolve().parents[1]
CPU, ROCM = ROOT / ".devcontainer/devcontainer.json", ROOT / ".devcontainer/rocm/devcontainer.json"
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z]+):", MAKEFILE, flags=re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
STEPS = [
    pytest.param(step, job, id=f"{path.stem}: {step.get('name', step.get('uses', ''))}")
    for path in WORKFLOWS
    for job in yaml.safe_load(path.read_text())["jobs"].values()
    for step in job["steps"]
]


def read_container(path: Path) -> dict:
    """Read JSON with whole-line comments."""
    return json.loads(re.sub(r"^\s*//.*$", "", path.read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("path", [CPU, ROCM], ids=["cpu", "rocm"])
def test_containers_forward_jupyters_port_and_nothing_else(path):
    container = read_container(path)
    port = int(re.search(r"^PORT \?= (\d+)$", MAKEFILE, flags=re.MULTILINE).group(1))
    assert container["forwardPorts"] == [port] and set(container["portsAttributes"]) == {str(port)}
    assert container["otherPortsAttributes"] == {"onAutoForward": "ignore"}
    vscode = container["customizations"]["vscode"]
    assert vscode["settings"]["remote.localPortHost"] == "localhost"
    assert {"ms-python.python", "ms-toolsai.jupyter"} <= set(vscode["extensions"])
    assert not [
        option for option in container.get("runArgs", []) if option.startswith(("-p", "--publish", "--network"))
    ]


def test_the_cpu_container_is_pinned_and_does_what_make_setup_does():
    container = read_container(CPU)
    image, _, digest = container["image"].partition("@sha256:")
    assert re.fullmatch("[0-9a-f]{64}", digest) and re.search(r":\d+\.\d+\.\d+-3\.11-", image)
    command = container["updateContentCommand"].split()
    assert command[0] == "make" and set(command[1:]) <= TARGETS
    lock_python = re.search(r"Python (3\.\d+)", (ROOT / "environments/cpu/requirements.txt").read_text()).group(1)
    assert f"-{lock_python}-" in image
    venv = re.search(r"^VENV \?= (\S+)$", MAKEFILE, flags=re.MULTILINE).group(1)
    interpreter = container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert interpreter == f"${{containerWorkspaceFolder}}/{venv}/bin/python"
    index = container["containerEnv"]["PIP_EXTRA_INDEX_URL"]
    assert index in (ROOT / "environments/cpu/README.md").read_text()


def test_the_rocm_container_is_the_dockerfiles_image_with_the_documented_flags():
    container = read_container(ROCM)
    dockerfile = (ROCM.parent / container["build"]["dockerfile"]).resolve()
    assert dockerfile == ROOT / "environments/rocm/Dockerfile" and dockerfile.is_file()
    assert (ROCM.parent / container["build"]["context"]).resolve() == ROOT
    readme = (dockerfile.parent / "README.md").read_text()
    documented = re.search(r"docker run (.*?)aiterlab-rocm\n", readme, flags=re.DOTALL).group(1).replace("\\\n", " ")
    flat = re.sub(r"(--[a-z-]+) (?=[^-])", r"\1=", re.sub(r"\s+", " ", documented))
    for option in container["runArgs"]:
        assert option in flat.split()
    text = dockerfile.read_text()
    workdir = re.search(r"^WORKDIR (\S+)$", text, flags=re.MULTILINE).group(1)
    assert container["workspaceFolder"] == workdir and f"target={workdir}," in container["workspaceMount"]
    cache = re.search(r"^ENV AITERLAB_CACHE=(\S+)$", text, flags=re.MULTILINE).group(1)
    assert f"target={cache}," in container["mounts"][0]


def test_the_rocm_image_can_tell_records_what_it_is():
    text = (ROOT / "environments/rocm/Dockerfile").read_text()
    assert f"ENV {provenance.IMAGE_VARIABLE}=${{VLLM_IMAGE}}" in text
    workdir = re.search(r"^WORKDIR (\S+)$", text, flags=re.MULTILINE).group(1)
    assert f"safe.directory {workdir}\n" in text
    default = re.search(r"^ARG VLLM_IMAGE=(\S+)$", text, flags=re.MULTILINE).group(1)
    assert re.search(r":v\d+\.\d+\.\d+$|@sha256:[0-9a-f]{64}$", default)
    assert f"`{default}`" in (ROOT / "environments/rocm/README.md").read_text()


@pytest.mark.parametrize(("step", "job"), STEPS)
def test_steps_name_what_exists(step, job):
    assert ("run" in step) != ("uses" in step)
    assert set(step) <= {"name", "id", "if", "uses", "with", "run", "env"}
    for command in step.get("run", "").splitlines():
        assert subprocess.run(["bash", "-n"], input=command, text=True, check=False).returncode == 0
        for target in re.findall(r"\bmake ([a-z]+)", command):
            assert target in TARGETS
        for module in re.findall(r"python -m aiterlab\.(\w+)", command):
            assert (ROOT / f"lib/aiterlab/{module}.py").is_file()
        # what someone else can name must never be pasted into a shell
        assert "${{" not in command
    ids = [other["id"] for other in job["steps"] if "id" in other]
    for name in re.findall(r"steps\.(\w+)\.", json.dumps(step)):
        assert name in ids


@pytest.mark.parametrize("path", [path for path in WORKFLOWS if "upload-artifact" in path.read_text()], ids=str)
def test_results_are_uploaded_only_after_the_gate_and_one_page_unzipped(path):
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        steps = job["steps"]
        gate = next(place for place, step in enumerate(steps) if step.get("id") == "leaks")
        uploads = [(place, step) for place, step in enumerate(steps) if "upload-artifact" in step.get("uses", "")]
        assert all(place > gate and "steps.leaks.outcome == 'success'" in step["if"] for place, step in uploads)
        pages = [step for _, step in uploads if step["with"].get("archive") is False]
        assert [page["with"]["path"].rpartition("/")[2] for page in pages] == [summary.INDEX_NAME]
        # A page that is uploaded alone links to what it lay beside: both are named together.
        folder = pages[0]["with"]["path"].rpartition("/")[0]
        (whole,) = (step for _, step in uploads if step["with"]["path"] == folder)
        told = next(step for step in steps if {pages[0]["id"], whole["id"]} == _artifacts(step))
        assert {f"${name}" for name in told["env"]} == set(re.findall(r"\$[A-Z]+(?=\))", told["run"]))
        assert any(f"cat results/latest/{summary.SUMMARY_NAME}" in step.get("run", "") for step in steps)
    assert summary.LIMIT_BYTES < 2**20  # GitHub drops a longer one without a word


def _artifacts(step: dict) -> set[str]:
    """Return the steps whose artifact's address a step is given."""
    return set(re.findall(r"steps\.(\w+)\.outputs\.artifact-url", json.dumps(step.get("env", {}))))


def test_every_hook_starts_something_that_exists():
    for hook in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]:
        for module in re.findall(r"-m aiterlab\.(\w+)", hook["entry"]):
            assert (ROOT / f"lib/aiterlab/{module}.py").is_file()


def test_the_leaks_command_names_places_and_kinds_and_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SOME_TOKEN", "correct horse")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("\ncorrect horse\n")
    assert leaks.main([str(tmp_path / "run")]) == leaks.FOUND
    said = capsys.readouterr().out
    assert said == f"{tmp_path}/run/log.txt:2: value of SOME_TOKEN\n"
    assert leaks.main([str(tmp_path / "run" / "log.txt")]) == leaks.FOUND
    assert capsys.readouterr().out == said
    (tmp_path / "run" / "log.txt").write_text("")
    assert leaks.main([str(tmp_path / "run")]) == 0
    assert leaks.main([str(tmp_path / "nowhere")]) == leaks.BAD_INPUT


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_what_is_committed_leaks_nothing():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    excluded = re.compile(next(hook for hook in hooks if hook["id"] == "leaks")["exclude"])
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    files = [ROOT / name for name in listed.stdout.split("\0") if name and not excluded.search(name)]
    # somebody's secret may be a word that stands there by chance
    plain = {name: value for name, value in os.environ.items() if not is_secret_name(name)}
    command = [sys.executable, "-m", "aiterlab.leaks", *files]
    ended = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "")
