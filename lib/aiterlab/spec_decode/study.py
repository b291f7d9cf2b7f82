# SPDX-License-Identifier: Apache-2.0
"""Run the engines of one investigation side by side, and lose nothing of what they said.

Every answer is written to a journal beside the record as soon as it is there: a study that is stopped, or whose engine
dies, leaves what it had found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import torch

from aiterlab import host, paths, records
from aiterlab.progress import Progress
from aiterlab.spec_decode import (
    acceptance,
    accuracy,
    backends,
    engine,
    latency,
    lossless,
    models,
    parallel,
    processes,
    prompts,
    sabotage,
)
from aiterlab.spec_decode.backends import Choice, Used
from aiterlab.spec_decode.engine import Engine, EngineError, EngineSpec, Generation, Output, Request
from aiterlab.spec_decode.serving import Server, Serving

JOURNAL_NAME = "journal.jsonl"
VANILLA = "vanilla"
MODELS, BACKENDS = "models", "backends"  # groups of engines: those that chose their backend, those told one
AS_RELEASED = "vLLM as released"
OWN_FILE = "file:"  # before the name of a file of prompts, in place of a task
SHAPE = "8b:"  # before a cell that is timed on the shape of Llama-3.1-8B
SHOTS = (0, 5)  # solved examples before a question of lm-eval
LONG = 16_384  # tokens of context from which backends are compared on the shape
FEW = 4  # requests for each rank
BESIDE_TOKENS = 64  # after a near-tie nothing can be compared, so longer answers would show less
CLIENTS = 4  # of the server, at a time
LOGPROBS = 10  # of vanilla: from these the gap of a near-tie is read
LOGPROBS_SAMPLED = 20
SAMPLED_CONTEXT = 64  # tokens of a prompt that samples continue: each computes it anew, and a verifier sees none of it
MAX_PROMPT_TOKENS = 512
OTHER_SEED = 1_000_003  # two samples with the same noise would agree by construction
Asked = Mapping[str, Sequence[Request]]  # by task


def name(method: str, draft_tokens: int, backend: str = "") -> str:
    """Name an engine as tables and figures do."""
    return " ".join(filter(None, (VANILLA if not draft_tokens else f"{method} K={draft_tokens}", backend)))


def pairs(named: Mapping[str, str] | None = None) -> dict[str, models.Pair]:
    """Return who speculates for whom, by method: the models that ship, or those that are named.

    Args:
        named: folder or Hub id of the `target`, and of the draft of each method; empty for those that ship.

    Raises:
        ModelError: a folder is not there, or a draft does not fit.
    """
    if not named:
        return models.bundled()
    drafts = {method: _typed(draft) for method, draft in named.items() if method != "target"}
    if "target" not in named:
        raise models.ModelError(f"models={dict(named)}: name the target too, or none to use the models that ship")
    target = _typed(named["target"])
    found = {method: models.Pair(method, target, drafts.get(method)) for method in (VANILLA, "ngram", *drafts)}
    for pair in found.values():
        models.check_fit(pair.target, pair.draft, pair.method)
    return found


def _typed(model: str) -> str:
    """Make a folder absolute where it was typed; a Hub id stays."""
    folder = paths.as_typed(model)
    return str(folder) if folder.is_dir() or model.startswith((".", "/", "~")) else model


def last_drafted(methods: Sequence[str]) -> str:
    """Name the last method that has a draft model: it is put to the tests that take only one.

    Raises:
        ValueError: there is none.
    """
    drafted = [method for method in methods if method not in (VANILLA, "ngram")]
    if not drafted:
        raise ValueError(f"methods={list(methods)}: name eagle or eagle3 among them")
    return drafted[-1]


def largest(draft_tokens: Sequence[int]) -> int:
    """Return the largest K.

    Raises:
        ValueError: there is none, or one that drafts nothing.
    """
    if not draft_tokens or min(draft_tokens) < 1:
        raise ValueError(f"draft_tokens={list(draft_tokens)}: name one K or more, each at least 1, such as [2, 4]")
    return max(draft_tokens)


def device() -> str:
    """Name torch's device of the engines."""
    return "cuda" if processes.has_gpu() else "cpu"


def spec(pair: models.Pair, draft_tokens: int = 0, backend: str = "", **options) -> EngineSpec:
    """Describe the engine of a pair with K draft tokens; `options` are further fields of `EngineSpec`."""
    draft = str(pair.draft) if pair.draft and draft_tokens else None
    method = pair.method if draft_tokens else VANILLA
    fields = {"name": name(method, draft_tokens, backend), "target": str(pair.target), "method": method, "draft": draft}
    return EngineSpec(**fields | {"draft_tokens": draft_tokens, "backend": backend or None} | options)


def specs(found: Mapping[str, models.Pair], methods: Iterable[str], draft_tokens: Sequence[int], **options):
    """Describe vanilla and one engine for each method and K; n-gram lookup has one, with the largest K."""
    asked = [
        (method, k) for method in methods for k in (draft_tokens if method != "ngram" else [largest(draft_tokens)])
    ]
    return [spec(found[VANILLA], **options), *(spec(found[method], k, **options) for method, k in asked)]


def options(cells: Sequence[str], draft_tokens: int, output_tokens: int, seed: int) -> dict:
    """Return what all engines of the models have in common: room for the largest cell, and what the machine needs.

    Args:
        draft_tokens: the largest K.
        output_tokens: of the longest answer.

    Raises:
        ValueError: a cell cannot be read, or is of the shape, on a machine without a GPU.
    """
    largest = cells_of(cells)
    if (shaped := cells_of(cells, SHAPE)) and device() == "cpu":
        raise ValueError(
            f"cells={list(cells)}: {len(shaped)} of the shape, which needs a GPU; leave out those of {SHAPE}"
        )
    batch = max([8, *(batch for batch, _ in largest)])
    answer = MAX_PROMPT_TOKENS + output_tokens + latency.SLACK_TOKENS
    length = max([1024, answer, *(latency.sequence_tokens(context, draft_tokens) for _, context in largest)])
    # vLLM sets the generator of a seeded prompt back when it computes it in two parts; those of a CPU cannot be.
    unparted = {"max_num_batched_tokens": batch * MAX_PROMPT_TOKENS} if device() == "cpu" else {}
    return unparted | {
        "max_num_seqs": batch,
        "max_model_len": length,
        "cudagraph_batch_sizes": tuple(sorted({1, 4, 8, batch} | {batch for batch, _ in largest})),
        "async_scheduling": None,  # vLLM's choice, as in service
        "seed": seed,
    }


def asked(tasks: Sequence[str], count: int, target: Path | str, seed: int) -> dict[str, list[Request]]:
    """Return requests by task: held-out prompts, or those of a file where a task is `file:PATH`."""
    found = {}
    for task in tasks:
        own = paths.as_typed(task.removeprefix(OWN_FILE)) if task.startswith(OWN_FILE) else None
        called = own.name if own else task
        found[called] = prompts.load(
            called, count, path=own, tokenizer=target, max_prompt_tokens=MAX_PROMPT_TOKENS, seed=seed
        )
    return found


def cells_of(cells: Iterable[str], prefix: str = "") -> list[latency.Cell]:
    """Read cells such as 4x128 (sequences x context); those of the shape carry `8b:`.

    Raises:
        ValueError: one that cannot be read.
    """
    found = []
    for one in cells:
        shape, _, cell = one.rpartition(":")
        batch, cross, context = cell.partition("x")
        if shape not in ("", SHAPE.rstrip(":")) or not cross or not batch.isdecimal() or not context.isdecimal():
            raise ValueError(f"{one!r}: a cell is sequences x context, such as 4x128, or {SHAPE}1x16384 for the shape")
        if bool(shape) == bool(prefix):
            found.append((int(batch), int(context)))
    return found


def trials(accuracy_tasks: Mapping[str, int]) -> list[accuracy.Trial]:
    """Ask each task of lm-eval zero-shot and few-shot, so many questions."""
    return [accuracy.Trial(task, shots, limit) for task, limit in accuracy_tasks.items() for shots in SHOTS if limit]


class Study:
    """Living engines and everything that they were asked.

    Attributes:
        engines: alive, by name
        facts, accepted, greedy, differences, sampled, broken, served, ranks: rows so far, in order
        timed: rows of `latency.measure`
        scores: of `accuracy.evaluate`
    """

    def __init__(self, stem: str, seed: int = 0) -> None:
        """Begin a study whose journal and logs lie beside the record of the notebook `stem`."""
        self.folder, self.seed = paths.output_dir(stem), seed
        self.engines: dict[str, Engine] = {}
        self.facts, self.accepted, self.greedy, self.differences, self.sampled = [], [], [], [], []
        self.broken, self.served, self.ranks, self.timed, self.scores = [], [], [], [], []
        self.answers: dict[tuple[str, str], Generation] = {}  # greedy, by engine and task
        self._alive, self._folders = contextlib.ExitStack(), contextlib.ExitStack()
        (self.folder / JOURNAL_NAME).write_text("")

    def start(self, wanted: Sequence[EngineSpec], told: str = "engines up", group: str = MODELS) -> None:
        """Start engines, several at a time, beside those that are alive.

        Raises:
            EngineError: one did not come up; its line says why.
        """
        living = engine.alive(wanted, self.folder / "engines", progress=Progress(what=told))
        for key, one in self._alive.enter_context(living).items():
            self.engines[key] = one
            self._note(self.facts, "facts", {"group": group} | _described(one))

    def stop(self) -> None:
        """End all engines."""
        self.engines.clear()
        self._alive.close()

    def decode(
        self, asked: Asked, max_tokens: int, temperatures: Sequence[float] = (0.0,), only: Iterable[str] | None = None,
        group: str = MODELS,
    ) -> None:  # fmt: skip
        """Let engines answer every task: acceptance at every temperature, and at 0 the tokens that `losses` compares.

        Args:
            only: names of engines; all that are alive if None.
            group: MODELS or BACKENDS, for the rows.
        """
        chosen = [self.engines[key] for key in (self.engines if only is None else only)]

        def answers(one: Engine) -> list[tuple[Engine, str, float, Generation]]:  # an engine does one thing at a time
            vanilla, made = not one.spec.draft_tokens, []
            for task, temperature in itertools.product(asked, (0.0,) if vanilla else temperatures):
                greedy = {"logprobs": LOGPROBS if vanilla else 0}
                how = {"temperature": temperature, "seed": self.seed} if temperature else greedy
                made.append((one, task, temperature, one.generate(asked[task], max_tokens=max_tokens, **how)))
            return made

        answered = _told(answers, chosen, "engines answered")
        for one, task, temperature, made in itertools.chain.from_iterable(answered):
            if not temperature:
                self.answers[one.spec.name, task] = made
            if one.spec.draft_tokens:
                found = acceptance.measure(
                    made, method=one.spec.method, draft_tokens=one.spec.draft_tokens, task=task,
                    temperature=temperature, seed=self.seed,
                )  # fmt: skip
                extra = {"group": group, "engine": one.spec.name, "backend": one.spec.backend}
                extra |= {"undrafted": made.undrafted, "output_tokens": max_tokens}
                self._note(self.accepted, "accepted", extra | found.row())

    def losses(
        self, base: str = VANILLA, only: Iterable[str] | None = None, alone: str | None = None
    ) -> list[lossless.GreedyComparison]:
        """Hold every engine's greedy answers against those of `base`, task by task; returns the comparisons.

        Args:
            only: names of engines; all that have answered if None.
            alone: the target without a draft on the backend of these engines, where that is not the one of `base`.
        """
        found = []
        for (key, task), made in list(self.answers.items()):  # other backends may be answering meanwhile
            if key != base and (only is None or key in only):
                shift = lossless.largest_shift(self.answers[base, task], self.answers[alone, task]) if alone else 0.0
                found.append(self._greedy(_part(self.answers[base, task], made), made, shift=shift))
                about = {"task": task, "base": base}
                self._note(self.greedy, "greedy", about | found[-1].row())
                for one in found[-1].differences:
                    self._note(self.differences, "difference", about | {"engine": key} | dataclasses.asdict(one))
        return found

    def _greedy(self, vanilla: Generation, other, **how) -> lossless.GreedyComparison:
        return lossless.compare_greedy(vanilla, other, dtype=self._dtype, **how)

    @property
    def _dtype(self) -> str:
        return self.engines[VANILLA].wait_ready().dtype

    def sample(self, requests: Sequence[Request], samples: int, tokens: int, only: Iterable[str]) -> None:
        """Test at temperature 1 whether engines draw short continuations from vanilla's distribution.

        Args:
            requests: of each its first tokens, `SAMPLED_CONTEXT` at most, are continued.
            tokens: of a continuation.
            only: names of the engines that are held against vanilla's.
        """
        begun = zip(requests, self._tokens(requests), strict=True)
        short = [dataclasses.replace(one, text=None, token_ids=ids[:SAMPLED_CONTEXT]) for one, ids in begun]
        self._sampling = {"requests": short, "max_tokens": tokens, "samples": samples, "ignore_eos": True}
        self._drawn, *others = _told(self._draw, [self.engines[key] for key in (VANILLA, *only)], "samples drawn")
        for other in others:
            self._note(self.sampled, "sampled", lossless.compare_sampled(self._drawn, other).row())

    def _tokens(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        encode = prompts.tokenizer_of(self.engines[VANILLA].spec.target)
        return [tuple(one.token_ids or encode(one.text)) for one in requests]

    def _draw(self, one: Engine) -> Generation:
        if one.spec.draft_tokens:  # with vanilla's seed their first tokens would agree by construction
            return one.generate(temperature=1.0, seed=self.seed + OTHER_SEED, **self._sampling)
        return one.generate(temperature=1.0, seed=self.seed, logprobs=LOGPROBS_SAMPLED, **self._sampling)

    def time(self, wanted: Sequence[latency.Cell], rounds: int, texts: Sequence[Request]) -> None:
        """Let all living engines take turns at each (sequences, context), on contexts cut from `texts`.

        What a draft is accepted for, and so a speed-up, depends on the text: these are the prompts that acceptance was
        measured on, one after the other where a context is longer than a prompt.
        """
        tokens = list(itertools.chain.from_iterable(self._tokens(texts)))

        def cut(cell: latency.Cell) -> list[Request]:
            batch, context = cell
            endless = itertools.cycle(tokens)
            return [Request(f"{i}", "timed", token_ids=tuple(itertools.islice(endless, context))) for i in range(batch)]

        self._measure(self.engines, wanted, rounds, MODELS, cut)

    def time_shape(self, wanted: Sequence[latency.Cell], draft_tokens: Sequence[int], rounds: int) -> None:
        """Time the shape of Llama-3.1-8B with dummy weights: every K, and at long contexts every backend.

        Acceptance is what was published for that model, drawn by vLLM's `synthetic` rejection sampler.
        """
        if not wanted:
            return
        scratch = self._scratch()
        target = models.llama_3_1_8b_shape(scratch / "target")
        draft = models.eagle3_head_shape(scratch / "eagle3")
        names = tuple(one.backend for one in backends.here() if one.available.holds and one.backend)
        long = [cell for cell in wanted if cell[1] >= LONG]
        every_k = [cell for cell in wanted if cell not in long[:-1]]  # of the long contexts the last says enough
        groups = latency.plan(
            str(target), str(draft), memory_bytes=torch.cuda.get_device_properties(0).total_memory,
            draft_tokens=draft_tokens, cells=every_k, backend=names[0], backends=tuple(dict.fromkeys(names)),
            backend_cells=long,
        )  # fmt: skip
        for number, group in enumerate(groups, start=1):
            told = Progress(what=f"engines up ({group.name})")
            logs = self.folder / "engines" / f"{number} {group.name}"
            with engine.alive(group.specs, logs, progress=told) as engines:
                for one in engines.values():
                    self._note(self.facts, "facts", {"group": group.name} | _described(one))
                self._measure(engines, group.cells, rounds, group.name)

    def beside(
        self, what: Iterable[str], pair: models.Pair, draft_tokens: int, asked: Asked, max_tokens: int,
        trials: Sequence[accuracy.Trial], options: Mapping,
    ) -> pd.DataFrame:  # fmt: skip
        """Do what needs no quiet, several at once; returns the comparison of backends.

        Args:
            what: of sabotage, backends, serve, "tensor N", "data N" (so many ranks).
            asked: the first task alone is asked, and what the backends answer is compared in all of them.

        Raises:
            EngineError, ValueError: of the first that failed, after the others have ended.
        """
        task, requests = next(iter(asked.items()))
        few, max_tokens = {task: requests[:FEW]}, min(max_tokens, BESIDE_TOKENS)
        wanted = spec(pair, draft_tokens, **options)
        known = {
            "sabotage": lambda: self._sabotage(pair, draft_tokens, {task: requests}, max_tokens, options),
            "backends": lambda: self._backends(pair, draft_tokens, asked, max_tokens, trials, options),
            "serve": lambda: self._serve(wanted, {task: requests}, max_tokens),
        }
        jobs = {}
        for name_ in what:
            kind, _, ranks = name_.partition(" ")
            if kind in ("tensor", "data") and ranks.isdecimal():
                jobs[name_] = functools.partial(self._spread, wanted, few, max_tokens, kind, int(ranks))
            elif name_ in known:
                jobs[name_] = known[name_]
            else:
                raise ValueError(f"{name_!r}: there are {', '.join(known)}, tensor N and data N")
        found = dict(zip(jobs, _told(lambda job: job(), list(jobs.values()), "studies beside done"), strict=True))
        return found.get("backends", pd.DataFrame())

    def score(self, asked: Sequence[accuracy.Trial], only: Iterable[str]) -> None:
        """Ask lm-eval's tasks of living engines."""
        chosen = [self.engines[key] for key in only] if asked else []
        for found in _told(lambda one: accuracy.evaluate(one, asked, seed=self.seed), chosen, "engines scored"):
            self.scores += found
            for one in found:
                self._note([], "score", dataclasses.asdict(one))

    def _measure(self, engines, wanted, rounds: int, group: str, prompts_of=latency.requests) -> None:
        began, progress = time.monotonic(), Progress(what="cells timed")
        rows = latency.measure(
            engines, wanted, rounds=rounds, group=group, prompts_of=prompts_of,
            progress=lambda done, total: progress(done, total, time.monotonic() - began),
        )  # fmt: skip
        for row in rows:
            self._note(self.timed, "timed", row)

    def _sabotage(self, pair: models.Pair, draft_tokens: int, asked: Asked, max_tokens: int, options: Mapping) -> None:
        """Break the draft, then the verifier: outputs must stay in the first case, and be caught in the second.

        Where this vLLM had to be mended (`repairs`), it is also run as released: its samples must be caught.
        """
        noise = sabotage.corrupt_draft(pair.draft, self._scratch() / "corrupted draft")
        hook = f"{sabotage.__name__}:{sabotage.break_verifier.__name__}"
        broken = {
            "corrupted draft": spec(dataclasses.replace(pair, draft=noise), draft_tokens, **options),
            "broken verifier": spec(pair, draft_tokens, **dict(options) | {"hooks": (hook,)}),
        }
        if any(row["repairs"] for row in self.facts):
            broken[AS_RELEASED] = spec(pair, draft_tokens, **dict(options) | {"repairs": False})
        wanted = [dataclasses.replace(one, name=key) for key, one in broken.items()]
        with engine.alive(wanted, self.folder / "engines") as engines:
            for key, one in engines.items():
                if key == AS_RELEASED:
                    made = self._draw(one)
                    found = lossless.compare_sampled(self._drawn, made)
                    self._broke("samples", made, found, right=False if found.verified else None)
                    continue
                for task, requests in asked.items():
                    made = one.generate(requests, max_tokens=max_tokens)
                    found = self._greedy(_part(self.answers[VANILLA, task], made), made)
                    self._broke(task, made, found, right=key == "corrupted draft")

    def _broke(self, task: str, made: Generation, found, *, right: bool | None) -> None:
        """Keep what became of a broken engine, and whether the check found as it should; None: it could not tell."""
        about = {"task": task, "acceptance_length": made.counters.acceptance_length}
        as_it_should = None if right is None else found.ok == right
        self._note(self.broken, "broken", about | found.row() | {"as_it_should": as_it_should})

    def _backends(
        self, pair, draft_tokens: int, asked: Asked, max_tokens: int, trials, options: Mapping
    ) -> pd.DataFrame:
        """Let the target alone, and with its draft, answer through each explicit backend that is available."""
        choices = backends.here()
        able = [choice for choice in choices if choice.available.holds]
        found = _told(
            lambda choice: self._used(choice, pair, draft_tokens, asked, max_tokens, trials, options), able, "backends"
        )
        return backends.table(choices, dict(zip((choice.label for choice in able), found, strict=True)))

    def _used(self, choice: Choice, pair, draft_tokens: int, asked: Asked, max_tokens: int, trials, options) -> Used:
        common = {**options, "backend": choice.backend or "", "environment": choice.environment}
        wanted = [spec(pair, k, **common) for k in (0, draft_tokens)]
        wanted = [dataclasses.replace(one, name=name(one.method, one.draft_tokens, choice.label)) for one in wanted]
        names = [one.name for one in wanted]
        try:
            self.start(wanted, f"engines up with {choice.label}", BACKENDS)
        except EngineError as error:
            return Used(failure=str(error))
        self.decode(asked, max_tokens, only=names, group=BACKENDS)
        self.score(trials, names)
        # Within a backend, and against the engines that chose theirs: two questions.
        found = [*self.losses(names[0], names[1:]), *self.losses(VANILLA, names[1:], alone=names[0])]
        agrees = all(one.ok for one in found)
        facts = self.engines[names[1]].wait_ready()
        return Used(facts.target_backends, facts.draft_backends, agrees)

    def _serve(self, wanted: EngineSpec, asked: Asked, max_tokens: int) -> None:
        """Put an engine behind `vllm serve`, stream through the OpenAI client, compare with offline vanilla."""
        with Server(wanted, self.folder / "engines") as server:
            ready_s = server.wait_ready()
            for task, requests in asked.items():
                made = server.generate(requests, max_tokens=max_tokens, concurrency=CLIENTS)
                found = self._greedy(_part(self.answers[VANILLA, task], made), made)
                row = {"engine": wanted.name, "task": task, "ready_s": ready_s} | _served(made)
                self._note(self.served, "served", row | {"ok": found.ok, "verdict": found.verdict})

    def _spread(self, wanted: EngineSpec, asked: Asked, max_tokens: int, kind: str, ranks: int) -> None:
        """Run tensor or data parallel, on so many ranks, and compare each with one rank."""
        one = dataclasses.replace(wanted, name=f"{wanted.name}, {kind} parallel {ranks}")
        for task, requests in asked.items():
            try:
                made = parallel.run(
                    one, requests, max_tokens=max_tokens, log_dir=self.folder / "engines", **{kind: ranks}
                )
            except EngineError as error:  # such as fewer GPUs than ranks: a row that says so
                self._note(self.ranks, "ranks", {"engine": one.name, "task": task, "ok": None, "verdict": str(error)})
                continue
            held = parallel.compare(_part(self.answers[VANILLA, task], made[0]), made, dtype=self._dtype)
            for row in held.to_dict("records"):
                self._note(self.ranks, "ranks", {"task": task} | row)

    def _scratch(self) -> Path:
        """Make a folder that goes with the study."""
        return Path(self._folders.enter_context(tempfile.TemporaryDirectory(prefix="aiterlab-")))

    def _note(self, rows: list[dict], kind: str, row: dict) -> None:
        rows.append(row)
        records.append_line(self.folder / JOURNAL_NAME, {"kind": kind} | row)


def _described(one: Engine) -> dict:
    about = {field: getattr(one.spec, field) for field in ("name", "method", "draft_tokens", "backend")}
    return about | dataclasses.asdict(one.wait_ready())


def _part(made: Generation, other: Generation | Serving | parallel.Ranks) -> Generation:
    """The answers to the requests that `other` answered, as far as it was asked to go."""
    kept = {one.request_id for one in other.outputs}
    length = max((len(one.token_ids) for one in other.outputs), default=0)
    return dataclasses.replace(made, outputs=tuple(_cut(one, length) for one in made.outputs if one.request_id in kept))


def _cut(one: Output, length: int) -> Output:
    logprobs = one.top_logprobs and one.top_logprobs[:length]
    return dataclasses.replace(one, token_ids=one.token_ids[:length], top_logprobs=logprobs)


def _served(made: Serving) -> dict:
    known = [value for value in made.tpot_ms if value is not None]
    return {
        "tokens_per_s": made.tokens_per_s,
        "concurrency": made.concurrency,
        "ttft_ms": pd.Series(made.ttft_ms).median(),
        "tpot_ms": pd.Series(known).median() if known else None,
        "acceptance_length": made.counters.acceptance_length,
    }


def _told(work: Callable, jobs: Sequence, what: str) -> Iterator:
    """Do jobs on several engines at once, as many as there are cores; answers come in the order of the jobs."""
    began, progress = time.monotonic(), Progress(what=what)
    with ThreadPoolExecutor(host.usable_cores()) as threads:
        for done, answer in enumerate(threads.map(work, jobs), 1):
            progress(done, len(jobs), time.monotonic() - began)
            yield answer
