# SPDX-License-Identifier: Apache-2.0
import json
import math
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from aiterlab import paths, provenance, records
from aiterlab.records import RecordError, atomic_write_bytes, atomic_write_text, load_record, save_record


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path / "run"))
    return tmp_path / "run"


def test_a_record_comes_back_with_parameters_and_provenance(run_dir):
    written = save_record("01_x", {"latency_ms": 1.5, "runs": [1, 2], "reason": None}, parameters={"workers": 2})
    assert written == run_dir / "01_x" / "record.json"
    record = load_record(written)
    assert (record["stem"], record["latency_ms"], record["runs"], record["reason"]) == ("01_x", 1.5, [1, 2], None)
    assert record["parameters"] == {"workers": 2}
    assert record["provenance"]["python"]


@pytest.mark.parametrize(
    ("record", "path"),
    [
        ({"latency_ms": math.nan}, "latency_ms"),
        ({"cells": [{"error": 1.0}, {"error": math.inf}]}, "cells[1].error"),
        ({"cells": [np.int64(3)]}, "cells[0]"),
        ({"where": Path("x")}, "where"),
        ({"counts": {1: 2}}, "counts"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_its_path_and_nothing_is_written(run_dir, record, path):
    with pytest.raises(RecordError) as caught:
        save_record("01_x", record, parameters=None)
    assert str(caught.value).startswith(f"{path}:")
    assert not list(run_dir.rglob("*.json"))


@pytest.mark.parametrize("key", ["Latency", "a.b", "a b", "", "provenance", "parameters", "stem"])
def test_keys_are_flat_names_that_save_record_does_not_write_itself(run_dir, key):
    with pytest.raises(RecordError):
        save_record("01_x", {key: 1}, parameters=None)


def test_parameters_are_checked_like_the_record(run_dir):
    with pytest.raises(RecordError, match=r"^parameters\.limit:"):
        save_record("01_x", {}, parameters={"limit": math.inf})


def test_load_record_refuses_what_save_record_would_not_write(tmp_path):
    for text in ("[1]", "{", '{"a": NaN}'):
        path = tmp_path / "record.json"
        path.write_text(text)
        with pytest.raises(RecordError):
            load_record(path)


def test_home_and_secrets_do_not_reach_the_record(run_dir, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    monkeypatch.setenv("HOME", "/home/someone")
    path = save_record("01_x", {"tree": "path:/home/someone/vllm", "said": "used hf_abcdefghijkl"}, parameters=None)
    text = path.read_text()
    assert "path:~/vllm" in text
    assert "someone" not in text and "abcdefghijkl" not in text


def test_a_full_run_that_cannot_say_where_it_ran_keeps_its_data_beside(run_dir, monkeypatch):
    full = {"profile": "full"}
    monkeypatch.setattr(provenance, "missing_for_full", lambda facts: ["git_commit (no repository)"])
    with pytest.raises(RecordError) as caught:
        save_record("01_x", {"latency_ms": 1.5}, parameters=full)
    message = str(caught.value)
    assert "git_commit (no repository)" in message and "01_x/record.unfit.json" in message and "\n" not in message
    assert [path.name for path in (run_dir / "01_x").iterdir()] == ["record.unfit.json"]
    assert load_record(run_dir / "01_x" / "record.unfit.json")["latency_ms"] == 1.5
    # the other profiles do not mind, and a full run that can say it leaves nothing unfit behind
    assert save_record("02_x", {}, parameters={"profile": "standard"}).name == "record.json"
    monkeypatch.setattr(provenance, "missing_for_full", lambda facts: [])
    save_record("01_x", {"latency_ms": 1.5}, parameters=full)
    assert [path.name for path in (run_dir / "01_x").iterdir()] == ["record.json"]


def test_a_full_record_says_whether_its_machine_was_simulated(run_dir):
    with pytest.raises(RecordError, match=r"machine_simulated \(the record does not say\)") as caught:
        save_record("01_x", {"latency_ms": 1.5}, parameters={"profile": "full"})
    assert "\n" not in str(caught.value)
    assert [path.name for path in (run_dir / "01_x").iterdir()] == ["record.unfit.json"]


def test_a_record_says_what_the_notebook_alone_knows(run_dir):
    path = save_record("01_x", {"machine_simulated": True}, parameters={"seed": 7})
    facts = load_record(path)["provenance"]
    assert (facts["seed"], facts["machine_simulated"], facts["attention_backends"]) == (7, True, None)
    assert facts["missing"]["attention_backends"] and facts["packages_sha256"]


def test_half_a_surrogate_pair_does_not_stop_a_write(run_dir, tmp_path):
    path = save_record("01_x", {"said": "a\ud800b"}, parameters=None)
    assert load_record(path)["said"] == "a\ufffdb"
    assert json.loads(atomic_write_text(tmp_path / "x.json", '"\ud800"').read_text()) == "\ud800"


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    target = atomic_write_text(tmp_path / "deep" / "file.txt", "old")

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        atomic_write_bytes(target, b"new")
    assert target.read_text() == "old"
    assert [entry.name for entry in target.parent.iterdir()] == ["file.txt"]


def test_the_file_is_replaced_from_its_own_folder_after_it_reached_the_disk(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (calls.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(Path(a).parent == Path(b).parent), replace(a, b)))
    atomic_write_text(tmp_path / "file.txt", "text")
    assert calls == ["fsync", True]


def test_written_files_may_be_read_by_others_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        path = atomic_write_text(tmp_path / "file.txt", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_without_a_run_a_notebook_writes_beside_the_runs(tmp_path, monkeypatch):
    monkeypatch.delenv(paths.RUN_DIR_VARIABLE, raising=False)
    monkeypatch.setattr(paths, "results_dir", lambda: tmp_path)
    assert paths.output_dir("01_x") == tmp_path / "interactive" / "01_x"
    assert (tmp_path / "interactive" / "01_x").is_dir()


@pytest.mark.parametrize("stem", ["", "../x", "a/b", "."])
def test_a_stem_cannot_leave_its_folder(run_dir, stem):
    with pytest.raises(ValueError, match="plain name"):
        paths.output_dir(stem)


def test_the_cache_follows_its_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(paths.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert paths.cache_dir() == tmp_path / ".cache" / "aiterlab"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert paths.cache_dir() == tmp_path / "xdg" / "aiterlab"
    monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path / "mine"))
    assert paths.cache_dir() == tmp_path / "mine"


def test_json_is_written_for_people():
    assert records.dump_json({"b": 1, "a": "ü"}) == '{\n  "b": 1,\n  "a": "ü"\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.dump_json(math.nan)
    assert json.loads(records.dump_json(None)) is None


def test_lines_that_threads_add_to_a_journal_do_not_mix(tmp_path):
    journal, long = tmp_path / "journal.jsonl", "x" * 100_000  # more than a buffer holds
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: records.append_line(journal, {"n": n, "text": long}), range(40)))
    assert sorted(json.loads(line)["n"] for line in journal.read_text().splitlines()) == list(range(40))


def test_a_line_that_a_full_disk_takes_in_part_is_taken_back(tmp_path, small_disk):
    journal = tmp_path / "journal.jsonl"
    records.append_line(journal, {"n": 1})
    with small_disk(100), pytest.raises(OSError, match="File too large"):
        records.append_line(journal, {"n": 2, "text": "x" * 200})
    records.append_line(journal, {"n": 3})
    assert [json.loads(line) for line in journal.read_text().splitlines()] == [{"n": 1}, {"n": 3}]
