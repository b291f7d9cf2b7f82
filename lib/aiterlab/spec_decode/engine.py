# SPDX-License-Identifier: Apache-2.0
"""What does the real vLLM engine do with this target, this draft and this method? One engine per clean process.

An `EngineSpec` says what to run, an `Engine` is the handle of the child process that runs it (`worker`), `alive` keeps
several of them side by side, so that repeats can be interleaved: round 1 vanilla, eagle, eagle3; round 2 the same. An
engine that is not asked anything does nothing. Everything that goes wrong is an `EngineError`: one line with the mend.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiterlab import host
from aiterlab.spec_decode import models, processes
from aiterlab.spec_decode.metrics import Counters

START_TIMEOUT_S = 900  # on a GPU with a cold cache of compiled code
JOB_TIMEOUT_S = 1800
SUITE_PAGED = "SUITE_PAGED"
# n-gram: the longest and the shortest run of tokens to be found again in the text so far.
PROMPT_LOOKUP = {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
# With a given size of the KV cache this is only a demand for free memory at the start; engines share the device.
MEMORY_SHARE = 0.02


class EngineError(RuntimeError):
    """An engine that could not be started, or that failed: one line with the mend; `log_tail` has its last words."""

    def __init__(self, message: str, log_tail: str = "") -> None:
        super().__init__(message)
        self.log_tail = log_tail


@dataclass(frozen=True)
class EngineSpec:
    """One engine of an investigation: which models, which method, how many draft tokens, which backend."""

    name: str  # unique in a fleet: "vanilla", "eagle3 K=4"
    target: str  # folder or Hub id
    method: str = "vanilla"  # one of models.METHODS
    draft: str | None = None
    draft_tokens: int = 0  # K
    backend: str | None = None  # vLLM's name of an attention backend, SUITE_PAGED for ours, None: vLLM's choice
    dtype: str = "auto"  # the model's own on a GPU; float32 on a CPU (see `_dtype`)
    max_model_len: int = 1024
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 2048
    kv_cache_bytes: int = 1 << 28
    load_format: str = "auto"  # "dummy": random weights of the configured shape
    synthetic_acceptance: tuple[float, ...] | None = None  # unconditional rate of each position, instead of verifying
    cuda_graphs: bool = True  # a CPU always runs without
    cudagraph_batch_sizes: tuple[int, ...] = ()  # numbers of sequences to capture graphs for; (): vLLM's own
    cudagraph_draft_tokens: tuple[int, ...] = ()  # every K to capture for: engines alike in it share compiled code
    async_scheduling: bool | None = None  # True: the next step is scheduled while one runs; None: vLLM's choice
    tensor_parallel: int = 1
    seed: int = 0
    prefix_caching: bool = False
    threads: int | None = None  # CPU: OpenMP threads; None: one
    environment: tuple[tuple[str, str], ...] = ()  # variables of the child; win over all others
    hooks: tuple[str, ...] = ()  # "module:function", called in the child before the engine is built
    repairs: bool = True  # mend vLLM's own faults that would spoil the answer (see `repairs`); False: as released

    def __post_init__(self) -> None:
        if self.method not in models.METHODS:
            raise ValueError(f"{self.name}: no method {self.method!r}; there are {', '.join(models.METHODS)}")
        if (self.method == "vanilla") != (self.draft_tokens == 0):
            raise ValueError(
                f"{self.name}: {self.method} with {self.draft_tokens} draft tokens; vanilla takes 0, others 1+"
            )
        if self.synthetic_acceptance is not None and len(self.synthetic_acceptance) != self.draft_tokens:
            raise ValueError(
                f"{self.name}: {len(self.synthetic_acceptance)} synthetic rates for {self.draft_tokens} draft tokens; "
                "give one for each"
            )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EngineSpec:
        return cls(**{name: _tuples(value) for name, value in values.items()})


@dataclass(frozen=True)
class Facts:
    """What an engine says once it is up; everything here happened before its first measured step."""

    vllm_version: str
    device: str
    dtype: str  # of the target: bfloat16, float16 or float32
    preloaded: bool  # forked from a process that had imported vLLM: its import_s is not part of start_s
    import_s: float
    load_s: float  # construction of vllm.LLM: weights, KV cache, graphs
    compile_s: float | None  # torch.compile, a part of load_s; None where nothing is compiled
    warm_up_s: float
    start_s: float  # start of the process until it is ready
    target_backends: tuple[str, ...]  # classes of the attention backends really used, by layer, without repeats
    draft_backends: tuple[str, ...]
    kv_cache_tokens: int
    max_model_len: int
    cuda_graph_mode: str
    async_scheduling: bool
    peak_rss_bytes: int
    repairs: tuple[str, ...]  # faults of this vLLM that were mended


@dataclass(frozen=True)
class Request:
    """One prompt: text, or token ids."""

    id: str
    task: str
    text: str | None = None
    token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.token_ids is None):
            raise ValueError(f"request {self.id}: give either text or token_ids")


@dataclass(frozen=True)
class Output:
    """One sample of one request."""

    request_id: str
    sample: int
    token_ids: tuple[int, ...]
    text: str | None  # None where the engine has no tokenizer
    finish_reason: str | None
    # Per position ((token, log-probability), ...), likeliest first, the chosen one among them; None if not asked for.
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None
    accepted_lengths: tuple[int, ...]  # tokens of each decode step; the first token, which prefill gives, is left out


@dataclass(frozen=True)
class Generation:
    """What one call of `Engine.generate` gave, warm-up never included.

    `accepted_lengths` are tokens that requests really got, so the last step of a request may be cut short by
    `max_tokens`; `counters` count what was verified.
    """

    engine: str
    outputs: tuple[Output, ...]
    counters: Counters  # vLLM's own, the difference over this call
    wall_s: float
    prefill_s: float  # steps with any prompt tokens among theirs
    decode_s: float
    decode_steps: int
    steps_ms: tuple[float, ...]  # wall time of every pure decode step
    steps_sequences: tuple[int, ...]  # how many sequences each of them had
    undrafted: int  # decode steps of one request that had no draft tokens: n-gram without a match, the last position
    components: dict[str, float | None] | None  # see `steps`; None unless asked for by breakdown=True

    @property
    def accepted_lengths(self) -> tuple[int, ...]:
        """Tokens per decode step and request, in the order of `outputs`."""
        return tuple(length for output in self.outputs for length in output.accepted_lengths)

    @property
    def tokens(self) -> int:
        """All generated tokens."""
        return sum(len(output.token_ids) for output in self.outputs)

    @classmethod
    def from_json(cls, engine: str, values: Mapping[str, Any]) -> Generation:
        changes = {
            "outputs": tuple(Output(**{k: _tuples(v) for k, v in output.items()}) for output in values["outputs"]),
            "counters": Counters.from_json(values["counters"]),
            "steps_ms": tuple(values["steps_ms"]),
            "steps_sequences": tuple(values["steps_sequences"]),
        }
        return cls(**{**values, **changes, "engine": engine})


def llm_arguments(spec: EngineSpec) -> dict[str, Any]:
    """Translate a specification into the keyword arguments of `vllm.LLM`."""
    compilation: dict[str, Any] = {}
    if spec.cuda_graphs and spec.cudagraph_batch_sizes:
        # Verification of n sequences has n (K + 1) tokens, and so has the draft's first pass; its other passes have n.
        lengths = {0, spec.draft_tokens, *spec.cudagraph_draft_tokens}
        tokens = {n * (k + 1) for n in spec.cudagraph_batch_sizes for k in lengths}
        compilation["cudagraph_capture_sizes"] = sorted(tokens)
    arguments = {
        "model": spec.target,
        "dtype": _dtype(spec),
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.max_num_seqs,
        "max_num_batched_tokens": spec.max_num_batched_tokens,
        "kv_cache_memory_bytes": spec.kv_cache_bytes,
        "gpu_memory_utilization": MEMORY_SHARE,
        "load_format": spec.load_format,
        "skip_tokenizer_init": not _has_tokenizer(spec.target),
        "enforce_eager": not (spec.cuda_graphs and processes.has_gpu()),
        "tensor_parallel_size": spec.tensor_parallel,
        "enable_prefix_caching": spec.prefix_caching,
        "async_scheduling": spec.async_scheduling,
        "seed": spec.seed,
        "disable_log_stats": False,  # the counters are part of these statistics
    }
    if compilation:
        arguments["compilation_config"] = compilation
    if spec.backend:
        arguments["attention_backend"] = "CUSTOM" if spec.backend == SUITE_PAGED else spec.backend
    if speculative := _speculative_config(spec):
        arguments["speculative_config"] = speculative
    return arguments


def _dtype(spec: EngineSpec) -> str:
    """What vLLM is to compute in.

    Few CPUs multiply 16-bit numbers well: without AVX-512 PyTorch takes 10 to 40 times as long for a product of
    bfloat16 as for one of float32, and answers that depend on the CPU would be no use to anybody.
    """
    return "float32" if spec.dtype == "auto" and not processes.has_gpu() else spec.dtype


def _speculative_config(spec: EngineSpec) -> dict[str, Any]:
    if spec.method == "vanilla":
        return {}
    config: dict[str, Any] = {"method": spec.method, "num_speculative_tokens": spec.draft_tokens}
    config |= PROMPT_LOOKUP if spec.method == "ngram" else {"model": spec.draft}
    if spec.synthetic_acceptance is not None:
        config["rejection_sample_method"] = "synthetic"
        config["synthetic_acceptance_rates"] = list(spec.synthetic_acceptance)
    return config


def _has_tokenizer(target: str) -> bool:
    folder = Path(target)
    return not folder.is_dir() or any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    )


class Engine:
    """The handle of one engine in a process of its own; a context manager, started by its construction.

    Raises:
        EngineError: its models are not there or do not fit each other, or its process cannot be started.
    """

    def __init__(self, spec: EngineSpec, log_dir: Path | str) -> None:
        self.spec = resolved(spec)
        self.facts: Facts | None = None
        self.log = log_file(log_dir, spec.name)
        self._jobs = 0
        self._unread = b""
        self._busy = True  # it cannot be asked to end, only be ended
        self._process, self._channel, self._began = start_child(self.spec, self.log, self._first_message())

    def _first_message(self) -> dict[str, Any]:
        return {"spec": self.spec.to_json()}

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The child, which leads a process group of this number."""
        return self._process.pid

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> Facts:
        """Wait until it is up and warm.

        Raises:
            EngineError: it did not come up; it is ended then.
        """
        if self.facts is None:
            values = self._receive("its start", timeout_s, id=0)
            start_s = time.monotonic() - self._began
            self._busy = False
            self.facts = Facts(**{name: _tuples(value) for name, value in values.items()}, start_s=start_s)
        return self.facts

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        samples: int = 1,
        logprobs: int = 0,
        ignore_eos: bool = False,
        breakdown: bool = False,
        timeout_s: float | None = None,
    ) -> Generation:
        """Generate for all requests at once.

        Args:
            seed: of sample j of request i: seed + i * samples + j, so that no two samples share their noise.
            samples: per request.
            logprobs: how many of the likeliest tokens to report at each position.
            breakdown: also say where a step's time goes; its marks cost some time themselves.

        Raises:
            EngineError: refused (the engine lives on), failed, ended or took longer than `timeout_s`.
            ValueError: two requests have the same id.
        """
        ids = [request.id for request in requests]
        if twice := {one for one in ids if ids.count(one) > 1}:
            raise ValueError(f"requests need ids of their own; there are several called {', '.join(sorted(twice))}")
        job = {
            "requests": [dataclasses.asdict(request) for request in requests],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "samples": samples,
            "logprobs": logprobs,
            "ignore_eos": ignore_eos,
            "breakdown": breakdown,
        }
        return Generation.from_json(self.spec.name, self._ask("generate", job, timeout_s))

    def call(self, function: str, arguments: Mapping[str, Any] | None = None, timeout_s: float | None = None) -> Any:
        """Call `module:function` in the child, with its `vllm.LLM` and these arguments; JSON in, JSON out.

        Raises:
            EngineError: as `generate`.
        """
        return self._ask("call", {"function": function, "arguments": dict(arguments or {})}, timeout_s)

    def ask_to_end(self) -> None:
        """Ask the engine to end when its job is done, and do not wait."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._channel.sendall(b'{"job": "stop"}\n')

    def close(self) -> None:
        """End the engine and every process of its group; does nothing the second time."""
        self.ask_to_end()
        process, self._process = self._process, None
        if process is not None:
            process.end(grace_s=0 if self._busy else processes.GRACE_S)
        self._channel.close()

    def _ask(self, job: str, arguments: dict[str, Any], timeout_s: float | None) -> Any:
        self.wait_ready()
        self._jobs += 1
        self._send({"id": self._jobs, "job": job, "arguments": arguments})
        self._busy = True
        answer = self._receive(job, timeout_s or JOB_TIMEOUT_S, id=self._jobs)
        self._busy = False
        return answer

    def _send(self, message: dict[str, Any]) -> None:
        if self._process is None:
            raise EngineError(f"{self.spec.name}: this engine was closed; start another")
        try:
            self._channel.settimeout(None)
            self._channel.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            raise self._ended("before its next job") from None

    def _receive(self, what: str, timeout_s: float, id: int) -> Any:
        """The answer to the job of this id; answers to interrupted jobs before it are dropped."""
        deadline = time.monotonic() + timeout_s
        while True:
            line = self._line(what, deadline, timeout_s)
            answer = json.loads(line)
            if answer["id"] != id:
                continue
            if "error" not in answer:
                return answer["result"]
            self._busy = False
            raise self._failed(what, answer["error"], fatal=answer["fatal"])

    def _line(self, what: str, deadline: float, timeout_s: float) -> bytes:
        if self._process is None:
            raise EngineError(f"{self.spec.name}: this engine was closed; start another")
        pieces = [self._unread]
        while b"\n" not in pieces[-1]:
            self._channel.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                piece = self._channel.recv(1 << 20)
            except TimeoutError:
                tail = self._process.tail()
                self.close()
                message = f"no answer to {what} within {timeout_s:g} s, ended; allow more with timeout_s"
                raise EngineError(f"{self.spec.name}: {message} (log: {self.log})", tail) from None
            except OSError:
                piece = b""
            if not piece:
                raise self._ended(f"during {what}")
            pieces.append(piece)
        line, _, self._unread = b"".join(pieces).partition(b"\n")
        return line

    def _ended(self, when: str) -> EngineError:
        process = self._process
        self.close()
        return ended_error(self.spec.name, process, when)

    def _failed(self, what: str, error: str, fatal: bool) -> EngineError:
        tail = self._process.tail()
        if fatal:
            self.close()
        mend = mend_for(error)
        message = f"{self.spec.name}: {what} failed: {error}{f'; {mend}' if mend else ''} (log: {self.log})"
        return EngineError(message, tail)


@contextlib.contextmanager
def alive(
    specs: Sequence[EngineSpec],
    log_dir: Path | str,
    *,
    progress: Callable[[int, int, float], None] | None = None,
    at_a_time: int | None = None,
) -> Iterator[dict[str, Engine]]:
    """Keep one engine per specification, by name; start several at a time, and end all, whatever happens.

    Args:
        log_dir: where each engine's log goes.
        progress: called with (engines ready, engines in all, seconds since the start).
        at_a_time: how many start at once; None: as many as there are cores, on a CPU from 2 to 4.

    Raises:
        EngineError: one could not be started; the others are ended.
    """
    names = [spec.name for spec in specs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"engines need names of their own; there are several called {', '.join(sorted(twice))}")
    began = time.monotonic()
    engines: dict[str, Engine] = {}
    cores = host.usable_cores()  # to compile for a GPU keeps one busy
    at_a_time = at_a_time or (max(2, cores) if processes.has_gpu() else min(4, max(2, cores)))
    try:
        for spec in specs:
            resolved(spec)  # a wrong path is told before anything is started
        for number in range(len(specs)):
            for spec in specs[len(engines) : number + at_a_time]:
                engines[spec.name] = Engine(spec, log_dir)
            engines[specs[number].name].wait_ready()
            if progress:
                progress(number + 1, len(specs), time.monotonic() - began)
        yield engines
    finally:
        for engine in engines.values():  # all leave at the same time
            engine.ask_to_end()
        for engine in engines.values():
            engine.close()


def resolved(spec: EngineSpec) -> EngineSpec:
    """Check the models of a specification and make their folders absolute; a child runs in another folder.

    Raises:
        EngineError: they are not there, or do not fit each other.
    """
    try:
        models.check_fit(spec.target, spec.draft, spec.method, weights=spec.load_format != "dummy")
        absolute = {
            name: str(Path(value).resolve())
            for name in ("target", "draft")
            if (value := getattr(spec, name)) is not None and models.is_folder(value)
        }
    except models.ModelError as error:
        raise EngineError(f"{spec.name}: {error}") from None
    return dataclasses.replace(spec, **absolute)


def start_child(
    spec: EngineSpec, log: Path, first_message: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> tuple[processes.Process, socket.socket, float]:
    """Start `worker` for a specification, and tell it what to be; return it, our end of its socket, and when.

    Args:
        environment: variables that this kind of child needs; a fork is given them too.

    Raises:
        EngineError: it cannot be started.
    """
    channel, theirs = socket.socketpair()
    extra = dict(environment or {})
    # A fork has the environment of the process that it comes from, and GPUs do not survive a fork.
    plain = spec.threads is None and not spec.environment
    forked = plain and _in_folders(spec) and not processes.has_gpu()
    try:
        with theirs:
            if forked:
                processes.preload()
            began = time.monotonic()
            if forked:
                process = processes.fork(log, theirs, extra)
            else:
                whole = processes.engine_environment() | extra
                if spec.threads is not None:
                    whole["OMP_NUM_THREADS"] = str(spec.threads)
                if not _in_folders(spec):
                    del whole["HF_HUB_OFFLINE"]
                command = [sys.executable, "-m", "aiterlab.spec_decode.worker", str(theirs.fileno())]
                process = processes.launch(command, log, whole | dict(spec.environment), [theirs.fileno()])
    except (processes.StartError, OSError) as error:
        channel.close()
        what = processes.describe(error) if isinstance(error, OSError) else error
        raise EngineError(f"{spec.name}: {what}") from None
    except BaseException:
        channel.close()
        raise
    with contextlib.suppress(OSError):  # a child that is gone already is met when it is first waited for
        channel.sendall(json.dumps(first_message).encode() + b"\n")
    return process, channel, began


def ended_error(name: str, process: processes.Process, when: str) -> EngineError:
    """Say how a child ended that nobody had asked to; waits for the last of its group."""
    status, tail = process.end(), process.tail()
    return EngineError(f"{name}: the engine ended {when}, {_cause(status, tail)} (log: {process.log})", tail)


def log_file(log_dir: Path | str, name: str) -> Path:
    """Where the child of this name writes."""
    return Path(log_dir) / f"{''.join(letter if letter.isalnum() or letter in '-_.=' else '_' for letter in name)}.log"


_MENDS = {
    ("No space left on device", "File too large", "quota exceeded", "usable temporary directory"): processes.MEND_DISK,
    (
        "out of memory",
        "MemoryError",
        "Free memory on device",
        "Available memory on node",
        "Cannot allocate memory",
        "not enough memory",
    ): "lower kv_cache_bytes or max_num_seqs, or close other engines",
    ("larger than the available KV cache memory", "No available memory for the cache blocks"): (
        "raise kv_cache_bytes, or lower max_model_len"
    ),
    ("maximum model length", "maximum context length"): "shorten the prompt, or raise max_model_len",
    ("offline mode", "LocalEntryNotFound", "is not a valid model identifier"): "name the folder of the model",
}


def mend_for(message: str) -> str:
    """What to do about an error that vLLM or the operating system reported; empty if nobody knows."""
    for signs, mend in _MENDS.items():
        if any(sign.lower() in message.lower() for sign in signs):
            return mend
    return ""


def _cause(status: int | None, tail: str) -> str:
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        by_force = status == -signal.SIGKILL
        mend = "if memory ran out (dmesg), lower kv_cache_bytes" if by_force else "its log says where"
        return f"killed by {name}; {mend}"
    last = tail.rpartition("\n")[2]
    return f"status {status}: {last or 'it said nothing'}{f'; {mend}' if (mend := mend_for(last)) else ''}"


def _in_folders(spec: EngineSpec) -> bool:
    return all(Path(model).is_dir() for model in (spec.target, spec.draft) if model is not None)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
