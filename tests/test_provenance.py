# SPDX-License-Identifier: Apache-2.0
import platform
import subprocess
import sys
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from aiterlab import provenance
from aiterlab.provenance import collect, scrub, scrub_tree
from aiterlab.records import check_json


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of one commit, in the role of the project."""

    def git(*arguments):
        identity = ["-c", "user.name=T", "-c", "user.email=t@example.org"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "project_root", lambda: tmp_path)
    return SimpleNamespace(path=tmp_path, commit=git("rev-parse", "HEAD"))


def test_commit_and_dirty_flag(repository):
    facts = collect()
    assert (facts["git_commit"], facts["git_dirty"]) == (repository.commit, False)
    (repository.path / "file").write_text("2")
    assert collect()["git_dirty"] is True


def test_a_repository_around_the_project_is_not_the_projects(repository, monkeypatch):
    inner = repository.path / "unpacked"
    inner.mkdir()
    monkeypatch.setattr(provenance, "project_root", lambda: inner)
    facts = collect()
    assert facts["git_commit"] is None and facts["git_dirty"] is None
    assert "not a git repository of its own" in facts["missing"]["git_commit"]


def test_without_git_the_commit_is_null_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "project_root", lambda: tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = collect()
    assert facts["git_commit"] is None
    assert "git" in facts["missing"]["git_commit"]


def test_machine_time_and_versions():
    facts = collect()
    assert facts["python"] == platform.python_version()
    assert abs((datetime.now(UTC) - datetime.fromisoformat(facts["utc"])).total_seconds()) < 60
    assert facts["memory_bytes"] > 2**28 and facts["cpu_count"] >= facts["cpu_usable_count"] >= 1
    assert facts["versions"]["papermill"] and facts["versions"]["numpy"]
    check_json(facts)


def test_what_is_not_installed_is_null_with_a_reason(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("papermill", "no-such-package"))
    facts = collect()
    assert facts["versions"]["no-such-package"] is None
    assert facts["missing"]["versions.no-such-package"] == "not installed"
    assert "versions.papermill" not in facts["missing"]


def test_gpus_are_named_only_where_torch_is_loaded_anyway(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    facts = collect()
    assert facts["accelerators"] is None and "torch" in facts["missing"]["accelerators"]
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2, get_device_name=lambda i: f"GPU {i}")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    facts = collect()
    assert facts["accelerators"] == ["GPU 0", "GPU 1"] and "accelerators" not in facts["missing"]


def test_switches_are_recorded_secrets_masked_and_the_rest_left_out(monkeypatch):
    monkeypatch.setenv("VLLM_ROCM_USE_AITER", "0")
    monkeypatch.setenv("VLLM_API_KEY", "x")
    monkeypatch.setenv("OTHER_THING", "1")
    environment = collect()["environment"]
    assert environment["VLLM_ROCM_USE_AITER"] == "0"
    assert environment["VLLM_API_KEY"] == provenance.MASK
    assert "OTHER_THING" not in environment


def test_home_paths_in_switches_are_shortened(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("AITER_JIT_DIR", "/home/someone/jit")
    assert collect()["environment"]["AITER_JIT_DIR"] == "~/jit"


HOME = {"HOME": "/home/al"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/al/x.py", "~/x.py"),
        ("in /home/al.", "in ~."),
        ('File "/home/al/a", "/home/al/b"', 'File "~/a", "~/b"'),
        ("file:///home/al/a", "file://~/a"),
        ("\x1b[32m/home/al/x\x1b[0m", "\x1b[32m~/x\x1b[0m"),
        ("path:/home/al/vllm:/home/al", "path:~/vllm:~"),
        ("/home/alice/x", "/home/alice/x"),
        ("/mnt/home/al/x", "/mnt/home/al/x"),
    ],
)
def test_scrub_shortens_the_home_directory_and_nothing_else(text, expected):
    assert scrub(text, HOME) == expected


def test_scrub_with_the_root_folder_as_home_changes_nothing():
    assert scrub("/usr/bin and /", {"HOME": "/"}) == "/usr/bin and /"


def test_scrub_masks_long_values_of_secret_names_only():
    environment = {**HOME, "HF_TOKEN": "hf_long_value", "MY_KEY": "hf_long", "API_KEY": "short", "PLAIN": "plain_value"}
    environment["DB_PASSWORD"] = "hf_long_value_and_more"
    masked = scrub("hf_long_value hf_long_value_and_more hf_long short plain_value", environment)
    assert masked == f"{provenance.MASK} {provenance.MASK} hf_long short plain_value"


def test_scrub_tree_reaches_keys_and_nested_values(monkeypatch):
    monkeypatch.setenv("HOME", "/home/al")
    assert scrub_tree({"/home/al": [("/home/al/x", 1, None)]}) == {"~": [["~/x", 1, None]]}
