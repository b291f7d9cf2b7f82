# SPDX-License-Identifier: Apache-2.0
"""`make lab`: the right kernel, on this machine alone, with a token, whatever the user's own configuration says."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import nbformat
import pytest

from aiterlab import paths
from aiterlab.suite import lab
from aiterlab.suite.execution import SetupError

NOTEBOOK = "notebooks/02_apply_fix.ipynb"


def test_another_interpreters_kernel_is_refused_before_the_server_starts(monkeypatch, capsys):
    def refuse():
        raise SetupError("the kernel 'python3' would run /other/python")

    monkeypatch.setattr(lab, "check_kernel", refuse)
    assert lab.main([]) == 2
    assert capsys.readouterr().err == "make lab: the kernel 'python3' would run /other/python\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """JupyterLab as `make lab` starts it, under a configuration that would open it to everyone."""
    home = tmp_path_factory.mktemp("home")
    (home / "jupyter_server_config.json").write_text(
        json.dumps({"ServerApp": {"ip": "", "allow_remote_access": True}, "IdentityProvider": {"token": ""}})
    )
    with socket.socket() as free:
        free.bind((lab.HOST, 0))
        port = free.getsockname()[1]
    own = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
    folders = {"JUPYTER_CONFIG_DIR": home, "JUPYTER_RUNTIME_DIR": home / "runtime", "JUPYTER_DATA_DIR": home / "data"}
    log = home / "log.txt"
    command = [sys.executable, "-m", "aiterlab.suite.lab", "--no-browser", f"--port={port}"]
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, env=own | {name: str(value) for name, value in folders.items()}, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process, *_address(process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _address(process, log: Path) -> tuple[str, str]:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        found = re.search(r"(http://127\.0\.0\.1:\d+)/lab\S*[?&]token=(\w+)", log.read_text())
        if found:
            return found.group(1), found.group(2)
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def ask(url, token="", body=None, **headers):
    """Ask the server; returns the status and what it says."""
    headers |= {"Authorization": f"token {token}"} if token else {}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, None


@pytest.mark.slow
def test_the_server_lets_in_whoever_has_the_token_and_nobody_else(server):
    process, url, token = server
    assert ask(f"{url}/api")[0] == 200  # the server's version is no secret
    for place in ("contents", "kernels", "sessions", "terminals"):
        assert ask(f"{url}/api/{place}")[0] == 403
        assert ask(f"{url}/api/{place}", "0" * 48)[0] == 403
        assert ask(f"{url}/api/{place}", token)[0] == 200
    assert ask(f"{url}/api/contents", token, Host="evil.example")[0] == 403
    found = {entry["path"] for entry in ask(f"{url}/api/contents/notebooks", token)[1]["content"]}
    assert NOTEBOOK in found
    assert token not in " ".join(Path(f"/proc/{process.pid}/cmdline").read_text().split("\0"))
    listening = subprocess.run(["cat", "/proc/net/tcp"], capture_output=True, text=True, check=True).stdout
    port = f"{int(url.rpartition(':')[2]):04X}"
    assert {line.split()[1] for line in listening.splitlines() if f":{port} " in line.split(maxsplit=2)[1] + " "} <= {
        f"0100007F:{port}"
    }


@pytest.mark.slow
def test_a_notebook_opened_there_runs_in_this_interpreter_and_shows_live_progress(server):
    import websocket

    _, url, token = server
    asked = {"path": NOTEBOOK, "name": "02", "type": "notebook", "kernel": {"name": "python3"}}
    status, session = ask(f"{url}/api/sessions", token, asked)
    assert status == 201
    notebook = nbformat.read(paths.project_root() / NOTEBOOK, 4)
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"][:3]
    address = f"{url.replace('http', 'ws', 1)}/api/kernels/{session['kernel']['id']}/channels"
    channel = websocket.create_connection(address, header=[f"Authorization: token {token}"], timeout=120)
    try:
        for source in sources:
            assert not [sent for sent in run(channel, source) if sent["msg_type"] == "error"]
        told = run(
            channel, "import sys\nprint(sys.executable)\ntold = probes.Progress()\ntold(1, 2, 0.0)\ntold(2, 2, 9.0)"
        )
    finally:
        channel.close()
    printed = [sent["content"]["text"] for sent in told if sent["msg_type"] == "stream"]
    assert printed == [f"{sys.executable}\n"]
    updates = [sent["content"]["data"] for sent in told if sent["msg_type"] == "update_display_data"]
    assert updates == [{"text/plain": "2 of 2 cells, 9 s"}]


def run(channel, code):
    """Execute code through the server's socket; returns what the kernel published for it."""
    name = uuid.uuid4().hex
    header = {
        "msg_id": name,
        "msg_type": "execute_request",
        "session": name,
        "username": "",
        "version": "5.3",
        "date": "",
    }
    content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
    message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
    channel.send(json.dumps(message))
    published = []
    while True:
        answer = json.loads(channel.recv())
        if answer.get("parent_header", {}).get("msg_id") != name or answer["channel"] != "iopub":
            continue
        published.append(answer)
        if answer["msg_type"] == "status" and answer["content"]["execution_state"] == "idle":
            return published
