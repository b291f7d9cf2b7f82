# SPDX-License-Identifier: Apache-2.0
"""Tables about speculative decoding: names for people, and a dash where nothing is known."""

import json

import pandas as pd
import pytest

from aiterlab import paths, records
from aiterlab.spec_decode import tables
from aiterlab.spec_decode.models import Pair

STEP = {"draft_ms": 0.9, "verify_ms": 1.8, "sample_ms": 0.2, "host_ms": 0.7}


def fact(name="eagle3 K=4", **changes):
    row = {"group": "models", "name": name, "import_s": 10.7, "load_s": 2.4, "compile_s": None, "warm_up_s": 0.1}
    row |= {"dtype": "float32", "target_backends": ["CPUAttentionBackend"], "draft_backends": ["CPUAttentionBackend"]}
    row |= {"cuda_graph_mode": "NONE", "repairs": ["expand: temperatures of draft positions were memory"]}
    return row | changes


def greedy(engine="eagle3 K=4", **changes):
    row = {"task": "code", "base": "vanilla", "engine": engine, "requests": 12, "identical": 12, "near_ties": 0}
    row |= {"different": 0, "widest_near_tie_gap": None, "tolerance": 0.25, "compared_tokens": 768, "tokens": 768}
    return row | {"ok": True, "verdict": "identical"} | changes


def difference(request="code-001", near_tie=True, gap=0.125, **changes):
    row = {"engine": "eagle3 K=4", "base": "vanilla", "task": "code", "request_id": request, "position": 7}
    row |= {"vanilla_token": 5, "other_token": 6, "gap": gap, "near_tie": near_tie, "reason": "within 0.25"}
    return row | changes


def accepted(task="code", method="eagle3", k=4, group="models", **changes):
    row = {"group": group, "engine": f"{method} K={k}", "backend": None, "undrafted": 3, "method": method}
    row |= {"draft_tokens": k, "task": task, "temperature": 0.0, "drafted": 1192, "accepted": 480, "steps": 301}
    row |= {"acceptance_length": 2.61, "acceptance_length_low": 2.4, "acceptance_length_high": 2.8, "reason": ""}
    row |= {"rates": [0.62, 0.44, 0.0, 0.0], "conditional_rates": [0.62, 0.71, 0.0, None], "disagreement": ""}
    return row | changes


def timed(engine="vanilla", method="vanilla", k=0, step_ms=2.0, group="models", cell=(1, 128), turn=0, **changes):
    """A row of `latency.measure`."""
    rates = (0.6, 0.4, 0.3, 0.2)[:k] or None
    per_step = 1 + sum(rates or ())
    row = {"group": group, "engine": engine, "method": method, "K": k, "backend": None}
    row |= {"batch": cell[0], "context": cell[1], "acceptance": "measured" if k else None, "assumed_rates": None}
    row |= {"reason": None, "round": turn, "marked": turn == 2, "step_ms": step_ms, "step_p20_ms": step_ms}
    row |= {"step_p80_ms": step_ms, "tokens_per_step": per_step, "rates": rates}
    row |= dict.fromkeys(("decode_tok_s", "steady_tok_s"), step_ms and cell[0] * per_step / step_ms * 1e3)
    parts = STEP if k else STEP | {"draft_ms": 0.0, "verify_ms": 1.1}
    return row | (parts if turn == 2 else dict.fromkeys(parts)) | changes


def rounds(*arguments, **fields):
    return [timed(*arguments, **fields, turn=turn) for turn in range(3)]


@pytest.fixture
def times():
    rows = [*rounds(), *rounds("eagle3 K=2", "eagle3", 2, 3.2), *rounds("eagle3 K=4", "eagle3", 4, 3.6)]
    shape = {"group": "K = 2", "cell": (1, 32768), "backend": "FLASH_ATTN"}
    drawn = {"acceptance": "assumed", "assumed_rates": (0.6, 0.4)}
    rows += [*rounds(**shape, step_ms=9.0), *rounds("eagle3 K=2", "eagle3", 2, 10.0, **shape, **drawn)]
    for name, step_ms in (("FLASH_ATTN", 10.0), ("SUITE_PAGED", 10.2), ("TRITON_ATTN", 75.0)):
        long = {"group": "backends", "cell": (1, 32768), "backend": name}
        rows += rounds(f"vanilla {name}", step_ms=step_ms - 1, **long)
        rows += rounds(f"eagle3 K=2 {name}", "eagle3", 2, step_ms, **long, **drawn)
    return tables.times(rows)


# engines


def test_facts_name_what_attends_and_what_was_mended():
    table = tables.facts(
        [fact("vanilla", draft_backends=[], repairs=[]), fact(draft_backends=["Other"], compile_s=4.0)]
    )
    assert list(table.index) == ["vanilla", "eagle3 K=4"]
    assert list(table["attends with"]) == ["CPUAttentionBackend", "CPUAttentionBackend, Other"]
    assert list(table["computes in"]) == ["float32", "float32"]
    assert list(table["mended"]) == ["–", "expand"]
    assert list(table["of it compiling, s"]) == ["–", 4.0]


def test_models_are_named_without_a_folder_of_this_machine(tmp_path):
    home = paths.models_dir()
    pairs = {"vanilla": Pair("vanilla", home / "target"), "eagle": Pair("eagle", home / "target", tmp_path / "mine")}
    assert tables.models(pairs) == {"target": "bundled: target", "draft, eagle": "mine"}


# lossless


def test_losses_are_summed_over_tasks_for_each_engine_and_what_it_is_held_against():
    rows = [
        greedy(),
        greedy(task="prose", identical=11, near_ties=1, widest_near_tie_gap=0.125, compared_tokens=700),
        greedy("eagle3 K=4 B"),
        greedy("eagle3 K=4 B", base="vanilla B", identical=11, different=1, ok=False),
    ]
    table = tables.losses(rows)
    assert list(table.index) == ["eagle3 K=4", "eagle3 K=4 B", "eagle3 K=4 B"]
    assert list(table.columns) == [
        "against", "requests", "identical", "near-ties", "different", "tokens compared", "widest gap", "ok",
    ]  # fmt: skip
    assert list(table["requests"]) == [24, 12, 12] and list(table["tokens compared"]) == [1468, 768, 768]
    assert list(table["widest gap"]) == [0.125, "–", "–"]
    assert list(table["ok"]) == [True, True, False]
    assert tables.losses([]).empty


def test_differences_list_faults_first_and_say_how_many_were_left_out():
    rows = [difference(f"code-{n:03}", gap=n / 100) for n in range(20)] + [difference("bad", False, None)]
    table = tables.differences(rows)
    assert list(table.index[:2]) == ["fault", "near-tie"] and table["request"].iloc[0] == "bad"
    assert table["request"].iloc[1] == "code-019"  # the widest gap
    assert table.index[-1] == "and 9 more" and len(table) == tables.MOST_DIFFERENCES + 1
    assert tables.differences(rows[:3]).index.tolist() == ["near-tie"] * 3
    ended = tables.differences([difference(near_tie=False, gap=None, other_token=None)])
    assert ended["other token"].tolist() == ["–"]
    assert tables.differences([]).empty


def test_what_was_not_tested_has_dashes():
    row = {"engine": "eagle3 K=4", "tests": 0, "smallest_p_adjusted": None, "band": 0.001, "largest_distance": None}
    table = tables.sampled([row | {"ok": False, "verdict": "shows nothing"}])
    assert table.loc["eagle3 K=4", ["smallest p (Holm)", "largest distance"]].tolist() == ["–", "–"]


def test_broken_engines_of_either_check_share_a_table():
    by_tokens = greedy("broken verifier", identical=0, different=4, ok=False) | {"acceptance_length": 5.0}
    by_samples = {"engine": "vLLM as released", "task": "samples", "acceptance_length": 1.03, "verdict": "another"}
    table = tables.broken([by_tokens | {"as_it_should": True}, by_samples | {"as_it_should": None}])
    assert table["as it should"].tolist() == [True, "–"]
    assert table.loc["vLLM as released", ["identical", "different"]].tolist() == ["–", "–"]
    assert table.loc["broken verifier", "acceptance length"] == 5.0


def test_ranks_that_could_not_run_say_why():
    row = {"engine": "eagle3 K=4 TP=2 DP=1", "rank": 0, "acceptance_length": 2.5, "start_s": 4.7, "generate_s": 1.0}
    refused = {"engine": "eagle3 K=4 TP=8", "task": "code", "ok": None, "verdict": "needs 8 GPUs, there is 1"}
    table = tables.ranks([row | {"ok": True, "verdict": "identical"}, refused])
    assert list(table.columns) == ["rank", "acceptance length", "start, s", "answers, s", "ok", "verdict"]
    assert table.loc["eagle3 K=4 TP=8"].tolist() == ["–"] * 5 + ["needs 8 GPUs, there is 1"]
    assert tables.ranks([]).empty and list(tables.ranks([]).columns) == list(table.columns)


def test_a_server_is_shown_as_its_client_saw_it():
    row = {"engine": "eagle3 K=4", "task": "code", "ready_s": 34.5, "tokens_per_s": 290.0, "ttft_ms": 127.0}
    row |= {"tpot_ms": None, "acceptance_length": 2.6, "ok": True, "verdict": "identical"}
    table = tables.served([row])
    assert table.loc["eagle3 K=4", ["start, s", "tokens/s", "first token, ms", "per token, ms"]].tolist() == [
        34.5, 290.0, 127.0, "–",
    ]  # fmt: skip


# acceptance


def test_own_rows_are_of_engines_that_chose_their_backend():
    rows = [accepted(), accepted(group="backends", engine="eagle3 K=4 CPU_ATTN")]
    assert [row["engine"] for row in tables.own(rows)] == ["eagle3 K=4"]


def test_lengths_have_a_column_for_each_task_and_temperature():
    rows = [
        accepted(),
        accepted(temperature=1.0, acceptance_length=1.8, acceptance_length_low=None, reason="2 requests"),
    ]
    rows += [accepted("prose", acceptance_length=None), accepted(method="eagle", k=2)]
    rows += [accepted(group="backends", engine="eagle3 K=4 CPU_ATTN")]
    table = tables.lengths(rows)
    assert list(table.index) == ["eagle3 K=4", "eagle K=2"]
    assert list(table.columns) == ["code, T = 0", "code, T = 1", "prose, T = 0"]
    assert table.loc["eagle3 K=4"].tolist() == [
        "2.61 (2.40–2.80)",
        "1.80 (no interval: 2 requests)",
        "– (no draft was made)",
    ]
    assert table.loc["eagle K=2", "code, T = 1"] == "–"
    assert tables.lengths([]).empty


def test_positions_are_of_the_most_draft_tokens_with_their_counts():
    rows = [accepted(), accepted(k=2), accepted(temperature=1.0), accepted("prose", disagreement="5 drafts counted")]
    rows += [accepted(group="backends", k=7), accepted(method="eagle", rates=None, conditional_rates=None)]
    table = tables.positions(rows)
    assert list(table.index) == ["eagle3 K=4", "eagle3 K=4", "eagle K=4"]
    first = table.iloc[0]
    assert first["accepted of drafted"] == "480 of 1,192" and first["steps without a draft"] == 3
    assert first["by position, %"] == "62 44 0 0" and first["given the one before, %"] == "62 71 0 –"
    assert table["counters and steps"].tolist() == ["agree", "5 drafts counted", "agree"]
    assert table.iloc[2]["by position, %"] == "–"
    assert tables.positions([]).empty


# speed


def test_predictions_hold_the_models_and_the_shape_apart(times):
    rows = tables.predictions(times)
    assert [(row["group"], row["backend"], row["K"]) for row in rows] == [
        ("models", None, 2),
        ("models", None, 4),
        ("shape", "FLASH_ATTN", 2),
        ("shape", "SUITE_PAGED", 2),
        ("shape", "TRITON_ATTN", 2),
    ]
    assert rows[0]["measured_speed_up"] == pytest.approx(2.0 * 2 / 3.2)
    table = tables.predicted(rows)
    assert table["weights"].tolist() == ["models"] * 2 + ["shape"] * 3
    assert table["backend"].tolist() == ["vLLM's choice"] * 2 + ["FLASH_ATTN", "SUITE_PAGED", "TRITON_ATTN"]
    assert table["tokens per step"].tolist()[1:3] == ["2.50 (measured)", "2.00 (assumed)"]
    assert table["measured"].iloc[0] == table["median round"].iloc[0] == "1.25 ×" and table["cell"].iloc[2] == "1x32768"
    assert table["error, K left out"].iloc[2] == "–"  # one K alone predicts nothing
    assert tables.predicted([]).empty


def test_the_best_k_is_named_for_each_place(times):
    table = tables.best(times)
    assert table[["weights", "backend", "context", "best K"]].iloc[0].tolist() == ["models", "vLLM's choice", 128, 4]
    slower = tables.best(tables.times([*rounds(), *rounds("eagle3 K=2", "eagle3", 2, 8.0)]))
    assert slower["best K"].tolist() == [0]
    assert tables.best([]).empty


def test_our_kernel_is_held_against_the_others_on_the_shape_alone(times):
    rows = tables.against(times)
    assert {row["other"] for row in rows} == {"FLASH_ATTN", "TRITON_ATTN"} and {row["group"] for row in rows} == {
        "backends"
    }
    table = tables.ratios(rows).set_index(["against", "K"])
    assert table.loc[("TRITON_ATTN", 2), "times as fast"] == pytest.approx(75 / 10.2)
    assert table.loc[("TRITON_ATTN", 2), "acceptance"] == "assumed"
    assert tables.ratios([]).empty and tables.against([]) == []
    shown = tables.throughput(times)
    assert [row["backend"] for row in shown] == ["FLASH_ATTN", "SUITE_PAGED", "TRITON_ATTN"]
    assert all(row["tokens_per_s_low"] <= row["tokens_per_s"] for row in shown)


def test_figures_are_drawn_of_what_was_timed(times):
    found = tables.figures(times, tables.predictions(times))
    assert list(found) == ["models", "shape"]
    assert found["models"].assumed is None and found["shape"].assumed == tables.ASSUMED
    assert found["models"].title == "On the models that ship, eagle3 is fastest with K = 4: 1.39 times vanilla"
    assert found["models"].parts_title == "On the models that ship, the host takes 21% of a step"
    assert [row["draft_tokens"] for row in found["models"].rows] == [2, 4]
    assert all(row["predicted"] for row in found["models"].rows)
    assert [row["draft_tokens"] for row in found["models"].parts] == [0, 2, 4]
    assert {row["series"] for row in found["models"].parts} == {"eagle3"}  # vanilla stands beside its method
    assert len(found["shape"].rows) == 1  # backends have a figure of their own
    assert tables.figures([], []) == {}


def test_what_could_not_be_timed_is_no_figure():
    refused = timed("eagle3 K=2", "eagle3", 2, None, rates=None, reason="the KV cache holds 9")
    rows = tables.times([*rounds(), refused])
    assert rows[1]["speed_up"] is None and rows[1]["reason"] == "the KV cache holds 9"
    assert tables.figures(rows, tables.predictions(rows)) == {}


def test_kernels_own_times_are_of_this_device(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setattr(paths, "results_dir", lambda: tmp_path / "none")
    assert tables.kernels("A GPU") == []
    columns = {"workload": ["verify_q4_1x8k", "verify_q4_1x32k", "decode_1x8k"], "median_us": [30.0, None, 9.0]}
    record = {"finding": "x", "machine_simulated": False, "stand_ins": [], "card": {"device_name": "A GPU"}}
    records.save_record(tables.KERNELS_STEM, record | {"timings": columns}, parameters={})
    assert tables.kernels("A GPU") == [{"workload": "verify_q4_1x8k", "median_us": 30.0}]
    assert tables.kernels("Another") == []


# the record


def test_an_empty_frame_is_nothing_in_a_record():
    assert tables.record_rows(pd.DataFrame()) == {}
    found = tables.record_rows(pd.DataFrame({"requested": ["CPU_ATTN"], "outputs_agree": [None]}))
    assert json.loads(json.dumps(found)) == {"requested": ["CPU_ATTN"], "outputs_agree": [None]}


def test_proposals_are_shown_with_what_was_expected():
    row = {"tree": "regressed", "switch": "unset", "draft_tokens": 3, "check": "rejects", "check_expected": "rejects"}
    row |= {"proposal": None, "proposal_expected": None, "agrees": True, "arch": "gfx942"}
    table = tables.proposals(pd.DataFrame([row]))
    assert list(table.columns)[:3] == ["tree", "switch", "K"] and table["whole proposal"].tolist() == ["–"]
    assert tables.proposals(pd.DataFrame()).empty


def test_without_scores_a_sentence_stands_for_the_table():
    assert tables.accuracy_markdown([]) == "lm-eval was not asked."
    assert tables.scores([]) == []
