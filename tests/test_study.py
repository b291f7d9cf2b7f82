# SPDX-License-Identifier: Apache-2.0
"""Studies of kernels: what is checked and timed, what survives a failure, and what tables and sentences make of it."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import run_all
from aiterlab import paths, records
from aiterlab.attention import cases, findings, goals, study, tables
from aiterlab.attention.providers import Implementation, Limits, Place
from aiterlab.attention.workloads import CASES, CPU_CASES, OPERATIONS, Workload
from aiterlab.measure.hardware import Ceiling

CPU, GPU = Place("simulated", "gfx942"), Place("cuda", "sm_90")
STEM = "04_x"
TINY = Workload("decode_1x9", "decode", ((8, 1),), heads=2, kv_heads=1, head_size=16, dtype="float32")
COPY = Ceiling("copy", "TB/s", 4e6, (1.0,))  # 4 TB/s
PRODUCTS = Ceiling("matmul_bfloat16", "TFLOP/s", 500e6, (1.0,))


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path))
    return tmp_path / STEM


def implementation(name="right", launch=None, **fields):
    def right(inputs, out):
        return lambda: out.copy_(inputs.expected()[0])

    limits = fields.pop("limits", Limits())
    return Implementation("suite", name, limits, launch or right, **fields)


def wrong(inputs, out):
    return lambda: out.zero_()


def interrupts(inputs, out):
    def launch():
        raise KeyboardInterrupt

    return launch


def journal(results):
    return [json.loads(line) for line in (results / study.JOURNAL_NAME).read_text().splitlines()]


# which workloads


@pytest.mark.parametrize("name", CASES)
def test_a_name_says_what_the_case_of_that_name_is(name, monkeypatch):
    expected = CASES[name]
    monkeypatch.setattr(cases.workloads, "CASES", {})
    assert cases.parse(name) == expected


def test_a_name_can_say_what_no_case_has():
    workload = cases.parse("verify_q4_16x4k_page64")
    assert workload.sequences == ((4092, 4),) * 16 and workload.page_size == 64
    assert cases.parse("extend_q16_1x100").sequences == ((100, 16),)
    assert cases.parse("decode_2x96_int8").scales == "token_head"


@pytest.mark.parametrize(
    "name", ["decode", "verify_2x8k", "decode_q4_2x8k", "decode_2x8k_fp4", "verify_q9_1x4", "encode_2x8k", "decode_0x9"]
)
def test_a_name_that_says_nothing_is_refused(name):
    with pytest.raises(ValueError, match=name.partition("_")[0]):
        cases.parse(name)


def test_the_place_decides_what_is_asked_by_default():
    assert cases.select(CPU, OPERATIONS, (), {}) == tuple(CPU_CASES.values())
    assert cases.select(GPU, OPERATIONS, (), {}) == tuple(CASES.values())
    assert {w.operation for w in cases.select(GPU, ["gather"], (), {})} == {"gather"}
    assert [w.head_size for w in cases.select(GPU, [], ["decode_1x8k"], {"head_size": 64})] == [64]
    assert cases.dtypes(CPU, []) == ["float16", "bfloat16"] and cases.dtypes(GPU, []) == ["bfloat16", "float16"]
    assert {w.dtype for w in cases.sweep(GPU, "auto")} == {"bfloat16", "float16"}
    assert {w.dtype for w in cases.sweep(CPU, "auto")} == {"float16", "float32"}
    assert 0 < len(cases.sweep(CPU, "tiny")) < len(cases.sweep(CPU, "small")) / 3 and cases.sweep(CPU, "none") == ()


@pytest.mark.parametrize(
    "ask",
    [
        lambda: cases.select(CPU, ["encode"], (), {}),
        lambda: cases.select(CPU, (), ["decode_1x8k"], {"layers": 3}),
        lambda: cases.sweep(CPU, "huge"),
    ],
)
def test_an_unknown_operation_field_or_sweep_is_refused(ask):
    with pytest.raises(ValueError, match=r"encode|layers|huge"):
        ask()


# checks and times


def test_only_what_was_right_is_timed_and_everything_is_in_the_journal(results):
    kinds = [
        implementation(),
        implementation("zero", wrong),
        implementation("other", limits=Limits(dtypes=("float16",))),
    ]
    lab = study.Study(STEM, CPU, [*kinds, implementation("gather", limits=Limits(("gather",)))], seed=0)
    lab.check("cases", [TINY], progress=lambda *_: None)
    lab.time([TINY], rounds=2, progress=lambda *_: None)
    assert list(lab.checked[0]) == list(lab.checks) and sorted(lab.timed[0]) == sorted(lab.timings)
    assert [(row["implementation"], row["outcome"]) for row in lab.checked] == [
        ("right", "ok"),
        ("zero", "wrong"),
        ("other", "refused"),
    ]
    assert [(row["implementation"], row["samples"]) for row in lab.timed] == [("right", 2), ("zero", 0)]
    assert "its check says wrong" in lab.timed[1]["reason"] and lab.timed[1]["median_us"] is None
    assert journal(results) == json.loads(json.dumps([*lab.checked, *lab.timed]))


def test_an_interrupt_keeps_what_was_found(results):
    lab = study.Study(STEM, CPU, [implementation(), implementation("stopped", interrupts)], seed=0)
    with pytest.raises(KeyboardInterrupt):
        lab.check("cases", [TINY, replace(TINY, name="next")])
    assert [row["implementation"] for row in lab.checked] == ["right"] and len(journal(results)) == 1


def test_a_device_that_fails_is_a_reason_not_an_end(results, monkeypatch):
    lab = study.Study(STEM, CPU, [implementation()], seed=0)
    lab.check("cases", [TINY])

    def broken(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(Workload, "make", broken)
    lab.time([TINY], rounds=1)
    lab.check("sweep", [replace(TINY, name="next")])
    assert lab.timed[0]["reason"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert lab.checked[1]["outcome"] == "failed" and "inputs could not be made" in lab.checked[1]["reason"]


def test_who_reads_whole_pages_is_checked_without_poison():
    def reads(inputs, out):
        return lambda: out.copy_(inputs.expected()[0] + 0 * inputs.k_cache.sum())

    lab = study.Study(
        STEM, CPU, [implementation("a", reads), implementation("b", reads, reads_whole_pages=True)], seed=0
    )
    lab.check("cases", [TINY])
    assert list(lab.checks["outcome"]) == ["wrong", "ok"]


def test_a_workload_is_asked_in_every_dtype_under_its_name():
    asked = study.with_dtype([TINY], ["float16", "bfloat16"])
    assert [(w.name, w.dtype) for w in asked] == [("decode_1x9", "float16"), ("decode_1x9", "bfloat16")]


# tables


def timing(workload, provider, name, median, **fields):
    w = CASES[workload]
    row = {"workload": workload, "operation": w.operation, "dtype": "bfloat16", "provider": provider}
    row |= {"implementation": name, "median_us": median, "p20_us": None, "p80_us": None}
    row |= {"p20_us": 0.9 * median, "p80_us": 1.1 * median} if median else {}
    row |= {"bytes_moved": w.bytes_moved(), "flops": w.flops(), "reason": "", "samples_us": [median]}
    return row | fields


@pytest.fixture
def rated():
    rows = [
        timing("decode_64x8k", "suite", "paged", 500.0),
        timing("decode_64x8k", "suite", "gather+varlen", 1500.0),
        timing("decode_64x8k", "flash_attn", "fa3", 600.0),
        timing("decode_64x8k", "flash_attn", "fa3_auto", 550.0),
        timing("decode_64x8k", "vllm_triton", "unified", 1000.0),
        timing("decode_64x8k", "torch_sdpa", "sdpa", None, reason="not timed: no reason"),
        timing("decode_64x8k_fp8", "suite", "paged", 280.0),
        timing("prefill_2x8k", "suite", "paged", 2200.0),
        timing("prefill_2x8k", "suite", "varlen", 1800.0),
        timing("prefill_2x8k", "flash_attn", "fa3", 1650.0),
        timing("prefill_2x8k", "flash_attn", "fa3_varlen", 1600.0),
    ]
    return tables.rates(pd.DataFrame(rows), {"copy": COPY, "matmul_bfloat16": PRODUCTS})


def test_rates_are_of_the_fewest_bytes_or_operations_under_what_was_measured(rated):
    decode, prefill = rated.iloc[0], rated[rated["workload"] == "prefill_2x8k"].iloc[0]
    work = CASES["decode_64x8k"].bytes_moved()
    assert decode["unit"] == "TB/s" and decode["rate"] == pytest.approx(work / 500e-6 / 1e12)
    assert decode["share_of_ceiling"] == pytest.approx(decode["rate"] / 4)
    assert prefill["unit"] == "TFLOP/s" and prefill["ceiling"] == pytest.approx(500)
    assert len(rated) == 10  # not what has no time


def test_ratios_compare_like_with_like_and_say_their_spread(rated):
    rows = tables.ratios(rated).set_index(["workload", "k_and_v"])
    decode = rows.loc["decode_64x8k", "pages"]
    assert (decode["suite_us"], decode["fa3_us"], decode["vllm_triton_us"]) == (500, 550, 1000)
    assert decode["over_fa3"] == pytest.approx(1.1)
    assert decode["over_fa3_low"] == pytest.approx(0.9 * 550 / 550)
    assert decode["over_fa3_high"] == pytest.approx(1.1 * 550 / 450)
    assert rows.loc["prefill_2x8k", "contiguous"]["over_fa3"] == pytest.approx(1600 / 1800)
    assert rows.loc["prefill_2x8k", "pages"]["over_fa3"] == pytest.approx(0.75)
    assert pd.isna(rows.loc["decode_64x8k_fp8", "pages"]["over_fa3"])
    shown = tables.comparison(tables.ratios(rated)).set_index("case")
    assert shown.loc["decode_64x8k", "× FA3"].replace(tables.JOINED, "") == "1.10 (0.90–1.34)"
    assert shown.loc["decode_64x8k_fp8", "× FA3"] == "–"


def test_two_steps_are_compared_with_the_same_providers_fused_kernel(rated):
    (row,) = tables.two_step(rated).itertuples()
    assert (row.provider, row.fused, row.ratio) == ("suite", "paged", 3.0)


def test_the_bar_says_what_was_reached_and_why_a_row_is_empty(rated):
    bar = goals.reached(tables.ratios(rated), tables.two_step(rated)).set_index(["workload", "quantity", "k_and_v"])
    assert bar.loc["decode_64x8k", "speed of FA3", "pages"]["met"]
    assert bar.loc["decode_64x8k_fp8", "speed of bf16", "pages"]["reached"] == pytest.approx(500 / 280)
    assert bar.loc["prefill_2x8k", "speed of FA3", "pages"]["reached"] == pytest.approx(0.75)
    assert bar.loc["prefill_2x8k", "speed of FA3", "contiguous"]["reached"] == pytest.approx(1600 / 1800)
    share = CASES["decode_64x8k"].bytes_moved() / 500e-6 / 4e12
    assert bar.loc["decode_64x8k", "copy bandwidth", "pages"]["reached"] == pytest.approx(share)
    missing = bar.loc["verify_q4_1x32k", "speed of FA3", "pages"]
    assert pd.isna(missing["reached"]) and pd.isna(missing["met"]) and "no time" in missing["reason"]
    bar = bar.reset_index()
    shown = goals.shown(bar)
    assert list(shown["workload"].iloc[:5]) == list(bar["workload"][bar["met"].notna()])
    assert list(shown["quantity"].iloc[5:]) == [f"{len(goals.GOALS) - 5} goals"]
    assert findings.bar(bar).startswith("5 of 5 goals are met")


def test_the_bar_has_every_row_that_was_promised():
    counted = pd.Series([goal.quantity for goal in goals.GOALS]).value_counts().to_dict()
    assert counted == {"speed of FA3": 20, "copy bandwidth": 5, "speed of gather + varlen": 2, "speed of bf16": 1}
    assert {goal.workload for goal in goals.GOALS} <= CASES.keys()


def test_empty_tables_make_tables_and_sentences():
    nothing = tables.rates(pd.DataFrame([timing("decode_64x8k", "suite", "paged", None, reason="none")]), {})
    ratios, steps = tables.ratios(nothing), tables.two_step(nothing)
    bar = goals.reached(ratios, steps)
    assert nothing.empty and ratios.empty and steps.empty and tables.comparison(ratios).empty
    said = [
        findings.speed(ratios, GPU, "a GPU"),
        findings.bar(bar),
        findings.two_step(steps, GPU),
        findings.ceiling(nothing, GPU),
    ]
    assert all(said) and not any("nan" in sentence for sentence in said)
    assert findings.code(pd.DataFrame()) == "No kernel of the suite was compiled for an AMD GPU"


def check(name, outcome, share=None, reason="", dtype="float16"):
    row = {"workload": "w", "dtype": dtype, "provider": "suite", "implementation": name, "outcome": outcome}
    return row | {"group": "cases", "reason": reason, "error_over_tolerance": share}


def test_sentences_about_checks_hide_no_failure():
    right = [check("paged", "ok", 0.4), check("varlen", "ok", 0.25), check("gather", "refused", reason="no")]
    assert findings.correctness(pd.DataFrame(right)) == (
        "2 checks of 2 implementations are right, errors up to 40% of the tolerance"
    )
    checked = pd.DataFrame([*right, check("varlen", "failed", reason="it raised")])
    assert findings.correctness(checked) == "1 of 3 checks are wrong or failed (suite varlen)"
    assert tables.faults(checked).to_dict("records") == [
        {"reason": "it raised", "implementations": "suite varlen", "workloads": "w"}
    ]
    assert list(tables.refusals(checked)["implementations"]) == ["suite gather"]
    counts = tables.outcomes(checked).set_index("implementation")
    assert counts.loc["varlen", ["ok", "failed"]].tolist() == [1, 1] and "gather" not in counts.index


def test_a_record_holds_null_where_a_table_has_nothing():
    frame = pd.DataFrame({"a": [1.0, None], "b": [[1.25], []], "c": pd.array([True, None], dtype="boolean")})
    assert tables.plain(frame) == {"a": [1.0, None], "b": [[1.25], []], "c": [True, None]}
    records.check_json(tables.plain(frame))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_the_notebook_runs_in_the_interpreter(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(paths.RUN_DIR_VARIABLE)
    stem = "04_run_attention_kernels"
    code = run_all.main(
        ["--profile", "smoke", "--only", stem, "--results", str(tmp_path / "r"), "--environment", "cpu"]
    )
    said = capsys.readouterr().out
    assert code == 0, said
    folder = tmp_path / "r" / "latest" / stem
    record = records.load_record(folder / "record.json")
    assert set(record["checks"]["outcome"]) == {"ok"}
    assert set(record["checks"]["group"]) == {"cases", "sweep", "adversarial"}
    assert {"suite", "aiter_triton", "vllm_triton", "torch_sdpa"} <= set(record["checks"]["provider"])
    assert record["machine_simulated"] and record["parameters"]["profile"] == "smoke"
    assert any("bf16" in reason for reason in record["refusals"]["reason"])
    timed = [
        samples
        for samples, reason in zip(record["timings"]["samples_us"], record["timings"]["reason"], strict=True)
        if not reason
    ]
    assert timed and all(samples for samples in timed)
    assert {path.name for path in Path(folder).glob("*.png")} == {
        f"{name}.png" for name in ("error", "latency", "throughput", "two_step", "occupancy")
    }
