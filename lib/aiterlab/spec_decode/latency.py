# SPDX-License-Identifier: Apache-2.0
"""How fast does each engine decode, at every batch and context, and what speed-up is that over vanilla?

Several engines are alive at once and take turns, so a clock that drifts drifts for all. A cell is a batch of requests
with a context. Its prompts are random token ids; prefix caching keeps their keys, so a prompt is computed once per
engine and a round is decode alone. A turn of an engine is two rounds: one without marks, which counts, and one with
(`steps`), which says where a step's time goes on the same host; the cost model predicts the first from the second.

A step that waits for its host takes longer when others use that host, never less, and a host changes its pace between
rounds more than within (1.5 times, on one GPU machine). So rounds are short and many, and a pace, that of a step or of
a part of it, is the 20th percentile over rounds of the round's median. Where noise only adds, a low quantile is nearly
free of it; a minimum would be at the mercy of the clock. The median round and the 80th percentile stand beside it.

Two speeds are told apart. `decode_tok_s` is tokens over time as they came. Requests of a batch end at different steps
when acceptance is a matter of chance, so `steady_tok_s` is that of steps with the whole batch in them: batch x tokens
per step / step. Speed-ups are ratios of the steady one, within a group of engines that were alive together.

With weights that are random, acceptance cannot be real. vLLM then draws it from given rates per position ("synthetic"
rejection sampling): step times are measured, acceptance is assumed, and every row says so.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiterlab.spec_decode import cost
from aiterlab.spec_decode.cost import Components
from aiterlab.spec_decode.engine import SUITE_PAGED, EngineSpec, Request
from aiterlab.spec_decode.steps import PARTS

# Llama-3.1-8B and its EAGLE-3 head in bfloat16. Keys and values: 33 layers x 8 heads x 128 x 2 x 2 bytes.
TARGET_BYTES, DRAFT_BYTES, KV_TOKEN_BYTES = 16_060_522_496, 900_000_000, 135_168
OVERHEAD_BYTES = 3_000_000_000  # a CUDA context, activations of the longest prefill step, graphs
USABLE = 0.95  # share of the GPU's memory that a group of engines may plan with
SLACK_TOKENS = 64  # of a sequence, beside context and output: draft tokens, and blocks that are not full
RANDOM_IDS = (1_000, 3_000)  # ids that any vocabulary of the suite has, special tokens aside
OVER_ROUNDS = {"": 0.2, "_median": 0.5, "_p80": 0.8}  # endings of columns: the pace, and what stands beside it

Cell = tuple[int, int]  # sequences, tokens of context of each
Row = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Engines that are alive together, and the cells that they take turns at."""

    name: str
    specs: tuple[EngineSpec, ...]
    cells: tuple[Cell, ...]


def plan(
    target: str,
    draft: str,
    *,
    memory_bytes: int,
    draft_tokens: Sequence[int] = (1, 2, 3, 4, 5, 6, 7),
    cells: Sequence[Cell] = ((1, 128), (1, 2048), (1, 16384), (1, 32768), (8, 2048), (64, 128)),
    backend: str | None = "FLASH_ATTN",
    backends: Sequence[str] = ("FLASH_ATTN", "TRITON_ATTN", SUITE_PAGED),
    backend_cells: Sequence[Cell] = ((1, 16384), (1, 32768)),
    backend_draft_tokens: int = 4,
    method: str = "eagle3",
) -> tuple[Group, ...]:
    """Divide the study of the 8B shape into groups of engines that fit in the GPU's memory at once.

    Vanilla is in every group, since speed-ups are taken within one. The backends come first, and all engines have the
    same room and the same graphs: vLLM then finds compiled code of this group again in the others, whatever their K.
    Where the backends do not fit at once, they are in several groups of one name, our own backend in each of them.

    Raises:
        ValueError: vanilla, our backend if it is asked for, and one more engine do not fit.
    """

    where = (*cells, *(backend_cells if backends else ()))
    ks = tuple(sorted({*draft_tokens, *((backend_draft_tokens,) if backends else ())}))
    kv_tokens = max(batch * sequence_tokens(context, ks[-1]) for batch, context in where)
    batches = sorted({batch for batch, _ in where})

    def spec(k: int, name: str | None) -> EngineSpec:
        kind = f"{method} K={k}" if k else "vanilla"
        return EngineSpec(
            name=f"{kind} {name}" if name else kind,
            target=target,
            method=method if k else "vanilla",
            draft=draft if k else None,
            draft_tokens=k,
            backend=name,
            dtype="bfloat16",
            max_model_len=max(sequence_tokens(context, ks[-1]) for _, context in where),
            max_num_seqs=max(batches),
            max_num_batched_tokens=8192,
            kv_cache_bytes=(kv_tokens + 1024) * KV_TOKEN_BYTES,
            load_format="dummy",
            synthetic_acceptance=cost.published_rates(method, k) if k else None,
            cudagraph_batch_sizes=tuple(batches),
            cudagraph_draft_tokens=ks,
            prefix_caching=True,
            async_scheduling=None,  # vLLM's choice, as in service
        )

    groups = []
    room = int(memory_bytes * USABLE)
    if backends:
        first, *others = [spec(0, backends[0]), *(spec(backend_draft_tokens, name) for name in backends)]
        ours = [one for one in others[1:] if one.backend == SUITE_PAGED]  # the others are held against it
        divided = _divided([first, *ours], [one for one in others if one not in ours], room)
        if len(backends) > 1 and engine_bytes(*divided[-1], second := spec(0, backends[-1])) <= room:
            divided[-1].append(second)
        groups += [Group("backends", tuple(held), tuple(backend_cells)) for held in divided]
    for held in _divided([spec(0, backend)], [spec(k, backend) for k in draft_tokens], room):
        names = [str(one.draft_tokens) for one in held[1:]]
        groups.append(Group(f"K = {', '.join(names)}", tuple(held), tuple(cells)))
    return tuple(groups)


def engine_bytes(*specs: EngineSpec) -> int:
    """Say what engines of the 8B shape take of a GPU's memory together, about."""
    return sum(
        TARGET_BYTES + (DRAFT_BYTES if spec.draft else 0) + spec.kv_cache_bytes + OVERHEAD_BYTES for spec in specs
    )


def _divided(always: list[EngineSpec], rest: list[EngineSpec], room: int) -> list[list[EngineSpec]]:
    """Divide `rest` into as few parts as fit in the room beside `always`, in order."""
    parts: list[list[EngineSpec]] = []
    for one in rest:
        if not parts or engine_bytes(*parts[-1], one) > room:
            parts.append([*always])
        parts[-1].append(one)
        if (needed := engine_bytes(*parts[-1])) > room:
            names = [*(spec.name for spec in always), one.name]
            raise ValueError(
                f"{', '.join(names[:-1])} and {names[-1]} need {needed / 2**30:.0f} GiB, "
                f"{room / 2**30:.0f} GiB may be used: leave out the largest cells"
            )
    return parts


def round_tokens(draft_tokens: int) -> int:
    """Say how long the answers of a round are: short, yet eight steps even where every draft is accepted."""
    return 8 * max(3, draft_tokens + 1)


def sequence_tokens(context: int, draft_tokens: int) -> int:
    """Say what room a sequence takes in a round."""
    return context + round_tokens(draft_tokens) + SLACK_TOKENS


def requests(cell: Cell, seed: int = 0) -> tuple[Request, ...]:
    """Make a cell's prompts: random ids, no two with a common beginning."""
    batch, context = cell
    made = []
    for i in range(batch):
        generator = random.Random(f"{seed} {i} {context}")
        tokens = (RANDOM_IDS[0] + i, *(generator.randrange(*RANDOM_IDS) for _ in range(context - 1)))
        made.append(Request(id=f"{i}", task="random ids", token_ids=tokens))
    return tuple(made)


def measure(
    engines: Mapping[str, Any],
    cells: Iterable[Cell],
    *,
    rounds: int = 18,
    group: str = "",
    prompts_of: Callable[[Cell], Sequence[Request]] = requests,
    temperature: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Let living engines take turns at every cell; one row for each engine, cell and round.

    Args:
        engines: name to `Engine`; ready, or getting ready
        rounds: without marks, and as many with; before them each engine has one that is not counted
        group: name of this set of engines, for the rows
        prompts_of: makes a cell's prompts, the same in every round; random ids if not given
        progress: called with the number of cells done and of all

    Raises:
        EngineError: an engine failed.
    """
    cells, rows = list(cells), []
    facts = {name: engine.wait_ready() for name, engine in engines.items()}
    for done, cell in enumerate(cells):
        able = {}
        for name, engine in engines.items():
            if reason := refusal(engine.spec, facts[name].kv_cache_tokens, cell):
                rows.append(_row(group, engine.spec, cell, reason=reason))
            else:
                able[name] = engine
        prompts = prompts_of(cell)
        # No seed for sampling: a generator for each request would cost every step time, and repeat the same draws.
        options = {"temperature": temperature, "ignore_eos": True}
        for engine in able.values():
            engine.generate(prompts, max_tokens=32, **options)  # computes the prompts, and compiles what is missing
        for turn in range(rounds):
            order = list(able.values())
            shift = turn % max(1, len(order))
            for engine, marked in itertools.product(order[shift:] + order[:shift], (False, True)):
                tokens = round_tokens(engine.spec.draft_tokens)
                found = engine.generate(prompts, max_tokens=tokens, breakdown=marked, **options)
                rows.append(_measured(group, engine.spec, cell, turn, marked, found))
        if progress:
            progress(done + 1, len(cells))
    return rows


def refusal(spec: EngineSpec, kv_cache_tokens: int, cell: Cell) -> str | None:
    """Say why an engine cannot take a cell, if it cannot."""
    batch, context = cell
    length = sequence_tokens(context, spec.draft_tokens)
    if batch > spec.max_num_seqs:
        return f"{batch} sequences, the engine takes {spec.max_num_seqs}"
    if length > spec.max_model_len:
        return f"{length} tokens a sequence, the engine takes {spec.max_model_len}"
    if batch * length > kv_cache_tokens:
        return f"{batch * length} tokens, the KV cache holds {kv_cache_tokens}"
    return None


def summary(rows: Iterable[Row]) -> list[Row]:
    """One row for each engine and cell: its pace, the speed-up over vanilla's, and beside them the median round's.

    Vanilla is that of the same group, with the same backend where there is one. Parts are of the rounds with marks.
    What a step gives is the mean of all rounds, or exactly what was assumed: the luck of a draw is no speed.
    """
    collected: dict[tuple, list[Row]] = {}
    for row in rows:
        collected.setdefault((row["group"], row["engine"], row["batch"], row["context"]), []).append(row)
    table = []
    for members in collected.values():
        plain, marked = ([row for row in members if row["step_ms"] and row["marked"] == kind] for kind in (False, True))
        rates = members[0]["assumed_rates"] or _mean_rates(plain)
        per_step = cost.expected_tokens(rates) if rates else _quantile((row["tokens_per_step"] for row in plain), 0.5)
        steps = _over_rounds(plain, "step_ms")
        parts = {key: time for name in ("step_ms", *PARTS) for key, time in _over_rounds(marked, name).items()}
        speeds = [_tok_s(members[0]["batch"], per_step, step) for step in steps.values()]
        table.append(
            {name: members[0][name] for name in (*_WHO, "acceptance", "assumed_rates", "reason")}
            | steps
            | dict(zip(("steady_tok_s", "steady_median_tok_s", "steady_p20_tok_s"), speeds, strict=True))
            | {"tokens_per_step": per_step, "rates": rates, "drawn_rates": _mean_rates(plain), "rounds": len(plain)}
            | {f"marked_{key}": time for key, time in parts.items()}
        )
    for row in table:
        base = _vanilla(row, table) or dict.fromkeys(row)
        for name, speed in (("speed_up", "steady_tok_s"), ("median_speed_up", "steady_median_tok_s")):
            row[name] = row[speed] / base[speed] if row[speed] and base[speed] else None
    return table


def compare(table: Iterable[Row]) -> list[Row]:
    """Hold the cost model against `summary`'s rows: for each backend, method and cell, one row for each K."""
    collected: dict[tuple, list[Row]] = {}
    for row in table:
        if row["step_ms"] is not None:
            collected.setdefault((row["backend"], row["batch"], row["context"]), []).append(row)
    compared = []
    for (backend, batch, context), members in collected.items():
        for method in sorted({row["method"] for row in members if row["K"]}):
            # A K that several groups have had is taken from the first; vanilla is the median of all of them.
            drafted = {row["K"]: row for row in reversed(members) if row["method"] == method}
            measured = {k: parts for k, row in drafted.items() if (parts := _components([row]))}
            vanilla = _components([row for row in members if not row["K"]])
            speed = {k: row["speed_up"] for k, row in drafted.items() if k in measured and row["speed_up"]}
            if vanilla is None or not speed:
                continue
            rates = {k: drafted[k]["rates"] for k in speed}
            for row in cost.compare({0: vanilla} | measured, rates, {0: 1.0} | speed):
                where = {"backend": backend, "method": method, "batch": batch, "context": context}
                beside = {name: drafted[row["K"]][name] for name in ("acceptance", "rounds", "median_speed_up")}
                compared.append(where | beside | row)
    return compared


def best_draft_tokens(table: Iterable[Row], *, by: str = "speed_up") -> dict[tuple, int | None]:
    """Name the fastest K of each method, backend, batch and context; 0 where vanilla is faster."""
    found: dict[tuple, dict[int, float]] = {}
    for row in table:
        if row["K"] and row[by]:
            found.setdefault((row["method"], row["backend"], row["batch"], row["context"]), {})[row["K"]] = row[by]
    return {key: cost.best(speed_ups) for key, speed_ups in found.items()}


def against_backends(table: Iterable[Row], ours: str = SUITE_PAGED) -> list[Row]:
    """Divide our backend's tokens per second by each other backend's, at the same method, K and cell of a group."""
    rows = [row for row in table if row["step_ms"] is not None]
    same = ("group", "method", "K", "batch", "context")
    ratios = []
    for own, other in itertools.product(rows, rows):
        if own["backend"] != ours or other["backend"] == ours or any(own[name] != other[name] for name in same):
            continue
        ratios.append(
            {name: own[name] for name in same}
            | {"backend": ours, "other": other["backend"], "acceptance": own["acceptance"]}
            | {"ours_tok_s": own["steady_tok_s"], "other_tok_s": other["steady_tok_s"]}
            | {"ratio": own["steady_tok_s"] / other["steady_tok_s"]}
            | {"ours_step_ms": own["step_ms"], "other_step_ms": other["step_ms"]}
        )
    return ratios


_WHO = ("group", "engine", "method", "K", "backend", "batch", "context")
_RUN = ("round", "marked", "tokens", "wall_s", "prefill_s", "decode_tok_s", "steady_tok_s")
_STEP = ("step_ms", "step_p20_ms", "step_p80_ms", "tokens_per_step", "rates", "steps", *PARTS)


def _row(group: str, spec: EngineSpec, cell: Cell, *, reason: str | None = None, **values) -> Row:
    """A row of which only what is given is known."""
    who = (group, spec.name, spec.method, spec.draft_tokens, spec.backend, *cell)
    assumed = spec.synthetic_acceptance
    return (
        dict(zip(_WHO, who, strict=True))
        | {"acceptance": ("assumed" if assumed else "measured") if spec.draft_tokens else None}
        | {"assumed_rates": tuple(assumed) if assumed else None, "reason": reason}
        | dict.fromkeys((*_RUN, *_STEP))
        | values
    )


def _measured(group: str, spec: EngineSpec, cell: Cell, turn: int, marked: bool, found) -> Row:
    batch = cell[0]
    tokens = found.tokens
    steps = [step for step, sequences in zip(found.steps_ms, found.steps_sequences, strict=True) if sequences == batch]
    # Over all steps: where n-gram lookup finds nothing, a step has no draft and gives one token.
    drafts = found.counters.drafts + found.undrafted
    rates = tuple(accepted / drafts for accepted in found.counters.accepted_per_position) if drafts else None
    per_step = (1 + sum(rates) if rates is not None else None) if spec.draft_tokens else 1.0
    step = _quantile(steps, 0.5)
    parts = found.components or {}
    return _row(
        group,
        spec,
        cell,
        round=turn,
        marked=marked,
        tokens=tokens,
        wall_s=found.wall_s,
        prefill_s=found.prefill_s,
        decode_tok_s=(tokens - batch) / found.decode_s if found.decode_s else None,  # a prompt gives the first one
        steady_tok_s=_tok_s(batch, per_step, step),
        step_ms=step,
        step_p20_ms=_quantile(steps, 0.2),
        step_p80_ms=_quantile(steps, 0.8),
        tokens_per_step=per_step,
        rates=rates if spec.draft_tokens else None,
        steps=len(steps),
        **{name: parts.get(name) for name in PARTS},
    )


def _components(rows: Sequence[Row]) -> Components | None:
    """Parts of a step at their pace, the median over rows; None where no row has them."""
    known = [row for row in rows if row["marked_step_ms"] is not None and row["marked_verify_ms"] is not None]
    return Components(*(_quantile((row[f"marked_{name}"] for row in known), 0.5) for name in PARTS)) if known else None


def _vanilla(row: Row, table: Sequence[Row]) -> Row | None:
    same = [
        other
        for other in table
        if not other["K"] and all(other[name] == row[name] for name in ("group", "batch", "context"))
    ]
    return next((other for other in same if other["backend"] == row["backend"]), same[0] if same else None)


def _over_rounds(rows: Sequence[Row], name: str) -> Row:
    """A time's pace, and beside it the median and the 80th percentile of rounds."""
    stem = name.removesuffix("_ms")
    return {f"{stem}{end}_ms": _quantile((row[name] for row in rows), share) for end, share in OVER_ROUNDS.items()}


def _tok_s(batch: int, per_step: float | None, step_ms: float | None) -> float | None:
    return batch * per_step / step_ms * 1e3 if per_step and step_ms else None


def _mean_rates(rows: Sequence[Row]) -> tuple[float, ...] | None:
    known = [row["rates"] for row in rows if row["rates"]]
    return tuple(statistics.fmean(column) for column in zip(*known, strict=True)) if known else None


def _quantile(values: Iterable[float | None], share: float) -> float | None:
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    place = share * (len(known) - 1)
    low = int(place)
    high = min(low + 1, len(known) - 1)
    return known[low] + (known[high] - known[low]) * (place - low)
