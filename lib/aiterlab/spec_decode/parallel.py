# SPDX-License-Identifier: Apache-2.0
"""Do several ranks give the tokens of one? Tensor parallel, and data parallel as in vLLM's own `test_eagle_dp`.

    tensor parallel   the ranks hold a part of every matrix and add up what they get: another order of summation, so
                      near-ties may turn around, as between a decode and a verify step (see `lossless`)
    data parallel     every rank holds whole models and a part of the requests; here each rank is given all of them, so
                      that each is shown to be right. vLLM's asynchronous engine starts and feeds the ranks, because
                      `vllm.LLM` refuses data parallel ranks for dense models

A rank is a GPU, or a process on the CPU. Ranks talk over loopback and shared memory. `Ranks.addresses` says where they
listened: vLLM 0.20 lets tensor parallel ranks meet at a store of torch's that listens on all interfaces.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch

from aiterlab import children
from aiterlab.spec_decode import lossless, metrics, processes, worker
from aiterlab.spec_decode.engine import (
    SUITE_PAGED,
    Engine,
    EngineError,
    EngineSpec,
    Generation,
    Output,
    Request,
    llm_arguments,
    log_file,
    resolved,
    start_child,
)
from aiterlab.spec_decode.metrics import Counters

TIMEOUT_S = 240
# A specification's own variables win.
_LOOPBACK = {
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


@dataclass(frozen=True)
class Ranks:
    """What one data parallel rank, with its tensor parallel ranks, made of all requests."""

    engine: str
    tensor_parallel: int
    data_parallel: int
    rank: int  # of the data parallel ranks
    outputs: tuple[Output, ...]
    counters: Counters
    start_s: float  # of all ranks together, from the start of the process
    generate_s: float  # this data parallel rank alone; the others waited
    addresses: tuple[str, ...]  # where the processes of all ranks listened


def run(
    spec: EngineSpec,
    requests: Sequence[Request],
    *,
    max_tokens: int,
    log_dir: Path,
    tensor: int = 1,
    data: int = 1,
    timeout_s: float = TIMEOUT_S,
) -> tuple[Ranks, ...]:
    """Generate greedily on `tensor` times `data` ranks; one answer for each data parallel rank.

    Args:
        spec: the engine as it is on one rank.
        tensor, data: tensor parallel ranks, and data parallel ranks of that many each.
        timeout_s: for the start, and again for generating.

    Raises:
        EngineError: the ranks cannot be had, or died, or ran out of time; none of their processes is left.
    """
    spec = _spread(spec, tensor, data)
    if data == 1:
        return (_on_tensor_ranks(spec, requests, max_tokens, log_dir, timeout_s),)
    return _on_data_ranks(spec, requests, data, max_tokens, log_dir, timeout_s)


def compare(one_rank: Generation, ranks: Sequence[Ranks], *, dtype: str = "bfloat16") -> pd.DataFrame:
    """Hold each rank's tokens against those of an engine on one rank, near-ties told from faults.

    Args:
        one_rank: the same requests, greedy, with `logprobs` of 5 or more.
        dtype: of the target; float32 leaves next to no near-ties.
    """
    rows = []
    for mine in ranks:
        found = lossless.compare_greedy(one_rank, mine, dtype=dtype).row()
        numbers = ("tensor_parallel", "data_parallel", "rank", "start_s", "generate_s")
        about = {name: getattr(mine, name) for name in numbers}
        rows.append({"engine": mine.engine} | about | {"acceptance_length": mine.counters.acceptance_length} | found)
    return pd.DataFrame(rows, dtype=object)  # or a gap that one rank does not have would become a NaN


def _spread(spec: EngineSpec, tensor: int, data: int) -> EngineSpec:
    if tensor < 1 or data < 1:
        raise EngineError(f"{spec.name}: {tensor} x {data} ranks; name 1 or more of each")
    if processes.has_gpu():
        if spec.hooks or spec.backend == SUITE_PAGED:
            raise EngineError(f"{spec.name}: hooks and {SUITE_PAGED} do not reach the ranks of GPUs; leave them out")
        if (gpus := torch.cuda.device_count()) < tensor * data:
            raise EngineError(f"{spec.name}: {tensor} x {data} ranks need as many GPUs, here are {gpus}; take fewer")
    return replace(
        spec,
        name=f"{spec.name} TP={tensor} DP={data}",
        tensor_parallel=tensor,
        hooks=(*spec.hooks, f"{__name__}:prepare"),
    )


def _on_tensor_ranks(
    spec: EngineSpec, requests: Sequence[Request], max_tokens: int, log_dir: Path, timeout_s: float
) -> Ranks:
    with Engine(spec, log_dir) as engine:
        facts = engine.wait_ready(timeout_s)
        made = engine.generate(requests, max_tokens=max_tokens, ignore_eos=True, timeout_s=timeout_s)
        listening = engine.call(f"{__name__}:addresses", {}, timeout_s=timeout_s)
    outcome = (made.outputs, made.counters, facts.start_s, made.wall_s, tuple(listening))
    return Ranks(spec.name, spec.tensor_parallel, 1, 0, *outcome)


def _on_data_ranks(
    spec: EngineSpec, requests: Sequence[Request], data: int, max_tokens: int, log_dir: Path, timeout_s: float
) -> tuple[Ranks, ...]:
    with _DataRanks(spec, data, log_dir) as engine:
        start_s = engine.wait_ready(timeout_s)
        answers = engine.generate_on_each(requests, max_tokens, timeout_s)
    return tuple(
        Ranks(
            f"{spec.name}, rank {rank}",
            spec.tensor_parallel,
            data,
            rank,
            tuple(Output(**one, top_logprobs=None, accepted_lengths=()) for one in _tuples(answer["outputs"])),
            Counters.from_json(answer["counters"]),
            start_s,
            answer["generate_s"],
            tuple(answer["addresses"]),
        )
        for rank, answer in enumerate(answers)
    )


class _DataRanks(Engine):
    """An engine whose child runs `serve` of this module, with several data parallel ranks."""

    def __init__(self, spec: EngineSpec, ranks: int, log_dir: Path) -> None:
        self.spec, self.log = resolved(spec), log_file(log_dir, spec.name)
        self.facts, self._jobs, self._unread, self._busy = None, 0, b"", True
        message = {"run": f"{__name__}:serve", "spec": self.spec.to_json(), "ranks": ranks}
        self._process, self._channel, self._began = start_child(self.spec, self.log, message)

    def wait_ready(self, timeout_s: float = TIMEOUT_S) -> float:
        """Wait until all ranks are up; returns the seconds since the start of their process."""
        self._receive("its start", timeout_s, id=0)
        return time.monotonic() - self._began

    def generate_on_each(self, requests: Sequence[Request], max_tokens: int, timeout_s: float) -> list[dict]:
        """Give all requests to each rank, one rank after the other."""
        job = {"requests": [asdict(request) for request in requests], "max_tokens": max_tokens}
        self._jobs = 1
        self._send({"id": 1, "job": "generate", "arguments": job})
        return self._receive("generate", timeout_s, id=1)


def _tuples(outputs: list[dict]) -> list[dict]:
    return [one | {"token_ids": tuple(one["token_ids"])} for one in outputs]


# In a process of its own


def prepare() -> None:
    """Keep ranks on loopback; on a CPU, fork them."""
    for name, value in _LOOPBACK.items():
        os.environ.setdefault(name, value)
    from vllm.distributed import utils

    create = utils.create_tcp_store

    def create_on_host(host: str, port: int, listen_socket: socket.socket | None = None, **options) -> Any:
        if listen_socket is None and options.get("is_master"):  # torch would listen on all interfaces
            listen_socket = socket.create_server((host, port))
            port = listen_socket.getsockname()[1]
        return create(host, port, listen_socket, **options)

    utils.create_tcp_store = create_on_host
    if not processes.has_gpu():
        fork_children()


def fork_children() -> None:
    """On a CPU, have vLLM fork its processes from this one instead of starting each from nothing.

    Forking is vLLM's default, but its CPU platform asks for new interpreters, each of which imports all of vLLM again.
    They end with this process: one that outlived it would hold its sockets, and whoever connects would wait for ever.
    """
    os.register_at_fork(after_in_child=partial(children.end_with_parent, signal.SIGKILL))
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config

    def update_and_fork(cls, config) -> None:
        update(config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(update_and_fork)


def addresses(llm: Any = None) -> list[str]:
    """Where this process and those it started listen: all addresses, without the ports."""
    found = set()
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            found |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return sorted(found)


def serve(channel: socket.socket, lines: Iterator[bytes], first: dict[str, Any]) -> None:
    """Be the data parallel ranks that the first message asks for, for one job; never returns."""

    def answer(number: int, **content) -> None:
        channel.sendall(json.dumps({"id": number} | content).encode() + b"\n")

    async def generate() -> None:
        try:
            engine = _engine(EngineSpec.from_json(first["spec"]), first["ranks"])
            answer(0, result=None)
            job = json.loads(await asyncio.to_thread(next, lines))
            answer(1, result=[await _generate(engine, rank, **job["arguments"]) for rank in range(first["ranks"])])
        except BaseException as error:
            traceback.print_exc()
            for number in (0, 1):  # whichever the other side waits for
                answer(number, error=worker.one_line(error), fatal=True)
        finally:
            # Before the engine is let go of, which begins to shut its ranks down: that takes seconds, and of a rank
            # that has ended nobody can tell any more what it had in shared memory.
            processes.kill_group()

    asyncio.run(generate())


def _engine(spec: EngineSpec, ranks: int) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    worker.run_hooks(spec)
    arguments = llm_arguments(spec) | {"data_parallel_size": ranks, "data_parallel_backend": "mp"}
    if not processes.has_gpu() and spec.tensor_parallel == 1:
        arguments["distributed_executor_backend"] = "uni"  # a rank computes in its engine's process, and needs no other
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


async def _generate(engine: Any, rank: int, requests: list[dict], max_tokens: int) -> dict[str, Any]:
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.metrics.reader import get_metrics_snapshot

    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )

    async def ask(request: dict) -> dict[str, Any]:
        ids = request["token_ids"]
        prompt = request["text"] if ids is None else {"prompt_token_ids": ids}
        answers = engine.generate(prompt, sampling, f"{request['id']}-{rank}", data_parallel_rank=rank)
        (final,) = [one async for one in answers]
        made = final.outputs[0]
        return {
            "request_id": request["id"],
            "sample": 0,
            "token_ids": list(made.token_ids),
            "text": made.text,
            "finish_reason": made.finish_reason,
        }

    before, began = metrics.from_metrics(get_metrics_snapshot()), time.perf_counter()
    outputs = await asyncio.gather(*[ask(request) for request in requests])
    return {
        "outputs": outputs,
        "counters": asdict(metrics.from_metrics(get_metrics_snapshot()) - before),
        "generate_s": time.perf_counter() - began,
        "addresses": addresses(),
    }
