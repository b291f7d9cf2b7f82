# SPDX-License-Identifier: Apache-2.0
"""Lossless checks: what is right passes nearly always, and each kind of fault is found with the same samples."""

import functools
import math
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from aiterlab.spec_decode import acceptance, chi_square, engine, lossless, models, prompts, sabotage


@dataclass(frozen=True)
class Output:
    request_id: str
    sample: int
    token_ids: tuple
    top_logprobs: tuple = ()


def generation(name, *outputs):
    return SimpleNamespace(engine=name, outputs=outputs)


# Greedy

LISTED = ((5, -0.1), (6, -0.2), (7, -2.5))  # 0.1 and 2.4 below the likeliest token


def greedy(*tokens, request="a", listed=LISTED):
    return Output(request, 0, tuple(tokens), tuple(listed for _ in tokens))


def compared(*others, vanilla=None, **options):
    vanilla = vanilla or [greedy(5, 5, 5, 5, request=one.request_id) for one in others]
    return lossless.compare_greedy(generation("vanilla", *vanilla), generation("eagle K=2", *others), **options)


def test_identical_tokens_are_identical():
    found = compared(greedy(5, 5, 5, 5), greedy(5, 5, 5, 5, request="b"))
    assert found and found.ok and found.identical == 2
    assert found.verdict == "eagle K=2: identical in all 2 requests; 8 of 8 tokens compared"
    assert found.table().empty


def test_a_near_tie_is_listed_with_its_gap_and_ends_the_comparison_of_its_request():
    found = compared(greedy(5, 5, 6, 7), greedy(5, 5, 5, 5, request="b"))
    assert found.ok and found.identical == 1
    (tie,) = found.near_ties
    assert (tie.request_id, tie.position, tie.vanilla_token, tie.other_token) == ("a", 2, 5, 6)
    assert tie.gap == pytest.approx(0.1)
    assert (found.compared_tokens, found.tokens) == (
        7,
        8,
    )  # what follows the near-tie, a fault here, has another context
    assert "1 near-ties in 2 requests (widest gap 0.1, tolerance 0.25)" in found.verdict
    (row,) = found.table().to_dict("records")
    assert row["gap"] == pytest.approx(0.1) and row["near-tie"]
    assert found.row()["widest_near_tie_gap"] == pytest.approx(0.1)


DIFFERENT = {
    "a gap beyond the tolerance": (greedy(5, 7, 5, 5), "gap 2.4 beyond 0.25", 2.4),
    "a token that vanilla does not list": (greedy(5, 9, 5, 5), "not among vanilla's 3 likeliest", None),
    "an early end": (greedy(5, 5, 5), "one of the two ended here", None),
    "a late end": (greedy(5, 5, 5, 5, 5), "one of the two ended here", None),
}


@pytest.mark.parametrize("how", DIFFERENT)
def test_a_difference_fails(how):
    other, reason, gap = DIFFERENT[how]
    found = compared(other, greedy(5, 5, 5, 5, request="b"))
    assert not found and not found.near_ties
    (fault,) = found.faults
    assert reason in fault.reason and fault.gap == (gap if gap is None else pytest.approx(gap))
    assert "different in 1 of 2 requests, first in a at token" in found.verdict
    assert len(found.table()) == 1


def test_without_logprobs_a_difference_is_no_near_tie():
    found = compared(greedy(6, 5), vanilla=[Output("a", 0, (5, 5))])
    assert not found.ok and found.faults[0].reason == "vanilla was run without logprobs"


def test_near_ties_everywhere_show_nothing():
    found = compared(greedy(6, 5, 5, 5), greedy(6, 5, 5, 5, request="b"))
    assert not found.faults and not found.ok
    assert "shows nothing" in found.verdict and "2 of 8 tokens compared" in found.verdict


def test_other_requests_are_refused():
    with pytest.raises(ValueError, match="vanilla and eagle K=2 did not run the same requests: request b"):
        compared(greedy(5), vanilla=[greedy(5), greedy(5, request="b")])
    with pytest.raises(ValueError, match="both are empty"):
        compared()


def test_the_tolerance_is_two_spacings_of_the_dtype():
    assert lossless.near_tie_tolerance("bfloat16", 16.0) == 0.25
    assert lossless.near_tie_tolerance("bfloat16", 15.9) == 0.125
    assert lossless.near_tie_tolerance("float16", 16.0) == 2**-5
    assert lossless.near_tie_tolerance("float32", 16.0) < 1e-3
    assert not compared(greedy(5, 6, 5, 5), dtype="float16").ok


@pytest.mark.parametrize("magnitude", [3.0, 10.0, 30.0])
def test_logits_rounded_after_sums_in_another_order_stay_within_the_tolerance(magnitude):
    """The tolerance holds for what it comes from: bfloat16 logits of states that differ by their own rounding."""
    random = np.random.default_rng(0)
    hidden = random.standard_normal((200, 256))
    heads = random.standard_normal((200, 2, 256)) / 16
    bfloat16 = chi_square.torch.bfloat16

    def rounded(numbers):
        return chi_square.torch.tensor(numbers).to(bfloat16).double().numpy()

    def logits(states):
        raw = np.einsum("nd,nhd->nh", rounded(states), heads)
        return rounded(magnitude * (0.5 + raw / 8))

    one = logits(hidden)
    another = logits(hidden * (1 + 2.0**-9 * random.standard_normal(hidden.shape)))
    moved = np.abs((one[:, 0] - one[:, 1]) - (another[:, 0] - another[:, 1]))
    assert 0 < moved.max() <= lossless.near_tie_tolerance("bfloat16", magnitude)


# Chi-square


def test_the_tail_is_that_of_chi_square():
    for statistic, freedom, known in ((3.841, 1, 0.05), (18.307, 10, 0.05), (29.588, 10, 0.001), (149.449, 100, 0.001)):
        assert chi_square.tail(statistic, freedom) == pytest.approx(known, rel=2e-3)
    assert chi_square.tail(0.0, 3) == 1


def test_holm_adjusts_by_rank_and_keeps_the_order():
    assert chi_square.holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert chi_square.holm([0.5, 0.9]) == pytest.approx((1.0, 1.0))
    assert chi_square.holm([]) == ()


def test_pooling_leaves_no_cell_that_is_expected_too_rarely():
    counts = np.array([[50, 3, 2, 1, 20], [60, 1, 4, 0, 30]])
    pooled = chi_square.pool(counts, counts.sum(0) / 2)
    assert pooled.tolist() == [[50, 20, 6], [60, 30, 5]]
    counts = np.array([[50, 1, 20], [60, 1, 30]])
    assert chi_square.pool(counts, counts.sum(0) / 2).tolist() == [[50, 21], [60, 31]]
    assert chi_square.pool(np.array([[3, 1], [2, 1]]), np.array([2.5, 1])).shape == (2, 1)


def test_distance_has_the_error_that_repeats_show():
    random = np.random.default_rng(1)
    one, another = np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.35, 0.35])
    drawn = [(random.multinomial(400, one) / 400, random.multinomial(300, another) / 300) for _ in range(500)]
    found = np.array([chi_square.distance(*pair, 400, 300) for pair in drawn])
    assert found[:, 0].mean() == pytest.approx(0.2, abs=0.01)
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.1)
    equal = [random.multinomial(400, one) / 400 - random.multinomial(300, one) / 300 for _ in range(500)]
    by_chance = chi_square.mean_distance(one * (1 - one) * (1 / 400 + 1 / 300))
    assert by_chance == pytest.approx(np.mean([np.abs(row).sum() / 2 for row in equal]), rel=0.1)


# Sampled: a small language model with a draft, and verifiers right and wrong

TOKENS, LENGTH, SAMPLES, PROMPTS = 60, 3, 200, 4


class Model:
    """Next-token probabilities that depend on the last token; a draft that proposes its likeliest token."""

    def __init__(self, seed, sharpness=2.5):
        random = np.random.default_rng(seed)
        logits = sharpness * random.standard_normal((PROMPTS, TOKENS + 1, TOKENS))
        self.target = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        self.draft = (logits + 0.7 * random.standard_normal(logits.shape)).argmax(-1)

    def sample(self, name, seed, accept=None, samples=SAMPLES, listed=0):
        """`accept`: chance that the verifier accepts a draft token, given the target's probability of it."""
        random = np.random.default_rng(seed)
        outputs = []
        for prompt in range(PROMPTS):
            tokens = np.full((samples, 1), TOKENS)
            for place in range(LENGTH):
                chances = self.target[prompt, tokens[:, -1]]
                drawn = (chances.cumsum(1) < random.random((samples, 1))).sum(1).clip(max=TOKENS - 1)
                if accept is not None and place:  # the first token is prefill's
                    draft = self.draft[prompt, tokens[:, -1]]
                    own = chances[np.arange(samples), draft]
                    accepted = random.random(samples) < accept(own)
                    residual = chances.copy()
                    residual[np.arange(samples), draft] = 0
                    residual /= residual.sum(1, keepdims=True)
                    other = (residual.cumsum(1) < random.random((samples, 1))).sum(1).clip(max=TOKENS - 1)
                    drawn = np.where(accepted, draft, other)
                tokens = np.concatenate([tokens, drawn[:, None]], axis=1)
            for index, row in enumerate(tokens.tolist()):
                tops = tuple(self.listed(prompt, last, listed) for last in row[:-1]) if listed else ()
                outputs.append(Output(f"prompt {prompt}", index, tuple(row[1:]), tops))
        return generation(name, *outputs)

    @functools.cache  # noqa: B019 (a model lives for one trial)
    def listed(self, prompt, last, count):
        chances = self.target[prompt, last]
        return tuple((int(token), math.log(chances[token])) for token in np.argsort(-chances)[:count])


def accept_rightly(own):
    return own


def accept_always(own):
    return np.ones_like(own)


def accept_too_often(own):
    return np.sqrt(own)


@pytest.mark.parametrize("listed", [0, 20])
def test_a_right_verifier_passes_nearly_always(listed):
    """At a band of 0.05 at most 5 % of right engines may fail; that of 0.001 would need thousands of trials to see."""
    rejected = 0
    for trial in range(60):
        model = Model(trial)
        vanilla, other = (
            model.sample("vanilla", 2 * trial, listed=listed),
            model.sample("k", 2 * trial + 1, lambda p: p),
        )
        found = lossless.compare_sampled(vanilla, other, band=0.05)
        rejected += not found.ok
        assert found.ok == (min(found.adjusted) >= 0.05)
        assert min(found.adjusted) > 1e-4
    assert rejected <= 7  # binomial: more than 7 of 60 at 5 % has a chance of 1 %


@pytest.mark.parametrize(("accept", "listed"), [(accept_always, 0), (accept_always, 20), (accept_too_often, 20)])
def test_a_wrong_verifier_is_found_with_the_same_samples(accept, listed):
    for trial in range(20):
        model = Model(trial)
        vanilla, other = model.sample("vanilla", 2 * trial, listed=listed), model.sample("k", 2 * trial + 1, accept)
        found = lossless.compare_sampled(vanilla, other)
        assert not found.ok, found.verdict
        assert "another distribution" in found.verdict
        firsts = [one for one in found.tested if one.tokens == 1]
        assert all(one.p_value > 1e-5 for one in firsts)  # no verifier made the first token


def test_told_probabilities_find_smaller_faults_than_a_second_sample():
    found = Counter()
    for trial in range(20):
        model = Model(trial)
        other = model.sample("k", 2 * trial + 1, accept_too_often)
        for listed in (0, 20):
            vanilla = model.sample("vanilla", 2 * trial, listed=listed)
            found[listed] += not lossless.compare_sampled(vanilla, other).ok
    assert 0 < found[0] < found[20] == 20


def test_the_table_lists_every_test_with_its_distance():
    model = Model(1)
    vanilla, other = model.sample("vanilla", 0, listed=20), model.sample("eagle3 K=2", 1, accept_rightly)
    found = lossless.compare_sampled(vanilla, other)
    table = found.table()
    assert len(table) == (PROMPTS + 1) * LENGTH and set(table["test"]) == {"continuation", "next token"}
    tested = table.dropna(subset="p_value")
    assert (tested["p_adjusted"] >= tested["p_value"]).all()
    assert ((tested["distance"] - tested["distance_by_chance"]) < 4 * tested["distance_error"]).all()
    assert (table["reason"] != "").equals(table["p_value"].isna())
    assert found.row()["ok"] is True and "same distribution (smallest p" in found.verdict


def test_what_cannot_be_tested_shows_nothing():
    alike = [Output("a", index, (1, 2)) for index in range(50)]
    found = lossless.compare_sampled(generation("vanilla", *alike), generation("k", *alike))
    assert not found.ok and "shows nothing" in found.verdict
    assert all(one.p_value is None and "no two cells" in one.reason for one in found.tests)
    assert found.row()["smallest_p_adjusted"] is None


def test_first_tokens_alone_show_nothing():
    """Prefill makes the first token, so a verifier that was never asked must not pass."""
    random = np.random.default_rng(0)
    sides = [[Output("a", i, (int(token),)) for i, token in enumerate(random.integers(3, size=90))] for _ in range(2)]
    found = lossless.compare_sampled(generation("vanilla", *sides[0]), generation("k", *sides[1]))
    assert found.tested and not found.ok


def test_sampling_other_prompts_is_refused():
    one = generation("vanilla", Output("a", 0, (1, 2)))
    with pytest.raises(ValueError, match="did not sample the same prompts"):
        lossless.compare_sampled(one, generation("k", replace(one.outputs[0], request_id="b")))


# Real engines with the bundled models

BREAK = "aiterlab.spec_decode.sabotage:break_verifier"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Held-out code, continued and sampled: vanilla, a good draft, a corrupted one, a broken verifier, no repairs."""
    folder = tmp_path_factory.mktemp("lossless")
    pair = models.bundled()["eagle3"]
    corrupted = sabotage.corrupt_draft(pair.draft, folder / "corrupted")
    common = {"target": str(pair.target), "max_model_len": 128, "max_num_seqs": 32, "kv_cache_bytes": 1 << 25}
    speculative = common | {"method": "eagle3", "draft": str(pair.draft), "draft_tokens": 3}
    specs = [
        engine.EngineSpec("vanilla", **common),
        engine.EngineSpec("eagle3", **speculative),
        engine.EngineSpec("corrupted", **speculative | {"draft": str(corrupted)}),
        engine.EngineSpec("broken", **speculative | {"hooks": (BREAK,)}),
        engine.EngineSpec("as released", **speculative | {"repairs": False}),
    ]
    code = prompts.load("code", 8, max_prompt_tokens=48)
    with engine.alive(specs, folder) as engines:
        greedy = {name: one.generate(code, max_tokens=32, logprobs=10) for name, one in engines.items()}
        sampled = {
            name: one.generate(
                code[:3],
                max_tokens=3,
                temperature=1.0,
                seed=10_000 * index,
                samples=150,
                ignore_eos=True,
                logprobs=20 if name == "vanilla" else 0,
            )
            for index, (name, one) in enumerate(engines.items())
        }
        facts = engines["eagle3"].facts
    return SimpleNamespace(greedy=greedy, sampled=sampled, mended=facts.repairs, dtype=facts.dtype)


def beside_vanilla(runs, name):
    return lossless.compare_greedy(runs.greedy["vanilla"], runs.greedy[name], dtype=runs.dtype)


def acceptance_length(run):
    found = acceptance.measure(run, method="eagle3", draft_tokens=3, task="code", temperature=0.0)
    assert found.disagreement == ""
    return found.length


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eagle3", "corrupted"])
def test_speculation_is_lossless_whatever_the_draft_is_worth(runs, name):
    greedy = beside_vanilla(runs, name)
    assert greedy.ok, f"{greedy.verdict}\n{greedy.table()}"
    sampled = lossless.compare_sampled(runs.sampled["vanilla"], runs.sampled[name])
    assert sampled.ok, f"{sampled.verdict}\n{sampled.table()}"
    length = acceptance_length(runs.greedy[name])
    assert length < 1.1 if name == "corrupted" else length > 2


@pytest.mark.slow
def test_a_verifier_that_accepts_everything_fails_both_checks(runs):
    assert acceptance_length(runs.greedy["broken"]) == 4
    greedy = beside_vanilla(runs, "broken")
    assert not greedy.ok and greedy.faults
    sampled = lossless.compare_sampled(runs.sampled["vanilla"], runs.sampled["broken"])
    assert not sampled.ok and sampled.verified


@pytest.mark.slow
def test_this_vllm_as_released_samples_another_distribution(runs):
    """The repaired engine passes with the same samples (above)."""
    if not runs.mended:
        pytest.skip("this vLLM needs no repair")
    assert beside_vanilla(runs, "as released").ok
    sampled = lossless.compare_sampled(runs.sampled["vanilla"], runs.sampled["as released"])
    assert not sampled.ok and sampled.verified, sampled.verdict
