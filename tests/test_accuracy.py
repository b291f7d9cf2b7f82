# SPDX-License-Identifier: Apache-2.0
"""lm-eval's own vLLM class on a living engine: the bundled task, its table, and what goes wrong in one line."""

import json
import re

import pytest

from aiterlab.spec_decode import accuracy, models
from aiterlab.spec_decode.accuracy import TASK, AccuracyError, Score, Trial
from aiterlab.spec_decode.engine import EngineSpec, alive
from aiterlab.spec_decode.train.arithmetic import question


@pytest.fixture(scope="module")
def exercises(tmp_path_factory):
    """Sums with their answers, in the form of the bundled ones: the space is part of what follows."""
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    lines = [{"id": f"s{n}", "text": question(n, "+", 2 * n), "reference": f" {3 * n}"} for n in range(30)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


@pytest.fixture(scope="module")
def task(exercises, tmp_path_factory):
    """The bundled task as the harness loads it."""
    pytest.MonkeyPatch().setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    manager, config = accuracy._task(Trial(data=exercises))
    return manager.load([config])["tasks"][TASK]


def test_the_bundled_task_asks_and_expects_what_the_file_says(task):
    document = list(task.test_docs())[7]
    assert (task.doc_to_text(document), task.doc_to_target(document)) == (question(7, "+", 14), " 21")


@pytest.mark.parametrize(("filtered", "right"), [("21", 1), ("22", 0), ("[invalid]", 0)])
def test_an_answer_is_right_with_or_without_the_space_before_it(task, filtered, right):
    document = list(task.test_docs())[7]
    assert task.process_results(document, [filtered]) == {"exact_match": right}


def test_few_shot_prompts_hold_other_exercises_solved(task):
    document = list(task.test_docs())[7]
    task.set_fewshot_seed(0)
    *shots, asked = task.fewshot_context(document, num_fewshot=3).split("\n\n")
    assert asked == question(7, "+", 14)
    assert len(shots) == 3
    sums = [
        tuple(map(int, re.fullmatch(r"Question: (\d+) \+ (\d+) = \?\nAnswer: (\d+)", one).groups())) for one in shots
    ]
    assert all(a + b == c and a != 7 for a, b, c in sums)


@pytest.mark.parametrize(
    ("said", "strict", "flexible"),
    [("21", "21", "21"), (" 21 ", "21", "21"), ("21 and on", "[invalid]", "21"), ("", "[invalid]", "[invalid]")],
)
def test_filters_find_the_answer(said, strict, flexible):
    from lm_eval.filters.extraction import RegexFilter

    filters = {one["name"]: one["filter"][0] for one in _config()["filter_list"]}
    found = {
        name: RegexFilter(regex_pattern=one["regex_pattern"]).apply([[said]], [{}])[0][0]
        for name, one in filters.items()
    }
    assert found == {"strict-match": strict, "flexible-extract": flexible}


def _config() -> dict:
    import yaml

    return yaml.safe_load(accuracy.TASK_FILE.read_text())


def answer(value: float = 0.75, stderr="N/A") -> dict:
    """What the child says of one trial."""
    return {
        "task": "gsm8k",
        "results": {
            "results": {
                "gsm8k": {
                    "alias": "gsm8k",
                    "exact_match,strict-match": value,
                    "exact_match_stderr,strict-match": stderr,
                    "exact_match,flexible-extract": 0.5,
                    "exact_match_stderr,flexible-extract": 0.01,
                }
            },
            "versions": {"gsm8k": 3.0},
            "n-shot": {"gsm8k": 5},
            "higher_is_better": {"gsm8k": {"exact_match": True}},
            "n-samples": {"gsm8k": {"original": 1319, "effective": 20}},
        },
        "counters": {"drafts": 10, "draft_tokens": 20, "accepted_tokens": 15, "accepted_per_position": [9, 6]},
        "seconds": 2.0,
    }


def scores(engine: str = "eagle K=2", **changes) -> list[Score]:
    return accuracy.read(answer(**changes), engine=engine, method="eagle", draft_tokens=2, backend=None)


def test_scores_keep_what_the_harness_says():
    flexible, strict = scores()
    assert (flexible.filter, flexible.value, flexible.stderr) == ("flexible-extract", 0.5, 0.01)
    assert strict.stderr is None, "the harness gave none, which is not 0"
    assert (strict.shots, strict.samples, strict.acceptance_length) == (5, 20, 2.5)


def test_the_table_has_the_form_of_the_pull_request():
    lines = accuracy.markdown(scores(stderr=0.0119)).splitlines()
    assert lines[2:] == [
        "|Tasks|Version|Filter|n-shot|Metric||Value||Stderr|",
        "|-----|------:|------|-----:|------|---|-----:|---|-----:|",
        "|gsm8k|3.0|flexible-extract|5|exact_match|↑|0.5000|±|0.0100|",
        "|||strict-match|5|exact_match|↑|0.7500|±|0.0119|",
    ]


def test_a_loss_of_accuracy_is_outside_of_the_errors():
    both = [*scores("vanilla", stderr=0.01), *scores(value=0.70, stderr=0.01)]
    table = accuracy.within_error(both, "vanilla").set_index("filter")
    assert table["within"].to_dict() == {"flexible-extract": True, "strict-match": False}
    assert table["difference"]["strict-match"] == pytest.approx(-0.05)


@pytest.mark.parametrize(
    ("trial", "mend"),
    [
        (Trial(data="/no/such/file.jsonl"), "restore the bundled models"),
        (Trial("gsm8k", data="/some/file"), "brings its own data"),
        (Trial(shots=-1), "no or some"),
        (Trial(limit=0), "one question or more"),
    ],
)
def test_a_trial_that_cannot_be_asked_is_one_line(trial, mend):
    with pytest.raises(AccuracyError, match=mend) as error:
        accuracy._check([trial])
        accuracy._data(trial)
    assert "\n" not in str(error.value)


def test_a_missing_harness_is_told_with_the_mend(monkeypatch):
    monkeypatch.setattr(accuracy.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AccuracyError, match="pip install lm-eval"):
        accuracy._check([Trial()])


@pytest.mark.slow
def test_one_engine_answers_zero_shot_and_few_shot(exercises, tmp_path):
    pair = models.bundled()["eagle"]
    spec = EngineSpec("eagle K=2", str(pair.target), "eagle", str(pair.draft), 2, max_model_len=256)
    trials = [Trial(shots=shots, limit=20, data=exercises) for shots in (0, 3)]
    with alive([spec], tmp_path) as engines:
        found = accuracy.evaluate(engines[spec.name], trials)
        with pytest.raises(AccuracyError, match="no such task") as error:
            accuracy.evaluate(engines[spec.name], [Trial("gsm9k", limit=1)])
        again = accuracy.evaluate(engines[spec.name], trials[:1])
    assert "\n" not in str(error.value)
    assert [(s.shots, s.filter) for s in found] == [
        (n, f) for n in (0, 3) for f in ("flexible-extract", "strict-match")
    ]
    assert {s.samples for s in found} == {20}
    assert all(0.7 <= s.value <= 1 and s.stderr is not None for s in found), "the bundled target has learned to add"
    assert all(s.drafts > 0 and s.acceptance_length >= 1 for s in found), "the draft was not used"
    assert [s.value for s in again] == [s.value for s in found[:2]], "greedy, so the same each time"
