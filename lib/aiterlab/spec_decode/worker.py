# SPDX-License-Identifier: Apache-2.0
"""The child: build `vllm.LLM`, then step it by hand, so that every step is seen.

Jobs and answers are lines of JSON on a socket; standard output and error are the log. vLLM's scheduler runs in this
very process, and a step is what one call of `LLMEngine.step` does. The scheduler's own decision says whether it had
prompt tokens among its work; only steps without any are decode steps.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import socket
import sys
import tempfile
import time
import traceback
from typing import Any

from aiterlab import shared_memory
from aiterlab.spec_decode import engine, metrics, processes, repairs

_WARM_UP_TOKENS = 6


def main() -> None:
    """Be the engine of the socket whose number is the argument."""
    serve(socket.socket(fileno=int(sys.argv[1])))


def serve(channel: socket.socket, import_s: float | None = None) -> None:
    """Build the engine that the first line asks for, then answer one job per line until told to stop.

    A first line with `run` asks for something else: that function gets the socket, its lines and the first of them.

    Args:
        import_s: what importing vLLM took in the process that this one was forked from.
    """
    processes.end_with(channel)
    tempfile.tempdir = None  # a fork has another TMPDIR than the process it comes from
    lines = channel.makefile("rb")

    def answer(message: dict[str, Any]) -> None:
        channel.sendall(json.dumps(message).encode() + b"\n")

    first = json.loads(lines.readline())
    if "run" in first:
        _find(first["run"])(channel, lines, first)
        return
    try:
        worker = _Worker(engine.EngineSpec.from_json(first["spec"]), import_s)
        answer({"id": 0, "result": worker.facts()})
    except BaseException as error:
        _log_traceback()
        answer({"id": 0, "error": one_line(error), "fatal": True})
        return
    for line in lines:
        request = json.loads(line)
        if request["job"] == "stop":
            break
        try:
            result = getattr(worker, request["job"])(**request["arguments"])
            answer({"id": request["id"], "result": result})
        except Exception as error:
            _log_traceback()
            answer({"id": request["id"], "error": one_line(error), "fatal": not isinstance(error, _Refused)})
    else:  # nobody is there any more
        time.sleep(processes.GRACE_S)  # until `end_with` has tidied up and ends this group
    if worker.spec.tensor_parallel > 1:  # other processes share memory with this one, and some of it has names
        segments = processes.segments(os.getpgrp())
        worker.llm.llm_engine.engine_core.shutdown()
        shared_memory.delete(segments)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and taking an engine apart takes longer than its start


def _log_traceback() -> None:
    with contextlib.suppress(OSError):  # the log may be on the full disk that this is about
        traceback.print_exc()


class _Refused(Exception):
    """A request that vLLM did not take, before any step; the engine is as it was."""


def one_line(error: BaseException) -> str:
    """The line of an error that says most."""
    if hasattr(error, "errors") and callable(error.errors):  # pydantic: a heading, then what is wrong
        text = "; ".join(str(item.get("msg", item)) for item in error.errors())
    else:
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    name = type(error).__name__
    return text if isinstance(error, ValueError | _Refused) and text else f"{name}: {text}" if text else name


class _Worker:
    """One living engine."""

    def __init__(self, spec: engine.EngineSpec, import_s: float | None) -> None:
        self.spec = spec
        self.preloaded = import_s is not None
        began = time.monotonic()
        import vllm

        vllm.LLM  # noqa: B018  loaded on first use
        if not self.preloaded:
            import_s = time.monotonic() - began
            gc.collect()
            gc.freeze()  # vLLM collects garbage several times at its start; modules are none
        self.import_s = import_s
        inspect_here()
        run_hooks(spec)
        began = time.monotonic()
        self.llm = vllm.LLM(**_arguments(spec))
        self.load_s = time.monotonic() - began
        self.repairs = self.llm.collective_rpc(repair)[0] if spec.repairs else ()
        self.steps = _Steps(self.llm)
        self.clock = None
        began = time.monotonic()
        self._warm_up()
        self.warm_up_s = time.monotonic() - began

    def facts(self) -> dict[str, Any]:
        import vllm

        config = self.llm.llm_engine.vllm_config
        backends = self.llm.collective_rpc(attention_backends)[0]
        return {
            "vllm_version": vllm.__version__,
            "device": _device(),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "preloaded": self.preloaded,
            "import_s": self.import_s,
            "load_s": self.load_s,
            "compile_s": config.compilation_config.compilation_time or None,
            "warm_up_s": self.warm_up_s,
            "target_backends": backends["target"],
            "draft_backends": backends["draft"],
            "kv_cache_tokens": config.cache_config.num_gpu_blocks * config.cache_config.block_size,
            "max_model_len": config.model_config.max_model_len,
            "cuda_graph_mode": getattr(config.compilation_config.cudagraph_mode, "name", "NONE"),
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "repairs": self.repairs,
        }

    def call(self, function: str, arguments: dict[str, Any]) -> Any:
        """Call a function of a module with the living engine."""
        return _find(function)(self.llm, **arguments)

    def generate(
        self,
        requests: list[dict[str, Any]],
        max_tokens: int,
        temperature: float,
        seed: int | None,
        samples: int,
        logprobs: int,
        ignore_eos: bool,
        breakdown: bool,
    ) -> dict[str, Any]:
        """Step the engine until every request is answered."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        clock = self._clock() if breakdown else None
        before = metrics.from_metrics(self.llm.get_metrics())
        collected = {
            (request["id"], sample): _Collected(request["id"], sample, bool(logprobs))
            for request in requests
            for sample in range(samples)
        }
        spent, steps_ms, sequences, undrafted = {"prefill": 0.0, "decode": 0.0}, [], [], 0
        llm_engine = self.llm.llm_engine
        ids = []
        began = time.perf_counter()
        try:
            for number, request in enumerate(requests):
                params = SamplingParams(
                    n=samples,
                    max_tokens=max_tokens,
                    temperature=temperature,
                    seed=None if seed is None else seed + number * samples,
                    logprobs=logprobs or None,
                    ignore_eos=ignore_eos,
                    detokenize=not self.llm.llm_engine.model_config.skip_tokenizer_init,
                    output_kind=RequestOutputKind.DELTA,
                )
                tokens, text = request["token_ids"], request["text"]
                prompt = text if tokens is None else {"prompt_token_ids": tokens}
                try:
                    llm_engine.add_request(request["id"], prompt, params)
                except Exception as error:
                    raise _Refused(f"request {request['id']}: {one_line(error)}") from error
                ids.append(request["id"])
            if clock:
                clock.reset()
                clock.enabled = True
            while llm_engine.has_unfinished_requests():
                self.steps.last = None
                start = time.perf_counter()
                outputs = llm_engine.step()
                seconds = time.perf_counter() - start
                for output in outputs:
                    for completion in output.outputs:
                        collected[output.request_id, completion.index].add(completion)
                step = self.steps.last
                spent["decode" if step and step.decode else "prefill"] += seconds
                if step and step.decode:
                    steps_ms.append(seconds * 1000)
                    sequences.append(step.sequences)
                    undrafted += step.undrafted
        except BaseException:
            llm_engine.abort_request(ids)
            raise
        finally:
            if clock:
                clock.enabled = False
        wall_s = time.perf_counter() - began
        after = metrics.from_metrics(self.llm.get_metrics())
        return {
            "outputs": [one.to_json() for one in collected.values()],
            "counters": vars(after - before),
            "wall_s": wall_s,
            "prefill_s": spent["prefill"],
            "decode_s": spent["decode"],
            "decode_steps": len(steps_ms),
            "steps_ms": steps_ms,
            "steps_sequences": sequences,
            "undrafted": undrafted if self.spec.draft_tokens else 0,
            "components": clock.components(len(collected)) if clock else None,
        }

    def _clock(self):
        if self.clock is None:
            from aiterlab.spec_decode import steps

            self.clock = steps.install(self.llm)
        return self.clock

    def _warm_up(self) -> None:
        """Let everything that is made on first use be made: greedy and sampled, one sequence and several."""
        tokens = [index % 8 + 3 for index in range(min(16, self.spec.max_model_len - _WARM_UP_TOKENS - 1))]
        plain = {"seed": None, "samples": 1, "logprobs": 0, "ignore_eos": True, "breakdown": False}
        for count, temperature in ((1, 0.0), (min(2, self.spec.max_num_seqs), 1.0)):
            requests = [{"id": f"warm-up {n}", "text": None, "token_ids": tokens} for n in range(count)]
            self.generate(requests, _WARM_UP_TOKENS, temperature, **plain)


class _Collected:
    """What came of one sample, step by step."""

    def __init__(self, request_id: str, sample: int, with_logprobs: bool) -> None:
        self.request_id, self.sample = request_id, sample
        self.tokens: list[int] = []
        self.text: list[str] = []
        self.lengths: list[int] = []
        self.logprobs: list | None = [] if with_logprobs else None
        self.finish_reason: str | None = None

    def add(self, completion) -> None:
        if completion.token_ids:
            if self.tokens:
                self.lengths.append(len(completion.token_ids))
            self.tokens.extend(completion.token_ids)
        if completion.text:
            self.text.append(completion.text)
        self.finish_reason = completion.finish_reason or self.finish_reason
        if self.logprobs is not None:
            for position in completion.logprobs or ():
                likeliest = sorted(((token, entry.logprob) for token, entry in position.items()), key=lambda p: -p[1])
                self.logprobs.append(likeliest)

    def to_json(self) -> dict[str, Any]:
        return {
            "request_id": self.request_id,
            "sample": self.sample,
            "token_ids": self.tokens,
            "text": "".join(self.text) if self.text or not self.tokens else None,
            "finish_reason": self.finish_reason,
            "top_logprobs": self.logprobs,
            "accepted_lengths": self.lengths,
        }


class _Step:
    """What the scheduler had decided for the step whose results it just took."""

    def __init__(self, scheduler, output) -> None:
        scheduled = output.num_scheduled_tokens
        drafted = output.scheduled_spec_decode_tokens
        self.sequences = len(scheduled)
        self.undrafted = sum(not drafted.get(name) for name in scheduled)
        self.decode = bool(scheduled) and all(
            count <= 1 + len(drafted.get(name) or ()) and _has_output(scheduler, name)
            for name, count in scheduled.items()
        )


def _has_output(scheduler, name: str) -> bool:
    request = scheduler.requests.get(name)
    return request is None or request.num_output_tokens > 0


class _Steps:
    """Sees every step where the scheduler takes its results: also with async scheduling, where that is a call later."""

    def __init__(self, llm) -> None:
        self.last: _Step | None = None
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        update = scheduler.update_from_output

        def watched(output, *arguments, **options):
            self.last = _Step(scheduler, output)
            return update(output, *arguments, **options)

        scheduler.update_from_output = watched


def inspect_here() -> None:
    """Let vLLM look at a model's class in its own process: to keep clear of GPUs it starts another for every class.

    Each of those imports all of vLLM again; with a dozen engines that start at once, 20 seconds for each class.
    """
    with contextlib.suppress(ImportError):
        from vllm.model_executor.models import registry

        registry._run_in_subprocess = lambda inspect: inspect()


def run_hooks(spec: engine.EngineSpec) -> None:
    """Call what shall be done before the engine is built."""
    for hook in spec.hooks:
        _find(hook)()
    if spec.backend == engine.SUITE_PAGED:
        from aiterlab.spec_decode import paged_backend

        paged_backend.register()
    if spec.load_format == "dummy" and spec.method == "eagle3":
        # No checkpoint says so, and vLLM would take the target's head, four times as large, for the draft's.
        from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM

        Eagle3LlamaForCausalLM.has_own_lm_head = True


def _arguments(spec: engine.EngineSpec) -> dict[str, Any]:
    arguments = engine.llm_arguments(spec)
    if spec.backend and spec.draft:
        from vllm.config import SpeculativeConfig

        # Later versions choose the draft's backend on their own; earlier ones know one for both.
        if "attention_backend" in SpeculativeConfig.__dataclass_fields__:
            arguments["speculative_config"]["attention_backend"] = arguments["attention_backend"]
    return arguments


def repair(worker) -> tuple[str, ...]:
    """Called in every one of vLLM's workers, which verify: mend its own faults."""
    return repairs.apply()


def attention_backends(worker) -> dict[str, list[str]]:
    """Called in every one of vLLM's workers: the classes of the target's and of the draft's attention backends."""
    runner = worker.model_runner
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    ours = set(getattr(drafter, "_draft_attn_layer_names", None) or getattr(drafter, "attn_layer_names", None) or ())
    found: dict[str, dict[str, None]] = {"target": {}, "draft": {}}
    for name, layer in runner.vllm_config.compilation_config.static_forward_context.items():
        if hasattr(layer, "get_attn_backend"):
            found["draft" if name in ours else "target"][layer.get_attn_backend().__name__] = None
    return {side: list(names) for side, names in found.items()}


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _find(name: str):
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    main()
