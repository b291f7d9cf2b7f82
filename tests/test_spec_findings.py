# SPDX-License-Identifier: Apache-2.0
"""Sentences about speculative decoding: they say what the rows say, and hide no failure."""

import pandas as pd
import pytest

from aiterlab.spec_decode import findings
from aiterlab.spec_decode.accuracy import Score


def greedy(engine="eagle3 K=4", **changes):
    row = {"task": "code", "base": "vanilla", "engine": engine, "requests": 12, "identical": 12, "near_ties": 0}
    return row | {"different": 0, "compared_tokens": 768, "tokens": 768, "ok": True} | changes


def sampled(**changes):
    return {"engine": "eagle3 K=4", "tests": 15, "verified": True, "smallest_p_adjusted": 1.0, "ok": True} | changes


def broken(engine, as_it_should=True):
    return {"engine": engine, "task": "code", "as_it_should": as_it_should}


def accepted(task="code", length=2.61, method="eagle3", k=4, group="models", **changes):
    row = {"group": group, "engine": f"{method} K={k}", "backend": None, "method": method, "draft_tokens": k}
    row |= {
        "task": task,
        "temperature": 0.0,
        "acceptance_length": length,
        "steps": 20,
        "steps_by_tokens": [8, 0, 2, 5, 5],
    }
    return row | changes


def predicted(group="models", method="eagle3", k=4, speed_up=1.5, error=0.02, cell=(1, 128)):
    row = {"group": group, "method": method, "K": k, "measured_speed_up": speed_up, "relative_error": error}
    return row | dict(zip(("batch", "context"), cell, strict=True))


def ratio(other, context, times, k=4):
    return {"other": other, "context": context, "ratio": times, "K": k}


def compared(*agree):
    return pd.DataFrame([{"requested": f"B{i}", "outputs_agree": one} for i, one in enumerate(agree)])


# lossless


def test_lossless_engines_are_counted_once_with_all_their_tokens():
    rows = [greedy(), greedy(task="prose", near_ties=1, compared_tokens=700), greedy("eagle K=2")]
    assert findings.lossless(rows, [sampled()], [broken("corrupted draft"), broken("broken verifier")]) == (
        "2 engines give vanilla's greedy tokens (2,236 compared, 1 near-tie); "
        "at temperature 1 the same distribution with eagle3 K=4; broken engines were told apart"
    )


def test_an_engine_that_gives_other_tokens_is_named():
    said = findings.lossless([greedy(), greedy("eagle K=2", ok=False, different=1)], [], [])
    assert said == "Greedy answers are not vanilla's in eagle K=2"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ok": False}, "at temperature 1 another distribution with eagle3 K=4"),
        ({"ok": False, "verified": False, "tests": 0}, "at temperature 1 too few samples to tell with eagle3 K=4"),
        ({"ok": False, "verified": False, "tests": 4}, "at temperature 1 too few samples to tell"),  # first tokens only
    ],
)
def test_another_distribution_is_not_too_few_samples(changes, told):
    assert told in findings.lossless([greedy()], [sampled(**changes)], [])


def test_a_fault_that_was_not_noticed_is_named():
    rows = [broken("corrupted draft"), broken("broken verifier", False), broken("vLLM as released", None)]
    said = findings.lossless([greedy()], [], rows)
    assert said.endswith("; not noticed: broken verifier; too few samples to judge vLLM as released")
    assert "told apart" not in said


def test_nothing_compared_is_no_success():
    assert findings.lossless([], [sampled()], []) == "Nothing was compared with vanilla decoding"


# acceptance


def test_acceptance_names_each_method_once_with_its_most_draft_tokens():
    rows = [
        accepted("code", 2.07, k=2),
        accepted("code", 2.61),
        accepted("prose", 2.59),
        accepted("code", 2.86, "ngram"),
    ]
    rows += [accepted("code", 1.8, temperature=1.0), accepted("arithmetic", None)]
    # A backend of its own choice on a CPU has no name either, and is asked the same questions again.
    rows += [
        accepted("code", 2.61, group="backends", engine="eagle3 K=4 CPU_ATTN"),
        accepted("code", 3.3, k=7, group="x"),
    ]
    assert findings.acceptance(rows) == (
        "Tokens per step: eagle3 (K = 4) code 2.61, prose 2.59; ngram (K = 4) code 2.86"
    )
    assert findings.strongest(rows) == "ngram K=4"
    assert findings.histogram(rows) == "ngram on code: 25% of the steps give all 5 tokens"


def test_no_draft_is_told():
    assert findings.acceptance([]) == findings.histogram([]) == "No draft was made"
    assert findings.acceptance([accepted(length=None)]) == "No draft was made"


# speed


def test_speed_tells_the_models_and_the_shape_apart():
    rows = [predicted(speed_up=1.2, k=2), predicted(speed_up=1.5, error=-0.13, cell=(4, 128))]
    rows += [predicted("shape", k=3, speed_up=2.5, error=0.04), predicted("shape", k=5, speed_up=2.1, error=-0.07)]
    assert findings.speed([], rows) == (
        "On the models that ship eagle3 with K = 4 decodes 1.50 times as fast as vanilla (4 x 128), "
        "predicted to within 13% at every K; on the shape of Llama-3.1-8B (acceptance assumed) eagle3 with K = 3 "
        "decodes 2.50 times as fast as vanilla (1 x 128), predicted to within 7% at every K"
    )
    assert "models that ship" not in findings.speed([], rows[2:])
    assert findings.speed([], []) == "No speed-up was measured"


# backends


def test_backends_say_what_the_kernel_is_worth_at_each_context():
    rows = [ratio("TRITON_ATTN", 16384, 4.2), ratio("TRITON_ATTN", 32768, 7.3), ratio("FLASH_ATTN", 16384, 0.98)]
    rows += [ratio("TRITON_ATTN", 16384, 99.0, k=0)]  # vanilla decoding
    assert findings.backends(rows, compared(True, True, None)) == (
        "On the shape of Llama-3.1-8B (acceptance assumed) SUITE_PAGED gives 4.20 at 16k, 7.30 at 32k times the tokens "
        "per second of TRITON_ATTN and 0.98 at 16k times the tokens per second of FLASH_ATTN; "
        "2 of 2 explicit backends agree with the others"
    )


def test_backends_that_disagree_are_counted():
    assert findings.backends([], compared(True, False)) == "1 of 2 explicit backends agree with the others"
    assert findings.backends([], compared(True)) == "1 of 1 explicit backend agrees with the others"
    assert findings.backends([], compared(None)) == findings.backends([], pd.DataFrame()) == "No backend was compared"


# the others, and the whole


def score(engine="vanilla", value=0.96):
    return Score(
        engine, "vanilla", 0, None, "aiterlab_arithmetic", "1.0", "strict-match", 0, "exact_match", True, value, 0.028,
        50, 0, 0, None, 1.0,
    )  # fmt: skip


def test_the_others_say_only_what_was_asked():
    assert findings.others([], [], [], pd.DataFrame()) == ""
    scores = [score(), score("eagle3 K=4", 0.94), score("eagle K=4", 0.5)]
    ranks = [{"ok": True}, {"ok": False}, {"ok": None}]  # the last: fewer devices than ranks
    served = [{"ok": True}]
    assert findings.others(scores, ranks, served, pd.DataFrame()) == (
        "Scores of lm-eval differ from vanilla's by 0.460 at most, 1 of 2 within two standard errors. "
        "1 of 2 ranks give one rank's tokens. Behind vllm serve 1 of 1 task gets the same tokens."
    )
    assert findings.others([score()], [], [], pd.DataFrame()) == ""


def test_the_whole_is_one_sentence():
    parts = (
        findings.lossless([greedy()], [sampled()], [broken("corrupted draft")]),
        findings.acceptance([accepted()]),
        findings.speed([], [predicted()]),
        findings.backends([], compared(True)),
    )
    said = findings.whole(*parts)
    assert said.endswith("agrees with the others.") and not said.endswith("..")
    assert "; tokens per step: eagle3" in said and "; on the models that ship" in said
    nothing = findings.whole(
        findings.lossless([], [], []),
        findings.acceptance([]),
        findings.speed([], []),
        findings.backends([], compared()),
    )
    assert nothing == (
        "Nothing was compared with vanilla decoding; no draft was made; no speed-up was measured; "
        "no backend was compared."
    )
