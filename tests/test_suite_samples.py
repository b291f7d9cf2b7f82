# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for programs: every raw sample in one tidy table, and records of a form that a schema describes."""

import csv
import json

import jsonschema
import pandas as pd
import pytest
from suite_runs import REFERENCE, add_notebook, add_run, reference

from aiterlab import paths, records
from aiterlab.suite import metrics, samples, schema
from aiterlab.suite.metrics import observe
from aiterlab.suite.results import read_run

REPRODUCE, FIX = "01_reproduce_regression", "02_apply_fix"
KERNELS, SPEC = "04_run_attention_kernels", "05_run_eagle_spec_decode"
RECORDS = sorted(REFERENCE.rglob("[0-9]*/record.json"))


def read_samples(run):
    return pd.read_csv(samples.write_samples(read_run(run)), dtype=str, keep_default_na=False)


def test_every_raw_sample_is_one_row(tmp_path):
    kernels, spec = reference(KERNELS, "nvidia-h200"), reference(SPEC, "nvidia-h200")
    run = add_run(tmp_path, "one", [KERNELS, SPEC], _04=kernels, _05=spec)
    table = read_samples(run)
    assert tuple(table.columns) == samples.COLUMNS
    origins = table[["run", "commit", "machine"]].drop_duplicates()
    commits = [record["provenance"]["git_commit"][:12] for record in (kernels, spec)]
    assert origins.values.tolist() == [["one", commit, "NVIDIA H200"] for commit in commits]
    row = kernels["timings"]["workload"].index("decode_1x8k") + 1
    case = {name: kernels["timings"][name][row] for name in ("workload", "provider", "implementation", "dtype")}
    chosen = table[(table.metric == "latency") & (table[list(case)] == pd.Series(case)).all(axis=1)]
    assert chosen.value.astype(float).tolist() == kernels["timings"]["samples_us"][row]
    assert chosen["sample"].astype(int).tolist() == list(range(50)) and set(chosen.unit) == {"µs"}
    steps = table[(table.metric == "step_time")]
    assert len(steps) == len(spec["timed"]) > 0
    counted = table[table.metric == "accepted_per_position"]
    assert counted.value.astype(float).sum() == sum(sum(row["accepted_per_position"]) for row in spec["accepted"])
    seconds = table[table.metric == "notebook_seconds"]
    assert seconds.value.tolist() == ["12.5", "12.5"]


def test_a_missing_sample_is_empty_and_has_a_reason(tmp_path):
    run = add_run(tmp_path, "one", [KERNELS], _04=reference(KERNELS, "nvidia-h200"))
    add_notebook(run, FIX, "failed", "E", error_cell=1)
    table = read_samples(run)
    missing = table[table.value == ""]
    assert (missing.reason != "").all() and (table[table.value != ""].reason == "").all()
    assert "not timed: float64, not timed" in set(missing.reason)
    cells = missing[(missing.stem == FIX) & (missing.metric == "notebook_cell_seconds")]
    assert cells.reason.tolist() == ["not run"] * 3


def test_words_with_commas_and_line_breaks_stay_one_field(tmp_path):
    record = {"stem": KERNELS, "timings": [{"workload": 'a,"b"\nc', "median_us": 1.5, "samples_us": [1.5]}]}
    run = add_run(tmp_path, "one", [KERNELS], _04=record)
    with open(samples.write_samples(read_run(run)), newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["metric"] == "latency")
    assert row["workload"] == 'a,"b"\nc' and row["value"] == "1.5"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.relative_to(REFERENCE).parent.as_posix())
def test_every_declared_metric_finds_its_rows_in_the_reference(path):
    record = json.loads(path.read_text())
    asked = record["parameters"]
    for metric in metrics.metrics_of(record["stem"]):
        if metric.name == "score" and not asked["accuracy"]:
            continue
        if metric.name == "speed_over_fa3" and record["card"]["device_kind"] == "cpu":
            continue
        seen = list(observe(metric, record))
        assert any(one.value is not None or one.samples for one in seen), metric.name
        assert len({one.case for one in seen}) == len(seen), f"{metric.name}: cases that cannot be told apart"
        assert metric.limit is None or any(one.limit is not None for one in seen), metric.name


def test_the_interval_of_a_share_stays_within_it():
    (score,) = (metric for metric in metrics.metrics_of(SPEC) if metric.name == "score")
    rows = [{"engine": "vanilla", "value": value, "stderr": 0.1} for value in (0.05, 0.5, 0.95)]
    seen = [(one.low, one.high) for one in observe(score, {"scores": rows})]
    assert seen == [(0, pytest.approx(0.25)), (pytest.approx(0.3), pytest.approx(0.7)), (pytest.approx(0.75), 1)]


VALIDATOR = jsonschema.Draft202012Validator(schema.record_schema(), format_checker=jsonschema.FormatChecker())


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(schema.record_schema())


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.relative_to(REFERENCE).parent.as_posix())
def test_every_reference_record_is_valid(path):
    errors = [
        f"{error.json_path}: {error.message[:200]}" for error in VALIDATOR.iter_errors(json.loads(path.read_text()))
    ]
    assert errors == []


def test_what_save_record_writes_is_valid(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path))
    facts = {"finding": None, "latency_ms": [1.0, None], "table_us": {"a": [1]}, "peak_memory_bytes": None}
    path = records.save_record("99_new", facts, parameters={"profile": "smoke"})
    assert list(VALIDATOR.iter_errors(json.loads(path.read_text()))) == []


@pytest.mark.parametrize(
    "change",
    [
        {"finding": 3},
        {"provenance": {}},
        {"parameters": {}},
        {"camelCase": 1},
        {"latency_ms": "3"},
        {"stem": "no number"},
        {"cells_trapped": 1.5},
        {"cells": "many"},
        {"trees": {"regressed": "hash"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_form_is_refused(change):
    assert list(VALIDATOR.iter_errors(reference(REPRODUCE) | change))


def test_a_record_without_its_tables_is_refused():
    record = reference(REPRODUCE)
    del record["cells"]
    assert [error.message for error in VALIDATOR.iter_errors(record)] == ["'cells' is a required property"]


def test_the_schema_lies_in_the_run(tmp_path):
    assert json.loads(schema.write_schema(tmp_path).read_text()) == schema.record_schema()
