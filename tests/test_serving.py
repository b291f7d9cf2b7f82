# SPDX-License-Identifier: Apache-2.0
"""aiterlab.spec_decode.serving: one real `vllm serve`, what it answers, and how it ends."""

import os
import signal
import socket
import threading
import urllib.error
import urllib.request

import psutil
import pytest

from aiterlab.spec_decode import models, processes
from aiterlab.spec_decode.engine import EngineError, EngineSpec, Request, alive
from aiterlab.spec_decode.serving import HOST, Server, command_line

PROMPTS = [
    Request("code", "code", text="def add(a, b):\n    return"),
    Request("ids", "code", token_ids=tuple(range(5, 45))),
]
TOKENS = 16


def eagle3():
    pair = models.bundled()["eagle3"]
    sizes = {"max_model_len": 192, "max_num_seqs": 4, "max_num_batched_tokens": 192, "kv_cache_bytes": 1 << 25}
    return EngineSpec("eagle3", str(pair.target), "eagle3", str(pair.draft), 2, **sizes)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def server(logs):
    with Server(eagle3(), logs) as running:
        running.wait_ready()
        yield running


@pytest.mark.slow
def test_a_server_listens_on_loopback_alone(server):
    leader = psutil.Process(server._process.pid)
    listening = [c.laddr for c in leader.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert (HOST, server.port) in listening
    assert {address.ip for address in listening if address.port == server.port} == {"127.0.0.1"}


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, "none"], ids=["no key", "another key"])
def test_a_server_answers_nobody_without_its_key(server, key):
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(
        f"{server.url}/v1/completions", b'{"model": "target", "prompt": "a", "max_tokens": 1}', headers
    )
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10)


@pytest.mark.slow
def test_the_key_of_a_server_is_in_no_command_line_and_no_log(server):
    leader = psutil.Process(server._process.pid)
    lines = [word for process in (leader, *leader.children(recursive=True)) for word in process.cmdline()]
    assert server._key not in " ".join([*lines, *command_line(server.spec, server.port), server.log.read_text()])


@pytest.mark.slow
def test_a_server_answers_what_an_offline_engine_does(server, logs):
    served = [server.generate([request], max_tokens=TOKENS, ignore_eos=True) for request in PROMPTS]
    with alive([eagle3()], logs) as engines:
        offline = [engines["eagle3"].generate([request], max_tokens=TOKENS, ignore_eos=True) for request in PROMPTS]
    for over_http, in_process in zip(served, offline, strict=True):
        assert over_http.outputs[0].token_ids == in_process.outputs[0].token_ids
        assert over_http.outputs[0].text == in_process.outputs[0].text
        assert over_http.counters == in_process.counters


@pytest.mark.slow
def test_a_server_is_timed_by_what_arrives(server):
    requests = [Request(str(n), "code", token_ids=tuple(range(5, 15 + n))) for n in range(6)]
    made = server.generate(requests, max_tokens=TOKENS, ignore_eos=True, concurrency=3)
    assert made.concurrency == 3
    assert [output.request_id for output in made.outputs] == [request.id for request in requests]
    assert made.tokens == 6 * TOKENS
    assert made.tokens_per_s == pytest.approx(made.tokens / made.wall_s)
    assert len(made.ttft_ms) == len(made.tpot_ms) == 6
    assert all(0 < ttft < 1000 * made.wall_s for ttft in made.ttft_ms)
    assert made.counters.drafts > 0
    for output, ttft, tpot in zip(made.outputs, made.ttft_ms, made.tpot_ms, strict=True):
        first = TOKENS - sum(output.accepted_lengths)
        assert first >= 1
        assert ttft + tpot * sum(output.accepted_lengths) < 1000 * made.wall_s


@pytest.mark.slow
def test_a_refused_request_is_one_line(server):
    with pytest.raises(EngineError, match=r"generate failed: .*192") as refused:
        server.generate([Request("long", "code", token_ids=(5,) * 500)], max_tokens=4)
    assert "\n" not in str(refused.value)
    assert server.generate(PROMPTS[:1], max_tokens=2, ignore_eos=True).tokens == 2


@pytest.mark.slow
def test_an_occupied_port_is_one_line_and_starts_nothing(server, logs):
    before = psutil.Process().children(recursive=True)
    with pytest.raises(EngineError, match=f"port {server.port} .*in use.*another port") as refused:
        Server(eagle3(), logs, port=server.port)
    assert "\n" not in str(refused.value)
    assert psutil.Process().children(recursive=True) == before


@pytest.mark.slow
def test_a_server_killed_while_it_generates(server):
    pid = server._process.pid
    assert len(processes.members(pid)) > 1  # the server, and its engine in processes of their own
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(EngineError, match="killed by SIGKILL") as ended:
        server.generate(PROMPTS * 40, max_tokens=120, ignore_eos=True)
    assert "\n" not in str(ended.value)
    assert ended.value.log_tail
    assert not processes.members(pid)
    with pytest.raises(EngineError, match="was closed"):
        server.generate(PROMPTS, max_tokens=1)


@pytest.mark.slow
def test_a_server_that_does_not_come_up(logs):
    with Server(eagle3(), logs) as stopped:
        pid = stopped._process.pid
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="during its start, killed by SIGKILL"):
            stopped.wait_ready()
        assert not processes.members(pid)


def test_a_port_that_is_taken_before_the_start(logs):
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        with pytest.raises(EngineError, match="cannot be used"):
            Server(eagle3(), logs, port=taken.getsockname()[1])


def test_a_model_without_tokenizer_cannot_be_served(tmp_path, logs):
    target = models.llama_3_1_8b_shape(tmp_path / "target")
    with pytest.raises(EngineError, match=r"no tokenizer.json"):
        Server(EngineSpec("shape", str(target), load_format="dummy"), logs)


def test_a_specification_becomes_a_command_line(monkeypatch):
    monkeypatch.setattr(processes, "has_gpu", lambda: False)
    spec = EngineSpec("x", "org/target", "eagle", "org/draft", 2, backend="TRITON_ATTN", async_scheduling=False)
    words = command_line(spec, 8123)
    assert words[:6] == ["serve", "org/target", "--host", "127.0.0.1", "--port", "8123"]
    assert words[words.index("--attention-backend") + 1] == "TRITON_ATTN"
    assert words[words.index("--kv-cache-memory-bytes") + 1] == str(1 << 28)
    assert {"--enforce-eager", "--no-enable-prefix-caching", "--no-async-scheduling"} <= set(words)
    assert '"num_speculative_tokens": 2' in words[words.index("--speculative-config") + 1]
    assert not [word for word in words if word in ("None", "True", "False", "--disable-log-stats")]
