# SPDX-License-Identifier: Apache-2.0
"""The study's plan, turns and tables, on engines that only claim to decode."""

import statistics
from types import SimpleNamespace
from typing import ClassVar

import pytest

from aiterlab.spec_decode import cost, latency
from aiterlab.spec_decode.engine import EngineSpec, llm_arguments
from aiterlab.spec_decode.metrics import Counters

GIB = 2**30
H200 = 139 * GIB


class PretendEngine:
    """An engine whose steps take what the cost model says, and which notes who was asked when."""

    undrafted = 0
    waits_ms = 0.0  # for its host, in every step
    asked: ClassVar[list[tuple[str, bool]]] = []

    def __init__(self, spec, kv_cache_tokens=40_000, factor=1.0):
        self.spec, self.kv_cache_tokens, self.factor = spec, kv_cache_tokens, factor

    def wait_ready(self):
        return SimpleNamespace(kv_cache_tokens=self.kv_cache_tokens)

    def generate(self, requests, *, max_tokens, breakdown=False, **options):
        type(self).asked.append((self.spec.name, breakdown))
        k = self.spec.draft_tokens
        parts = {"draft_ms": 0.3 * k, "verify_ms": 4.0 * self.factor, "sample_ms": 0.2}
        parts["host_ms"] = 0.5 + self.waits_ms
        step = sum(parts.values())
        rates = self.spec.synthetic_acceptance or ()
        count, batch = 100, len(requests)
        return SimpleNamespace(
            tokens=max_tokens * len(requests),
            # The batch gathers and is left again: more steps than those that have all of it.
            steps_ms=(0.001,) * count + (step,) * count + (0.001,) * count,
            steps_sequences=(batch - 1,) * count + (batch,) * count + (batch - 1,) * count,
            wall_s=1.0,
            prefill_s=0.1,
            decode_s=count * step / 1e3,
            counters=Counters(100, 100 * k, round(100 * sum(rates)), tuple(round(100 * rate) for rate in rates)),
            undrafted=self.undrafted,
            components=parts if breakdown else None,
        )


def spec(k, backend="FLASH_ATTN", **changes):
    fields = {
        "name": f"K={k} {backend}",
        "target": "t",
        "method": "eagle3" if k else "vanilla",
        "draft": "d" if k else None,
        "draft_tokens": k,
        "backend": backend,
        "max_model_len": 20_000,
        "max_num_seqs": 8,
        "synthetic_acceptance": (0.8, 0.6, 0.4, 0.3)[:k] if k else None,
    }
    return EngineSpec(**fields | changes)


def engines(*specs, **options):
    PretendEngine.asked = []
    return {one.name: PretendEngine(one, **options) for one in specs}


def test_groups_fit_and_each_has_vanilla():
    groups = latency.plan("t", "d", memory_bytes=H200)
    assert [group.name for group in groups] == ["backends", "K = 1, 2, 3, 4", "K = 5, 6, 7"]
    for group in groups:
        assert latency.engine_bytes(*group.specs) <= H200 * latency.USABLE
        assert any(one.draft_tokens == 0 for one in group.specs)
        assert len({one.name for one in group.specs}) == len(group.specs)
        for cell in group.cells:
            for one in group.specs:
                tokens = one.kv_cache_bytes // latency.KV_TOKEN_BYTES
                assert latency.refusal(one, tokens, cell) is None
    compared = {(one.draft_tokens, one.backend) for one in groups[0].specs}
    assert {(4, "FLASH_ATTN"), (4, "TRITON_ATTN"), (4, "SUITE_PAGED"), (0, "FLASH_ATTN")} <= compared
    assert all(one.load_format == "dummy" for group in groups for one in group.specs)


def test_engines_of_the_shape_can_share_compiled_code():
    every = [one for group in latency.plan("t", "d", memory_bytes=H200) for one in group.specs]
    alike = {(one.max_model_len, one.kv_cache_bytes, one.max_num_batched_tokens) for one in every}
    graphs = {
        tuple(llm_arguments(one)["compilation_config"]["cudagraph_capture_sizes"]) for one in every if one.draft_tokens
    }
    assert len(alike) == len(graphs) == 1
    for one in every:  # each finds the batches of its own verification among them
        assert {n * (one.draft_tokens + 1) for n in one.cudagraph_batch_sizes} <= set(*graphs)


def test_a_smaller_gpu_has_more_groups_and_a_tiny_one_none():
    groups = latency.plan("t", "d", memory_bytes=79 * GIB)
    assert [group.name for group in groups[:3]] == ["backends", "backends", "K = 1, 2"]
    assert all(latency.engine_bytes(*group.specs) <= 79 * GIB for group in groups)
    for group in groups[:2]:  # vanilla and ours, which the others are held against, are in both
        assert {(0, "FLASH_ATTN"), (4, "SUITE_PAGED")} < {(one.draft_tokens, one.backend) for one in group.specs}
    assert {one.draft_tokens for group in groups for one in group.specs} == set(range(8))
    with pytest.raises(ValueError, match="may be used"):
        latency.plan("t", "d", memory_bytes=24 * GIB)


def test_prompts_have_no_common_beginning():
    prompts = latency.requests((3, 50))
    assert [len(request.token_ids) for request in prompts] == [50] * 3
    assert len({request.token_ids[:1] for request in prompts}) == 3
    assert prompts == latency.requests((3, 50))
    assert prompts != latency.requests((3, 50), seed=1)


def test_engines_take_turns_of_a_round_without_marks_and_one_with():
    latency.measure(engines(spec(0), spec(2)), [(1, 100)], rounds=2)
    first, second = ([(one.name, marked) for marked in (False, True)] for one in (spec(0), spec(2)))
    assert PretendEngine.asked[:2] == [first[0], second[0]]  # not counted
    assert PretendEngine.asked[2:] == [*first, *second, *second, *first]  # both kinds meet the same host


def test_cells_that_do_not_fit_are_skipped_with_the_reason():
    rows = latency.measure(engines(spec(0), kv_cache_tokens=15_000), [(1, 19_990), (16, 10), (2, 10_000)], rounds=1)
    assert [row["reason"] for row in rows] == [
        "20078 tokens a sequence, the engine takes 20000",
        "16 sequences, the engine takes 8",
        "20176 tokens, the KV cache holds 15000",
    ]
    assert all(row["step_ms"] is None for row in rows)
    assert PretendEngine.asked == []


def test_speed_ups_are_those_of_the_whole_batch_within_a_group():
    rows = latency.measure(engines(spec(0), spec(2)), [(4, 100)], rounds=3, group="g")
    table = {row["K"]: row for row in latency.summary(rows)}
    assert table[0]["speed_up"] == 1
    assert table[2]["tokens_per_step"] == pytest.approx(2.4)
    assert table[2]["step_ms"] == pytest.approx(5.3)
    assert table[2]["speed_up"] == pytest.approx(2.4 * 4.7 / 5.3)
    assert (table[0]["acceptance"], table[2]["acceptance"]) == (None, "assumed")
    assert table[2]["rounds"] == 3  # the one with marks is not among them
    assert table[2]["marked_draft_ms"] == pytest.approx(0.6)


def test_the_cost_model_is_held_against_unmarked_rounds():
    rows = latency.measure(engines(*(spec(k) for k in range(5))), [(1, 100)], rounds=1)
    compared = latency.compare(latency.summary(rows))
    assert [row["K"] for row in compared] == [1, 2, 3, 4]
    assert all(abs(row["relative_error"]) < 1e-9 for row in compared)
    slow = [row | {"step_ms": row["step_ms"] * 2} if row["K"] == 3 and not row["marked"] else row for row in rows]
    assert latency.compare(latency.summary(slow))[2]["relative_error"] == pytest.approx(1.0)
    assert latency.best_draft_tokens(latency.summary(rows)) == {("eagle3", "FLASH_ATTN", 1, 100): 4}


def test_backends_are_divided_at_the_same_k_alone():
    living = engines(spec(0), spec(4), spec(4, "TRITON_ATTN"), spec(4, "SUITE_PAGED"))
    living[spec(4, "TRITON_ATTN").name].factor = 10
    table = latency.summary(latency.measure(living, [(1, 16384)], rounds=1))
    ratios = {row["other"]: row["ratio"] for row in latency.against_backends(table)}
    assert ratios == {"FLASH_ATTN": pytest.approx(1.0), "TRITON_ATTN": pytest.approx(41.9 / 5.9)}
    # Without vanilla of its own backend, an engine is compared with the group's.
    slow = next(row for row in table if row["backend"] == "TRITON_ATTN")
    assert slow["speed_up"] == pytest.approx(3.1 * 4.7 / 41.9)


def test_published_rates_are_what_the_plan_assumes():
    (group,) = latency.plan("t", "d", memory_bytes=H200, draft_tokens=(3,), backends=())
    assert group.specs[1].synthetic_acceptance == cost.published_rates("eagle3", 3)


def test_steps_without_a_draft_count_as_steps(monkeypatch):
    monkeypatch.setattr(PretendEngine, "undrafted", 100)
    row, _ = latency.measure(engines(spec(2)), [(1, 100)], rounds=1)
    whole = 1 + sum(row["assumed_rates"]) / 2
    assert row["tokens_per_step"] == pytest.approx(whole, abs=0.02)
    assert row["steady_tok_s"] == pytest.approx(whole / row["step_ms"] * 1e3, rel=0.01)


class BusyHost(PretendEngine):
    """Its host adds to most rounds, and once its clock runs fast."""

    added = (0.3, 1.1, 0.0, 4.0, 2.0, 0.05, 0.9, -2.0, 3.0, 0.0, 1.5, 0.7, 0.05, 2.5, 0.8, 0.0, 1.0, 6.0)

    def generate(self, requests, *, breakdown=False, **options):
        turn = sum(name == self.spec.name and marked == breakdown for name, marked in self.asked) - (not breakdown)
        self.waits_ms = self.added[turn] if turn >= 0 else 9.0
        return super().generate(requests, breakdown=breakdown, **options)


def test_the_pace_is_that_of_an_undisturbed_host():
    living = {one.name: BusyHost(one) for one in (spec(0), spec(1), spec(2))}
    PretendEngine.asked = []
    rows = latency.measure(living, [(1, 100)], rounds=len(BusyHost.added))
    table = {row["K"]: row for row in latency.summary(rows)}
    for k, row in table.items():
        true = {"draft_ms": 0.3 * k, "verify_ms": 4.0, "sample_ms": 0.2, "host_ms": 0.5}
        step = sum(true.values())
        noisy = [one["step_ms"] for one in rows if one["K"] == k and not one["marked"]]
        for wrong in (statistics.fmean(noisy), statistics.median(noisy), min(noisy)):
            assert abs(wrong / step - 1) > 0.1
        assert row["step_ms"] == pytest.approx(step, rel=0.02)
        assert row["step_median_ms"] == statistics.median(noisy) < row["step_p80_ms"]
        assert row["steady_p20_tok_s"] < row["steady_median_tok_s"] < row["steady_tok_s"]
        assert row["steady_tok_s"] == pytest.approx(row["tokens_per_step"] / step * 1e3, rel=0.02)
        for name, value in true.items():
            assert row[f"marked_{name}"] == pytest.approx(value, abs=0.02 * step), name
        assert row["marked_host_ms"] < row["marked_host_median_ms"] < row["marked_host_p80_ms"]
    assert table[2]["speed_up"] == pytest.approx(2.4 * 4.7 / 5.3, rel=0.02)
    assert table[2]["median_speed_up"] == pytest.approx(2.4 * 5.55 / 6.15, rel=0.001)
    for row in latency.compare(table.values()):
        assert abs(row["relative_error"]) < 0.02 and row["median_speed_up"] == table[row["K"]]["median_speed_up"]


@pytest.mark.parametrize("k", range(8))
def test_a_round_is_short_and_has_steps_enough_if_every_draft_is_accepted(k):
    assert latency.round_tokens(k) // (k + 1) >= 8
    assert latency.round_tokens(k) <= 64 and (k > 2 or latency.round_tokens(k) == 24)
