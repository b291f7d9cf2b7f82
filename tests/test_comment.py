# SPDX-License-Identifier: Apache-2.0
""".ci/comment.py: what GitHub is asked for and told, with artifacts that anybody may have written."""

import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from markdown_it import MarkdownIt
from suite_runs import add_run

from aiterlab.suite import bundle

ROOT = Path(__file__).resolve().parents[1]
RUN = {
    "id": 7,
    "head_sha": "c0ffee",
    "head_branch": "mend; $(touch x)",
    "head_repository": {"owner": {"login": "someone"}},
    "html_url": "https://github.example/o/r/actions/runs/7",
    "conclusion": "failure",
}
MARK = "<!-- summary of ci -->"


def zipped(text, name="summary.md"):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, text)
    return data.getvalue()


class GitHub(BaseHTTPRequestHandler):
    """The part of the API that is used, for one pull request; `server` holds what it answers and was told."""

    def do_GET(self):
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.server.asked.append((self.headers["Authorization"], url.path, query))
        if url.path.endswith("/zip"):
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/storage")
            self.end_headers()
            return
        page = int(query.get("page", 1))
        comments = self.server.comments[100 * (page - 1) : 100 * page]
        answers = {
            "/repos/o/r/pulls": self.server.pulls,
            "/repos/o/r/actions/runs/7/artifacts": {"artifacts": self.server.artifacts},
            "/repos/o/r/issues/3/comments": comments,
        }
        self.answer(self.server.artifact if url.path == "/storage" else json.dumps(answers[url.path]).encode())

    def do_POST(self):
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.told.append((self.command, self.path, sent["body"]))
        self.answer(b"{}")

    do_PATCH = do_POST

    def answer(self, data):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def github():
    with ThreadingHTTPServer(("127.0.0.1", 0), GitHub) as server:
        server.asked, server.told, server.comments = [], [], []
        server.pulls = [{"number": 3, "head": {"sha": "c0ffee"}}, {"number": 4, "head": {"sha": "later"}}]
        server.artifacts = [{"id": 11}, {"id": 12}]
        server.artifact = zipped("# 2 of 2 notebooks ok")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def comment(github, folder):
    event = folder / "event.json"
    event.write_text(json.dumps({"workflow_run": RUN}))
    environment = {
        "PATH": os.environ["PATH"],
        "GITHUB_API_URL": f"http://127.0.0.1:{github.server_port}",
        "GITHUB_REPOSITORY": "o/r",
        "GITHUB_TOKEN": "the-token",
        "GITHUB_EVENT_PATH": str(event),
    }
    command = [sys.executable, "-I", str(ROOT / ".ci/comment.py")]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_a_run_is_told_in_one_comment_on_the_pull_request_whose_last_commit_it_is_about(github, tmp_path):
    ended = comment(github, tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    ((method, path, body),) = github.told
    assert (method, path) == ("POST", "/repos/o/r/issues/3/comments")
    assert body.startswith(f"{MARK}\n[The run](https://github.example/o/r/actions/runs/7) ended with **failure**")
    assert body.endswith("\n\n# 2 of 2 notebooks ok")
    queries = {path: query for _, path, query in github.asked}
    assert queries["/repos/o/r/pulls"] == {"state": "open", "head": "someone:mend; $(touch x)"}
    assert queries["/repos/o/r/actions/runs/7/artifacts"] == {"name": "summary"}
    assert "/repos/o/r/actions/artifacts/12/zip" in queries
    # the token is for GitHub, and for no other host that it sends us to
    assert {path for token, path, _ in github.asked if token != "Bearer the-token"} == {"/storage"}


def test_the_next_run_updates_the_comment_and_nobody_elses(github, tmp_path):
    others = [{"id": n, "user": {"login": "someone"}, "body": f"{MARK}\nmine"} for n in range(150)]
    own = {"id": 999, "user": {"login": "github-actions[bot]"}, "body": f"{MARK}\nold"}
    another = {"id": 998, "user": {"login": "github-actions[bot]"}, "body": "of another workflow"}
    github.comments = [*others, another, own]
    assert comment(github, tmp_path).returncode == 0
    assert [(method, path) for method, path, _ in github.told] == [("PATCH", "/repos/o/r/issues/comments/999")]


@pytest.mark.parametrize("lacking", ["pulls", "artifacts"])
def test_without_a_summary_or_a_pull_request_nothing_is_told(github, tmp_path, lacking):
    setattr(github, lacking, [])
    ended = comment(github, tmp_path)
    assert (ended.returncode, ended.stdout.count("\n"), github.told) == (0, 1, [])


HOSTILE = """# Approved by @maintainer
[honest](01_x/report.html), [a](//evil.example), [[b](c)](d) and ![c](https://evil.example/pixel.png)
<img src=https://evil.example> <!-- the rest is not seen <https://evil.example> www.evil.example
[d]: /o/r/settings
[d] closes #12, o/r#13
"""


def test_nothing_in_a_summary_is_live(github, tmp_path):
    github.artifact = zipped(HOSTILE)
    assert comment(github, tmp_path).returncode == 0
    ((_, _, body),) = github.told
    text = body.partition("code.\n\n")[2]
    html = MarkdownIt("commonmark", {"html": True}).render(text)
    assert not [sign for sign in ("<a", "<img", "<!--", "://", "www.", "@m", "#1") if sign in html]
    assert "honest, a," in html and "report.html" not in html


def test_the_links_of_a_real_summary_become_words(github, tmp_path):
    run = add_run(tmp_path, "one", ["01_reproduce_regression"])
    bundle.write_bundle(run)
    github.artifact = zipped((run / "summary.md").read_text())
    assert comment(github, tmp_path).returncode == 0
    ((_, _, body),) = github.told
    assert body.count("](") == 1  # the one to the run
    assert "Report of the run" in body


def test_an_artifact_is_read_up_to_a_limit(github, tmp_path):
    github.artifact = zipped("é" * 40_000_000)  # a small archive
    assert comment(github, tmp_path).returncode == 0
    assert len(github.told[0][2].encode()) < 65_536
    github.artifact = os.urandom(2_000_000)
    assert comment(github, tmp_path).returncode != 0
    github.artifact = zipped("text", name="../summary.md")
    assert comment(github, tmp_path).returncode != 0
    assert len(github.told) == 1


def test_ci_leaves_the_artifact_that_the_comment_is_made_of():
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["cpu"]["steps"]
    (upload,) = (step for step in steps if step.get("with", {}).get("name") == "summary")
    assert upload["with"]["path"].endswith("/summary.md")
