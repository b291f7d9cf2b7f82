# SPDX-License-Identifier: Apache-2.0
"""A study of engines: what is asked for, what survives an engine's death, and what is left of it."""

import json
import os
import signal
from types import SimpleNamespace

import psutil
import pytest

from aiterlab import paths
from aiterlab.spec_decode import latency, lossless, models, processes, prompts, study
from aiterlab.spec_decode.engine import EngineError, Request

STEM = "05_x"


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path / "run"))
    return tmp_path / "run" / STEM


def journal(results):
    return [json.loads(line) for line in (results / study.JOURNAL_NAME).read_text().splitlines()]


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# what is asked for


def test_an_engine_is_named_as_in_tables():
    assert study.name("eagle3", 4) == "eagle3 K=4"
    assert study.name("vanilla", 0) == study.name("eagle", 0) == "vanilla"
    assert study.name("eagle", 2, "TRITON_ATTN") == "eagle K=2 TRITON_ATTN"


def test_without_names_the_models_that_ship_are_meant():
    found = study.pairs({})
    assert set(found) == {"vanilla", "ngram", "eagle", "eagle3"}
    assert found["eagle3"].target == paths.models_dir() / "target"


def test_named_models_are_taken_from_where_they_were_typed(tmp_path, monkeypatch):
    shipped = paths.models_dir()
    monkeypatch.setenv(paths.STARTED_IN_VARIABLE, str(shipped))
    found = study.pairs({"target": "./target", "eagle": "eagle"})
    assert set(found) == {"vanilla", "ngram", "eagle"}
    assert (found["eagle"].target, found["eagle"].draft) == (str(shipped / "target"), str(shipped / "eagle"))
    assert found["ngram"].draft is None
    hub = study.pairs({"target": "org/large", "eagle3": "org/head"})
    assert (hub["eagle3"].target, hub["eagle3"].draft) == ("org/large", "org/head")


@pytest.mark.parametrize(
    ("named", "mend"),
    [
        ({"eagle3": "org/head"}, "name the target too"),
        ({"target": "./nowhere"}, "nowhere: no such folder; name one that holds"),
        ({"target": "{models}/target", "eagle": "{models}/eagle3"}, "eagle3"),
    ],
)
def test_models_that_cannot_be_had_are_one_line(named, mend):
    with pytest.raises(models.ModelError, match=mend) as error:
        study.pairs({role: model.format(models=paths.models_dir()) for role, model in named.items()})
    one_line(error)


def test_the_last_draft_model_is_put_to_further_tests():
    assert study.last_drafted(["eagle3", "eagle", "ngram"]) == "eagle"
    with pytest.raises(ValueError, match=r"methods=\['ngram'\]: name eagle or eagle3 among them") as error:
        study.last_drafted(["ngram"])
    one_line(error)


def test_every_method_has_an_engine_for_each_k_but_ngram():
    found = study.specs(models.bundled(), ["eagle", "ngram"], [2, 4], seed=7)
    assert [one.name for one in found] == ["vanilla", "eagle K=2", "eagle K=4", "ngram K=4"]
    assert {one.seed for one in found} == {7}
    assert [bool(one.draft) for one in found] == [False, True, True, False]
    told = study.spec(models.bundled()["eagle"], 2, "TRITON_ATTN")
    assert (told.name, told.backend) == ("eagle K=2 TRITON_ATTN", "TRITON_ATTN")


def test_cells_of_the_models_and_of_the_shape_are_told_apart():
    cells = ["1x128", "8b:1x16384", "64x2048"]
    assert study.cells_of(cells) == [(1, 128), (64, 2048)]
    assert study.cells_of(cells, study.SHAPE) == [(1, 16384)]


@pytest.mark.parametrize("cell", ["128", "x128", "1x", "ax128", "1x128x2", "70b:1x128", "1 x 128", "-1x5"])
def test_a_cell_that_cannot_be_read_is_one_line_with_examples(cell):
    with pytest.raises(ValueError, match="such as 4x128, or 8b:1x16384") as error:
        study.cells_of(["1x128", cell])
    assert one_line(error).startswith(repr(cell))


def test_all_engines_have_room_for_the_largest_cell(monkeypatch):
    monkeypatch.setattr(study, "device", lambda: "cpu")
    found = study.options(["1x128", "64x2000", "2x4000"], 4, 128, 3)
    assert (found["max_num_seqs"], found["seed"]) == (64, 3)
    assert found["max_model_len"] == latency.sequence_tokens(4000, 4)
    assert study.options([], 4, 2000, 3)["max_model_len"] >= study.MAX_PROMPT_TOKENS + 2000
    assert found["cudagraph_batch_sizes"] == (1, 2, 4, 8, 64)
    least = study.options([], 4, 64, 0)
    assert (least["max_num_seqs"], least["max_model_len"]) == (8, 1024)
    assert least["max_num_batched_tokens"] == 8 * study.MAX_PROMPT_TOKENS  # on a CPU no prompt is parted
    monkeypatch.setattr(study, "device", lambda: "cuda")
    del least["max_num_batched_tokens"]
    assert study.options(["1x128", "8b:64x32768"], 4, 64, 0) == least  # the shape has engines of its own


def test_the_shape_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(study, "device", lambda: "cpu")
    with pytest.raises(ValueError, match="1 of the shape, which needs a GPU; leave out those of 8b:") as error:
        study.options(["1x128", "8b:1x128"], 4, 64, 0)
    one_line(error)


def test_prompts_are_the_held_out_ones_or_those_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.STARTED_IN_VARIABLE, str(tmp_path))
    (tmp_path / "mine.txt").write_text("one line\nanother\n")
    (tmp_path / "long.txt").write_text("word " * 2000)
    found = study.asked(["code", "file:mine.txt", "file:long.txt"], 1, models.bundled()["vanilla"].target, 0)
    assert list(found) == ["code", "mine.txt", "long.txt"]
    assert [len(requests) for requests in found.values()] == [1, 1, 1]
    assert len(found["long.txt"][0].token_ids) == study.MAX_PROMPT_TOKENS
    with pytest.raises(prompts.PromptError, match=r"nowhere\.txt: No such file") as error:
        study.asked(["file:nowhere.txt"], 1, models.bundled()["vanilla"].target, 0)
    one_line(error)
    with pytest.raises(prompts.PromptError, match="poems: no such task; there are code"):
        study.asked(["poems"], 1, models.bundled()["vanilla"].target, 0)


def test_tasks_of_lm_eval_are_asked_without_and_with_examples():
    found = study.trials({"gsm8k": 20, "left_out": 0})
    assert [(one.task, one.shots, one.limit) for one in found] == [("gsm8k", 0, 20), ("gsm8k", 5, 20)]
    assert study.trials({}) == []


def test_what_is_unknown_is_refused_before_anything_is_started():
    lab, asked = study.Study(STEM), {"code": [Request("a", "code", "x")]}
    for what in (["serve", "pipeline 2"], ["tensor two"]):
        with pytest.raises(ValueError, match="there are sabotage, backends, serve, tensor N and data N") as error:
            lab.beside(what, models.bundled()["eagle3"], 2, asked, 4, (), {})
        assert one_line(error).startswith(repr(what[-1]))


def test_answers_come_in_order_and_as_soon_as_they_are_there():
    seen = []
    with pytest.raises(ZeroDivisionError):
        for answer in study._told(lambda number: 6 / number, [3, 2, 0], "divisions"):
            seen.append(answer)
    assert seen == [2, 3]


class Answering:
    """Stands for a living engine: keeps what it is asked."""

    def __init__(self, name, draft_tokens, target):
        self.spec = SimpleNamespace(name=name, draft_tokens=draft_tokens, target=str(target))

    def generate(self, requests, **how):
        self.requests, self.how = requests, how
        return self.spec.name


def test_samples_continue_the_first_tokens_of_each_prompt(results, monkeypatch):
    monkeypatch.setattr(
        lossless, "compare_sampled", lambda one, other: SimpleNamespace(row=lambda: {"held": [one, other]})
    )
    pair, text = models.bundled()["eagle3"], "import this\n" * 100
    whole = prompts.tokenizer_of(pair.target)(text)
    lab = study.Study(STEM, seed=3)
    lab.engines = {name: Answering(name, k, pair.target) for name, k in ((study.VANILLA, 0), ("eagle3 K=2", 2))}
    lab.sample([Request("a", "code", text=text), Request("b", "code", token_ids=(5, 6, 7))], 10, 4, ["eagle3 K=2"])
    vanilla, drafted = lab.engines.values()
    for one in (vanilla, drafted):
        assert [request.token_ids for request in one.requests] == [whole[: study.SAMPLED_CONTEXT], (5, 6, 7)]
        assert (one.how["samples"], one.how["max_tokens"], one.how["temperature"]) == (10, 4, 1.0)
    assert vanilla.how["seed"] != drafted.how["seed"]
    assert lab.sampled == [{"held": [study.VANILLA, "eagle3 K=2"]}]
    assert len(whole) > study.SAMPLED_CONTEXT


# real engines

SMALL = {"max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 512, "kv_cache_bytes": 1 << 25}
TOKENS = 12


def children():
    """Processes below this one, less the preloaded one, which stays for the next study."""
    kept = processes._Preloaded.process
    living = [one for one in psutil.Process().children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]
    return {one.pid for one in living if kept is None or one.pid != kept.pid}


@pytest.mark.slow
def test_an_engine_that_dies_takes_nothing_with_it(results):
    before, pair = children(), models.bundled()["eagle3"]
    task = {"code": prompts.load("code", 2, max_prompt_tokens=48)}
    lab = study.Study(STEM)
    try:
        lab.start(study.specs({"vanilla": pair, "eagle3": pair}, ["eagle3"], [2], **SMALL))
        lab.decode(task, TOKENS)
        lab.losses()
        lab.sample(task["code"], 40, 2, ["eagle3 K=2"])
        compared = lab.beside(["sabotage", "backends"], pair, 2, task, TOKENS, (), SMALL)

        assert [row["engine"] for row in lab.accepted] == ["eagle3 K=2", f"eagle3 K=2 {compared['requested'][0]}"]
        assert [row["group"] for row in lab.accepted] == [study.MODELS, study.BACKENDS]
        assert all(row["ok"] for row in lab.greedy) and len(lab.greedy) == 3, lab.greedy
        assert lab.greedy[0]["tolerance"] == lossless.near_tie_tolerance(lab.facts[0]["dtype"])
        assert compared["outputs_agree"].tolist() == compared["as_requested"].tolist() == [True]
        broken = {row["engine"]: row["as_it_should"] for row in lab.broken}
        broken.pop(study.AS_RELEASED, None)  # so few samples may be right by chance: test_lossless.py takes more
        assert broken == {"corrupted draft": True, "broken verifier": True}
        assert len(lab.sampled) == 1

        written = journal(results)
        kept = {"facts": lab.facts, "accepted": lab.accepted, "greedy": lab.greedy, "sampled": lab.sampled}
        kept |= {"broken": lab.broken, "difference": lab.differences}
        for kind, rows in kept.items():
            assert [row for row in written if row["kind"] == kind] == [
                json.loads(json.dumps({"kind": kind} | row)) for row in rows
            ]

        os.kill(lab.engines["eagle3 K=2"].pid, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"eagle3 K=2: the engine ended .*killed by SIGKILL") as error:
            lab.decode(task, TOKENS, temperatures=(0.0, 1.0))
        one_line(error)
        assert journal(results)[: len(written)] == written
        assert (results / study.JOURNAL_NAME).read_text().endswith("}\n")
    finally:
        lab.stop()
    assert children() <= before
    assert not lab.engines
