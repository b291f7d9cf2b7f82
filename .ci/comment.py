# SPDX-License-Identifier: Apache-2.0
"""Show what a pull request's run has found as one comment on it, which later runs update.

The workflow `comment` runs this with a token that may write; what it reads was written by code that anybody may send.
Of that artifact nothing is unpacked or run: one file is read as text, up to a limit, and nothing in it may call a
person, lead anywhere or load anything. Which pull request it is about, GitHub says, not the artifact.
"""

import io
import json
import os
import re
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

API = f"{os.environ['GITHUB_API_URL']}/repos/{os.environ['GITHUB_REPOSITORY']}/"
TOKEN = os.environ["GITHUB_TOKEN"]
ARTIFACT, FILE = "summary", "summary.md"
LARGEST_ARTIFACT_BYTES = 1_000_000
LONGEST_TEXT_BYTES = 64_000  # a comment holds 65,536 characters
AUTHOR = "github-actions[bot]"
MARK = "<!-- summary of ci -->"
PER_PAGE = 100
_LINK = re.compile(r"\[([^][]*)\]\([^()]*\)")
# What opens a link's target, a tag, an address, a mention or a reference.
_LIVE = re.compile(r"\](?=[(:])|<|&(?=[#\w])|/(?=/)|w(?=ww\.)|@|#(?=\d)", re.IGNORECASE)
_WORD_JOINER = "\u2060"


def main() -> None:
    """Comment on the pull requests whose last commit the run of the event was about."""
    run = json.loads(Path(os.environ["GITHUB_EVENT_PATH"]).read_text(encoding="utf-8"))["workflow_run"]
    branch = f"{run['head_repository']['owner']['login']}:{run['head_branch']}"
    pulls = [pull for pull in ask("pulls", state="open", head=branch) if pull["head"]["sha"] == run["head_sha"]]
    found = ask(f"actions/runs/{run['id']}/artifacts", name=ARTIFACT)["artifacts"]
    if not pulls or not found:
        print("nothing to say: the run has left no summary, or is not about the last commit of an open pull request")
        return
    newest = max(artifact["id"] for artifact in found)  # a run that was repeated has several
    body = f"""{MARK}
[The run]({run["html_url"]}) ended with **{run["conclusion"]}** and holds the pages that this is about. What follows was
written by the pull request's code.

{summary(call(f"actions/artifacts/{newest}/zip", most_bytes=LARGEST_ARTIFACT_BYTES))}"""
    for pull in pulls:
        if (known := own_comment(pull["number"])) is None:
            call(f"issues/{pull['number']}/comments", {"body": body})
        else:
            call(f"issues/comments/{known}", {"body": body}, "PATCH")


def summary(artifact: bytes) -> str:
    """Return the text of the artifact's one file, cut, with links as words and all else that is live as plain text."""
    with zipfile.ZipFile(io.BytesIO(artifact)) as archive, archive.open(FILE) as file:
        text = file.read(LONGEST_TEXT_BYTES).decode("utf-8", errors="replace")
    return _LIVE.sub(rf"\g<0>{_WORD_JOINER}", _LINK.sub(r"\1", text))[:LONGEST_TEXT_BYTES]


def own_comment(number: int) -> int | None:
    """Return the id of the comment that an earlier run has left on a pull request; anybody can copy its mark."""
    page, comments = 0, [None] * PER_PAGE
    while len(comments) == PER_PAGE:
        page += 1
        comments = ask(f"issues/{number}/comments", per_page=PER_PAGE, page=page)
        for comment in comments:
            if comment["user"]["login"] == AUTHOR and comment["body"].startswith(MARK):
                return comment["id"]
    return None


def ask(path: str, **query):
    """Return the JSON that GitHub answers."""
    return json.loads(call(f"{path}?{urllib.parse.urlencode(query)}"))


def call(path: str, content: dict | None = None, method: str | None = None, most_bytes: int | None = None) -> bytes:
    """Send a request about this repository, and return at most so many bytes of the answer."""
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(API + path, data, {"Accept": "application/vnd.github+json"}, method=method)
    # GitHub has artifacts handed out by another host, which is not to get the token.
    request.add_unredirected_header("Authorization", f"Bearer {TOKEN}")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read(most_bytes)


if __name__ == "__main__":
    main()
