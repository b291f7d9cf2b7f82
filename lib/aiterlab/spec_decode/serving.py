# SPDX-License-Identifier: Apache-2.0
"""What does a user of `vllm serve` get? The same specification behind an HTTP server, asked by the OpenAI client.

The server listens on 127.0.0.1 alone, and generates for those alone who know its key. Its answers carry token ids, so
that they can be held against those of an offline engine; when they arrive says what a user waits for: the time to the
first token, and the time per token after it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import secrets
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from aiterlab.spec_decode import metrics, parallel, processes, repairs
from aiterlab.spec_decode.engine import (
    JOB_TIMEOUT_S,
    START_TIMEOUT_S,
    EngineError,
    EngineSpec,
    Output,
    Request,
    ended_error,
    llm_arguments,
    log_file,
    resolved,
    start_child,
)
from aiterlab.spec_decode.metrics import Counters

HOST = "127.0.0.1"
MODEL = "target"  # the name that the server gives its model
_PORT_TRIES = 3
_IN_USE = "address already in use"


@dataclass(frozen=True)
class Serving:
    """What one call of `Server.generate` gave; its outputs compare with those of a `Generation`.

    An accepted length here is how many tokens came in one piece of the stream: a step's, unless two steps were sent
    together because the client was slow.
    """

    engine: str
    outputs: tuple[Output, ...]
    counters: Counters  # the server's own, the difference over this call
    wall_s: float
    concurrency: int
    ttft_ms: tuple[float, ...]  # per request: from sending it to the first token
    tpot_ms: tuple[float | None, ...]  # per request: per token after the first; None with a single token

    @property
    def tokens(self) -> int:
        """All generated tokens."""
        return sum(len(output.token_ids) for output in self.outputs)

    @property
    def tokens_per_s(self) -> float:
        """Throughput of the server over the whole call."""
        return self.tokens / self.wall_s

    @property
    def accepted_lengths(self) -> tuple[int, ...]:
        """Tokens per piece of every stream, in the order of `outputs`."""
        return tuple(length for output in self.outputs for length in output.accepted_lengths)


class Server:
    """The handle of one `vllm serve`; a context manager, started by its construction.

    Raises:
        EngineError: its models are not there or do not fit each other, its port is taken, or it cannot be started.
    """

    def __init__(self, spec: EngineSpec, log_dir: Path | str, *, port: int | None = None) -> None:
        """Start it.

        Args:
            port: None: a free one, and another if somebody takes it meanwhile.
        """
        self.spec = resolved(spec)
        self.log = log_file(log_dir, f"serve {spec.name}")
        self._key = secrets.token_urlsafe()
        self._tries = 1 if port else _PORT_TRIES
        self._process: processes.Process | None = None
        self._channel: socket.socket | None = None
        if not Path(self.spec.target, "tokenizer.json").is_file() and Path(self.spec.target).is_dir():
            raise EngineError(f"{spec.name}: {self.spec.target} has no tokenizer.json, and a server needs one; add it")
        self._begin(_checked(port, spec.name) if port else _free_port())

    def _begin(self, port: int) -> None:
        self.port = port
        first = {"run": f"{__name__}:run", "words": command_line(self.spec, port)}
        # Everybody on this machine can read a command line, and reach its loopback.
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_API_KEY": self._key}
        self._process, self._channel, _ = start_child(self.spec, self.log, first, environment)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> float:
        """Wait until it says that it is healthy; return how many seconds that took.

        Raises:
            EngineError: it did not get there; it is ended then, and the error has its last words.
        """
        began = time.monotonic()
        while time.monotonic() - began < timeout_s:
            with contextlib.suppress(OSError):
                self._get("/health")
                return time.monotonic() - began
            if self._process is None or not self._process.is_running():
                self._tries -= 1
                if self._tries and _IN_USE in self._tail().lower():
                    self.close()
                    self._begin(_free_port())
                    continue
                raise self._ended("during its start")
            time.sleep(0.05)
        tail = self._tail()
        self.close()
        message = f"{self.spec.name}: not healthy within {timeout_s:g} s, ended; allow more with timeout_s"
        raise EngineError(f"{message} (log: {self.log})", tail)

    def counters(self) -> Counters:
        """vLLM's counters of speculative decoding since the server's start."""
        return metrics.from_prometheus(self._get("/metrics"))

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        ignore_eos: bool = False,
        concurrency: int = 8,
        timeout_s: float | None = None,
    ) -> Serving:
        """Stream a completion of every request, `concurrency` at a time.

        Args:
            seed: of request i: seed + i, as `Engine.generate` has it with one sample.

        Raises:
            EngineError: a request was refused or failed, or the server ended.
            ValueError: the answer would be wrong.
        """
        import openai

        if temperature > 0 and self.spec.draft_tokens and not processes.has_gpu():
            # Its engine is in a process that nobody can reach.
            raise ValueError(
                f"{self.spec.name}: vLLM's fault of {repairs.EXPAND!r} cannot be mended in a server; ask an Engine"
            )

        self.wait_ready()
        # A proxy is for other machines, and a request that is sent twice cannot be timed.
        client = openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=self._key,
            max_retries=0,
            timeout=timeout_s or JOB_TIMEOUT_S,
            http_client=openai.DefaultHttpxClient(trust_env=False),
        )

        def stream(numbered: tuple[int, Request]):
            number, request = numbered
            sent = time.perf_counter()
            pieces = client.completions.create(
                model=MODEL,
                prompt=request.text if request.token_ids is None else list(request.token_ids),
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=1.0,
                seed=None if seed is None else seed + number,
                stream=True,
                extra_body={"return_token_ids": True, "ignore_eos": ignore_eos, "top_k": 0},
            )
            return _collect(request.id, sent, pieces)

        before = self.counters()
        began = time.perf_counter()
        try:
            with client, ThreadPoolExecutor(concurrency) as threads:
                streams = list(threads.map(stream, enumerate(requests)))
            wall_s = time.perf_counter() - began
            after = self.counters()
        except (openai.OpenAIError, OSError) as error:
            if isinstance(error, openai.APIConnectionError | OSError):
                self._settle()
            if self._process is None or not self._process.is_running():
                raise self._ended("during generate") from None
            text = str(error).strip().partition("\n")[0]
            raise EngineError(f"{self.spec.name}: generate failed: {text} (log: {self.log})", self._tail()) from None
        outputs, ttft, tpot = zip(*streams, strict=True) if streams else ((), (), ())
        return Serving(self.spec.name, outputs, after - before, wall_s, concurrency, ttft, tpot)

    def close(self) -> None:
        """End the server and every process of its group; does nothing the second time."""
        process, self._process = self._process, None
        if process is not None:
            # An engine whose server is gone waits for it; a server that is asked to end ends its engine first.
            process.end(grace_s=processes.GRACE_S if process.is_running() else 0, number=signal.SIGTERM)
        if self._channel is not None:
            self._channel.close()

    def _settle(self) -> None:
        """Give a server whose connection broke the moment it needs to be seen as gone."""
        deadline = time.monotonic() + 2
        while self._process and self._process.is_running() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _tail(self) -> str:
        return self._process.tail() if self._process else ""

    def _ended(self, when: str) -> EngineError:
        process = self._process
        self.close()
        if process is None:
            return EngineError(f"{self.spec.name}: this server was closed; start another")
        return ended_error(self.spec.name, process, when)

    def _get(self, path: str) -> str:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.url}{path}", timeout=10) as answer:
            return answer.read().decode()


def command_line(spec: EngineSpec, port: int) -> list[str]:
    """Translate a specification into what follows `vllm` on a command line."""
    arguments = llm_arguments(spec)
    words = ["serve", arguments.pop("model"), "--host", HOST, "--port", str(port), "--served-model-name", MODEL]
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if value is None or (name, value) in (("disable_log_stats", False), ("skip_tokenizer_init", False)):
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def run(channel: socket.socket, lines, first: dict) -> None:
    """In the child: be `vllm` with the command line that the first message holds."""
    import vllm
    from vllm.entrypoints.cli.main import main

    if not processes.has_gpu():
        parallel.fork_children()
    known = importlib.metadata.version
    # The command asks for the version of a distribution called vllm; the CPU build is called otherwise.
    importlib.metadata.version = lambda name: vllm.__version__ if name == "vllm" else known(name)
    sys.argv = ["vllm", *first["words"]]
    main()


def _collect(request_id: str, sent: float, pieces) -> tuple[Output, float, float | None]:
    tokens: list[int] = []
    text: list[str] = []
    lengths: list[int] = []
    finish_reason, first, last = None, None, None
    for piece in pieces:
        for choice in piece.choices:
            if new := (choice.model_extra or {}).get("token_ids"):
                last = time.perf_counter()
                if first is None:
                    first = last
                else:
                    lengths.append(len(new))
                tokens += new
            text.append(choice.text or "")
            finish_reason = choice.finish_reason or finish_reason
    if first is None:
        raise OSError(f"request {request_id}: the stream had no tokens")
    output = Output(request_id, 0, tuple(tokens), "".join(text), finish_reason, None, tuple(lengths))
    later = sum(lengths)
    return output, (first - sent) * 1000, (last - first) * 1000 / later if later else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _checked(port: int, name: str) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            mend = "choose another port, or none for a free one"
            raise EngineError(f"{name}: port {port} of {HOST} cannot be used ({error.strerror}); {mend}") from None
    return port
