# SPDX-License-Identifier: Apache-2.0
"""aiterlab.spec_decode.metrics: vLLM's counters as numbers."""

import dataclasses
from types import SimpleNamespace

from aiterlab.spec_decode.metrics import Counters, from_metrics, from_prometheus

PAGE = """
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="a{b}"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="a{b}"} 2.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="a{b}"} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="a{b}"} 24.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="a{b}"} 15.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="a{b}",position="1"} 6.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="a{b}",position="0"} 9.0
vllm:generation_tokens_total{engine="0",model_name="a{b}"} 99.0
"""


def test_acceptance_length_includes_the_bonus_token():
    counters = Counters(10, 20, 12, (8, 4))
    assert counters.acceptance_length == 2.2
    assert counters.per_position_rates == (0.8, 0.4)
    assert counters.acceptance_length == 1 + sum(counters.per_position_rates)


def test_without_drafts_there_are_no_rates():
    assert Counters().acceptance_length is None
    assert Counters().per_position_rates is None


def test_difference_and_sum():
    before, after = Counters(1, 2, 1, (1, 0)), Counters(4, 8, 5, (3, 2))
    assert after - before == Counters(3, 6, 4, (2, 2))
    assert sum([before, after - before]) == after
    assert after - Counters() == after  # an engine that had no counters yet


def test_counters_survive_json():
    counters = Counters(4, 8, 5, (3, 2))
    values = dataclasses.asdict(counters)
    assert Counters.from_json(values | {"accepted_per_position": [3, 2]}) == counters


def test_a_server_s_page_is_read():
    assert from_prometheus(PAGE) == Counters(12, 24, 15, (9, 6))
    assert from_prometheus("") == Counters()


def test_an_engine_s_metrics_are_read():
    metrics = [
        SimpleNamespace(name="vllm:spec_decode_num_drafts", value=3),
        SimpleNamespace(name="vllm:spec_decode_num_draft_tokens", value=6),
        SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens", value=2),
        SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens_per_pos", values=[2, 0]),
        SimpleNamespace(name="vllm:num_requests_running", value=1),
    ]
    assert from_metrics(metrics) == Counters(3, 6, 2, (2, 0))
