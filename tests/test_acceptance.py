# SPDX-License-Identifier: Apache-2.0
"""Acceptance: the counters' mean, the histogram's mean, and what lies between them at the end of a request."""

from types import SimpleNamespace

import numpy as np
import pytest

from aiterlab.spec_decode import acceptance
from aiterlab.spec_decode.metrics import Counters


def run(accepted, max_tokens=None, draft_tokens=3, undrafted=0):
    """A `generate` call as an engine gives it: per request the tokens accepted in each step, cut at `max_tokens`."""
    outputs, drafts, positions = [], 0, np.zeros(draft_tokens, dtype=int)
    for steps in accepted:
        lengths, given = [], 1  # the first token is prefill's
        for count in steps:
            if max_tokens is not None and given >= max_tokens:
                break
            drafts += 1
            positions[:count] += 1
            lengths.append(count + 1 if max_tokens is None else min(count + 1, max_tokens - given))
            given += lengths[-1]
        outputs.append(SimpleNamespace(accepted_lengths=tuple(lengths + [1] * undrafted)))
    counters = Counters(drafts, drafts * draft_tokens, int(positions.sum()), tuple(positions.tolist()))
    flat = tuple(length for one in outputs for length in one.accepted_lengths)
    return SimpleNamespace(engine="k", outputs=tuple(outputs), counters=counters, accepted_lengths=flat)


def measured(generation, draft_tokens=3):
    return acceptance.measure(generation, method="eagle", draft_tokens=draft_tokens, task="code", temperature=0.0)


def test_the_numbers_of_a_small_run():
    found = measured(run([[3, 0], [1, 2]]))
    assert (found.drafts, found.drafted, found.accepted, found.per_position) == (4, 12, 6, (3, 2, 1))
    assert found.length == found.tokens_per_step == 2.5
    assert found.rates == (0.75, 0.5, 0.25) and found.length == 1 + sum(found.rates)
    assert found.conditional_rates == pytest.approx((3 / 4, 2 / 3, 1 / 2))
    assert found.steps_by_tokens == (1, 1, 1, 1) and found.acceptance_rate == 0.5
    assert found.cut_tokens == 0 and found.disagreement == ""
    assert found.length_low is None and found.reason == "2 requests with steps, at least 5 needed"


def test_what_max_tokens_cuts_is_counted_by_vllm_and_given_to_nobody():
    random = np.random.default_rng(0)
    found = measured(run(random.integers(0, 4, size=(20, 30)), max_tokens=24))
    assert found.tokens_per_step < found.length
    assert 0 < found.cut_tokens <= 3 * 20 and found.disagreement == ""
    kept = found.accepted - found.cut_tokens
    assert found.tokens_per_step == pytest.approx(1 + kept / found.steps)
    assert kept + found.steps == 20 * 23  # every request gave max_tokens, its first token from prefill


def test_counters_that_contradict_the_steps_are_told():
    generation = run([[3, 0], [1, 2]])
    more = measured(SimpleNamespace(**vars(generation) | {"counters": Counters(4, 12, 60, (20, 20, 20))}))
    assert "60 tokens accepted and 6 given beyond one per step; ends of requests explain 0 to 6" in more.disagreement
    fewer = measured(SimpleNamespace(**vars(generation) | {"counters": Counters(4, 12, 2, (2, 0, 0))}))
    assert "ends of requests explain 0 to 6" in fewer.disagreement
    missing = measured(SimpleNamespace(**vars(generation) | {"counters": Counters(9, 27, 6, (3, 2, 1))}))
    assert missing.disagreement == "9 drafts counted, but only 4 steps seen"
    positions = measured(SimpleNamespace(**vars(generation) | {"counters": Counters(4, 12, 6, (3, 2, 0))}))
    assert positions.disagreement == "6 tokens accepted, but 5 over all positions"


def test_steps_without_a_draft_count_for_tokens_per_step_alone():
    """n-gram finds nothing to propose in some steps; vLLM counts no draft then."""
    found = measured(run([[3, 2]] * 8, undrafted=2))
    assert found.length == 3.5 and found.tokens_per_step == 2.25
    assert found.disagreement == ""
    assert found.length_low == pytest.approx(3.5) == found.length_high  # all requests alike


def test_nothing_drafted_is_missing_and_not_zero():
    found = measured(run([[]] * 6, undrafted=3))
    assert (found.length, found.rates, found.conditional_rates, found.acceptance_rate) == (None,) * 4
    assert found.tokens_per_step == 1 and found.reason == "no draft was made"
    row = found.row()
    assert row["acceptance_length"] is None and row["rates"] is None and row["drafts"] == 0


def test_a_position_that_nobody_reached_has_no_conditional_rate():
    assert acceptance.conditional(10, (5, 0, 0)) == (0.5, 0.0, None)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Requests differ from one another, so that steps taken for independent would give too narrow an interval."""
    random, covered, narrow = np.random.default_rng(1), 0, 0
    for _ in range(100):
        chances = random.beta(4, 4, size=24)  # mean 0.5 of a draft of one token
        lengths = [1 + (random.random(40) < chance) for chance in chances]
        low, high, reason = acceptance.interval(lengths)
        covered += low <= 1.5 <= high
        flat = np.concatenate(lengths)
        narrow += abs(flat.mean() - 1.5) <= 1.96 * flat.std() / np.sqrt(len(flat))
        assert reason == ""
    assert covered >= 88 and narrow < 75


def test_the_interval_is_the_same_for_the_same_seed():
    lengths = [[1, 2, 3], [2, 2], [1], [4, 4, 4], [1, 1], [3]]
    assert acceptance.interval(lengths) == acceptance.interval(lengths)
    assert acceptance.interval(lengths)[:2] != acceptance.interval(lengths, seed=1)[:2]


def test_the_interval_holds_the_acceptance_length():
    random = np.random.default_rng(2)
    found = measured(run(random.integers(0, 4, size=(20, 30)), max_tokens=40))
    assert found.length_low < found.length < found.length_high
    assert found.disagreement == ""


def test_a_step_cannot_give_more_than_k_plus_one_tokens():
    assert acceptance.histogram((1, 3, 3), 2) == (1, 0, 2)
    for wrong in (4, 0):
        with pytest.raises(ValueError, match=f"a step gave {wrong} tokens; with 2 draft tokens it gives 1 to 3"):
            acceptance.histogram((1, wrong), 2)
