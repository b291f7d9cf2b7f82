# SPDX-License-Identifier: Apache-2.0
"""The cost model's arithmetic, on numbers that can be checked by hand."""

import pytest

from aiterlab.spec_decode import cost
from aiterlab.spec_decode.cost import Components

# An engine that obeys the model: a draft token takes 0.3 ms, every part of the rest is plain to see.
MEASURED = {0: Components(0.0, 4.0, 0.2, 0.4)} | {
    k: Components(0.5 + 0.3 * k, 4.0 + 0.01 * k, 0.3, 0.6) for k in range(1, 8)
}


def test_tokens_per_step_are_one_more_than_the_rates():
    assert cost.expected_tokens([0.8, 0.5]) == pytest.approx(2.3)
    assert cost.expected_tokens([]) == 1


@pytest.mark.parametrize("rates", [[0.5, 0.6], [1.2], [-0.1]])
def test_rates_that_cannot_be_are_refused(rates):
    with pytest.raises(ValueError, match="rates"):
        cost.expected_tokens(rates)


@pytest.mark.parametrize("method", cost.PUBLISHED_LENGTHS)
@pytest.mark.parametrize("k", range(2, 8))
def test_published_rates_give_the_published_lengths(method, k):
    rates = cost.published_rates(method, k)
    assert cost.expected_tokens(rates) == pytest.approx(cost.PUBLISHED_LENGTHS[method][k], abs=1e-3)


def test_the_assumed_split_keeps_the_conditional_rate():
    first, second, third = cost.published_rates("eagle3", 3)
    assert second / first == pytest.approx(third / second, rel=1e-3)
    assert 0.7 < first < 0.85
    with pytest.raises(ValueError, match="published"):
        cost.published_rates("eagle3", 8)


def test_leviathans_formula():
    assert cost.expected_tokens_iid(0.5, 2) == pytest.approx(1.75)  # 1 + 1/2 + 1/4
    assert cost.expected_tokens_iid(1.0, 4) == 5
    assert cost.speed_up_iid(0.5, 2, 0.1) == pytest.approx(1.75 / 1.2)
    assert cost.acceptance_iid(1.75, 2) == pytest.approx(0.5)


def test_the_model_is_exact_where_the_engine_obeys_it():
    prediction = cost.predict(MEASURED, cost.published_rates("eagle3", 4))
    step = 0.5 + 1.2 + 4.04 + 0.3 + 0.6
    assert prediction.components.step_ms == pytest.approx(step)
    assert prediction.speed_up == pytest.approx(3.08 * 4.6 / step, rel=1e-3)
    assert prediction.worst_case == pytest.approx(4.6 / step)
    assert prediction.worst_case < 1


@pytest.mark.parametrize("k", range(1, 8))
def test_a_k_that_was_left_out_is_predicted_from_the_others(k):
    wrong = MEASURED | {k: Components(90.0, 90.0, 90.0, 90.0)}
    blind = cost.predict(wrong, cost.published_rates("eagle3", k), leave_out=True)
    assert blind.components.step_ms == pytest.approx(MEASURED[k].step_ms, rel=1e-6)
    assert cost.predict(wrong, cost.published_rates("eagle3", k)).components.step_ms > 50


def test_verification_goes_in_stairs_not_on_a_line():
    stairs = {1: 4.0, 64: 4.0, 128: 8.0}
    assert cost.between(stairs, 32) == 4.0
    assert cost.between(stairs, 96) == 6.0
    assert cost.between(stairs, 192) == 12.0
    assert cost.between({3: 7.0}, 1) == 7.0


def test_comparison_tells_how_far_the_prediction_is_off():
    rates = {k: cost.published_rates("eagle3", k) for k in range(1, 8)}
    speed = {0: 1e3 / 4.6} | {k: 1e3 * cost.expected_tokens(rates[k]) / MEASURED[k].step_ms for k in rates}
    rows = cost.compare(MEASURED, rates, speed)
    assert [row["K"] for row in rows] == list(range(1, 8))
    assert all(abs(row["relative_error"]) < 1e-6 and abs(row["left_out_error"]) < 1e-6 for row in rows)
    slower = cost.compare(MEASURED, rates, speed | {4: speed[4] / 1.25})
    assert slower[3]["relative_error"] == pytest.approx(0.25)
    assert cost.best({row["K"]: row["measured_speed_up"] for row in rows}) == 5


def test_one_k_alone_has_no_left_out_error():
    only = {0: MEASURED[0], 3: MEASURED[3]}
    row = cost.compare(only, {3: (0.5, 0.2, 0.1)}, {0: 200.0, 3: 250.0})[0]
    assert row["left_out_speed_up"] is None
    assert row["left_out_error"] is None


def test_nothing_beats_vanilla():
    assert cost.best({1: 0.9, 2: 0.8}) == 0
    assert cost.best({}) is None


def test_without_a_drafted_step_nothing_is_predicted():
    with pytest.raises(ValueError, match="at least one"):
        cost.predict({0: MEASURED[0]}, (0.5,))
