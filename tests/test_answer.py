# SPDX-License-Identifier: Apache-2.0
"""The answer: which records count, what is missing and why, and that every number is one of theirs."""

import json

import answer_records as made
import nbformat
import pytest

from aiterlab import paths, records
from aiterlab.answer import findings, shown, sources, tables
from aiterlab.answer.sources import EAGLE, FIX, KERNELS, REPRODUCE, STEMS
from aiterlab.suite.execution import Job, run_notebook
from aiterlab.suite.lint import lint_notebook

STEM = "06_x"
NOTEBOOK = paths.notebooks_dir() / "06_plot_accuracy_latency.ipynb"


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """A run's folder and a project without records."""
    (tmp_path / "run").mkdir()
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path / "run"))
    monkeypatch.setattr(paths, "results_dir", lambda: tmp_path / "results")
    return tmp_path


@pytest.fixture
def reference(places):
    home = places / "results" / "reference"
    for record in (made.cells(REPRODUCE), made.cells(FIX)):
        made.write(home, record)
    for record in (made.kernels(), made.eagle()):
        made.write(home / "nvidia-h200", record)
    return home


def read(runs=(), reference=True):
    return tables.read(sources.gather(STEM, runs, reference))


def reasons(frames):
    return {(row[0], row[1]): row[-1] for row in frames["sources"].itertuples(index=False, name=None)}


def test_the_reference_alone_answers_and_every_place_is_told(reference):
    frames = read()
    assert reasons(frames) == {
        **{(stem, "this run"): "no record" for stem in STEMS},
        **{(stem, "reference"): None for stem in STEMS},
    }
    row = frames["sources"].iloc[-1]
    assert (row["machine"], row["commit"], row["made"]) == ("NVIDIA H200", "c0ffee0", "2026-01-02T03:04:05+00:00")
    assert tables.missing(frames["sources"]) == {} and findings.lacking(frames).startswith("Every notebook")


def test_this_run_counts_before_a_named_run_before_the_reference(places, reference):
    made.write(places / "run", made.kernels())
    older, newer = made.write_all(places / "older"), made.write_all(places / "newer")
    why = reasons(read([str(older), str(newer)]))
    assert why[KERNELS, "this run"] is None and why[KERNELS, "newer"] == "the one of this run counts"
    assert why[EAGLE, "newer"] is None and why[EAGLE, "older"] == why[EAGLE, "reference"] == "the one of newer counts"


def test_without_the_reference_nothing_is_read_there(reference):
    frames = read(reference=False)
    assert set(frames["sources"]["from"]) == {"this run"}
    assert all(frames[name].empty for name in tables.COLUMNS)


def test_machines_of_a_notebook_stand_beside_one_another_gpus_first_and_no_more_than_a_page_holds(places, reference):
    made.write(places / "run", made.kernels(made.CPU))
    made.write(places / "third", made.kernels(made.GPU | {"device_name": "AMD Instinct MI300X"}))
    frames = read([str(places / "third")])
    assert list(frames["checks"]["machine"].unique()) == ["AMD Instinct MI300X", "NVIDIA H200"]
    assert reasons(frames)[KERNELS, "this run"] == "the page holds 2 machines of a notebook"


def test_a_cpu_of_the_reference_takes_no_place_beside_the_machine_at_hand(places, reference):
    made.write(reference / "cpu", made.kernels(made.CPU))
    made.write(places / "run", made.kernels(made.CPU))
    frames = read()
    assert list(frames["checks"]["machine"].unique()) == ["NVIDIA H200", "CPU (AMD EPYC)"]
    told = frames["sources"].query("notebook == @KERNELS and machine == 'CPU (AMD EPYC)'")
    assert list(told["reason"]) == [None, "another CPU says nothing about this one, nor about a GPU"]


def test_a_folder_is_meant_as_it_was_typed_and_a_wrong_one_is_told(places, monkeypatch):
    made.write_all(places / "runs" / "a")
    monkeypatch.setenv(paths.STARTED_IN_VARIABLE, str(places / "runs"))
    why = reasons(read(["a", "b"], reference=False))
    assert why[EAGLE, "a"] is None and why[EAGLE, "b"] == "no such folder: b"


def test_the_runner_says_why_there_is_no_record(places):
    folder = places / "run" / EAGLE
    folder.mkdir()
    (folder / "status.json").write_text(json.dumps({"status": "timeout", "reason": "stopped after its budget of 9 s"}))
    assert reasons(read())[EAGLE, "this run"] == "timeout: stopped after its budget of 9 s"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a JSON file"),
        ("[]", "one JSON object"),
        ('{"stem": "01_x"}', f"is not a record of {KERNELS}"),
        (f'{{"stem": "{KERNELS}"}}', "not a record that can be read: KeyError 'card'"),
        (json.dumps(made.kernels() | {"timings": {"workload": ["a"], "dtype": []}}), "ValueError"),
        (json.dumps(made.kernels() | {"ceilings": None, "provenance": None}), "TypeError"),
    ],
    ids=["half", "a list", "another's", "empty", "uneven", "null"],
)
def test_a_broken_record_is_a_line_and_an_older_one_takes_its_place(places, reference, text, said):
    path = places / "run" / KERNELS / "record.json"
    path.parent.mkdir()
    path.write_text(text)
    why = reasons(read())
    assert said in why[KERNELS, "this run"] and "\n" not in why[KERNELS, "this run"]
    assert str(places) not in why[KERNELS, "this run"]
    assert why[KERNELS, "reference"] is None


@pytest.mark.parametrize("stem", STEMS)
def test_any_one_record_may_be_missing(reference, stem):
    (path,) = reference.glob(f"**/{stem}/record.json")
    path.unlink()
    frames = read()
    assert tables.missing(frames["sources"]) == {stem: f"{stem} not run (this run: no record; reference: no record)"}
    assert stem in findings.lacking(frames)
    titles = findings.panels(frames)
    unsaid = [name for name, title in titles.items() if title.startswith("— ")]
    expected = {KERNELS: ["error", "kernels"], EAGLE: ["match", "tokens", "backends", "acceptance"]}
    assert unsaid == expected.get(stem, [])
    for table in (shown.verdicts(frames["cells"]), shown.errors(frames["checks"]), shown.matches(frames["scores"])):
        assert "nan" not in table.to_string().lower()
    assert shown.kernels(frames["kernels"]).empty == (stem == KERNELS)
    assert shown.fastest(frames["times"]).empty == (stem == EAGLE)


def test_trees_stand_in_time_and_what_was_made_of_one_behind_it(reference):
    cells = read()["cells"]
    assert list(cells["tree"].unique()) == ["release:0.15.1", "regressed", "hotfixed", "release:0.16.0"]
    assert not cells.duplicated(["tree", "arch", "aiter", "switch", "selection"]).any()


def test_the_suite_is_compared_from_the_same_keys_and_gathering_first_is_left_out(reference):
    kernels = read()["kernels"].set_index(["workload", "provider"])
    assert kernels.loc[("decode_1x8k", "suite"), "median_us"] == 10.0
    assert kernels.loc[("decode_1x8k", "flash_attn"), "suite_times"] == pytest.approx(1.2)
    assert kernels.loc[("decode_1x8k", "suite"), "share_of_ceiling"] == pytest.approx(0.75)  # 30 MB / 10 µs of 4 TB/s
    assert kernels.loc[("prefill_2x8k", "vllm_triton"), "suite_times"] == pytest.approx(4.0)


def test_scores_stand_by_backend_also_where_the_engine_has_one_alone(places):
    record = made.eagle(made.CPU)
    for row in record["scores"]:
        row |= {"engine": row["engine"].replace("SUITE_PAGED", "CPU_ATTN"), "backend": None}
    made.write(places / "run", record)
    table = shown.matches(read()["scores"])
    assert list(table["backend"]) == ["vLLM's choice", "vLLM's choice", "CPU_ATTN", "CPU_ATTN"]
    assert list(table["eagle3"]) == ["0.940 ± 0.020"] * 4 and list(table["vanilla"]) == ["0.950 ± 0.020"] * 4


def test_time_per_token_is_a_steps_over_its_tokens(reference):
    times = read()["times"]
    row = times[(times["weights"] == "models") & (times["K"] == 2)].iloc[0]
    assert row["ms_per_token"] == pytest.approx(1.2 / 2.4) and row["speed_up"] == pytest.approx(2.0)
    assert list(shown.fastest(times).columns[-4:]) == ["ms per token", "median round", "p80", "× vanilla"]


def test_findings_say_the_numbers_and_the_machine_of_each(reference):
    told = findings.whole(read())
    assert "2 of 8 cells of regressed end in Python's builtin aiter on simulated AMD GPUs" in told
    assert "none of release:0.15.1, hotfixed and release:0.16.0" in told
    assert "8 checks of kernels are right on NVIDIA H200, errors up to 40% of the tolerance" in told
    assert "vanilla's within a standard error in 4 of 4, off by 0.010 at most" in told
    assert "eagle3 with K = 2 has 2.00 times vanilla's speed on the models that ship (1x128)" in told
    assert "1.2 times as fast as FlashAttention, 4 times as fast as vLLM's Triton" in told
    assert findings.panels(read())["backends"].startswith("TRITON_ATTN takes 8.0 times as long a token as SUITE_PAGED")
    assert findings.headline(read()).startswith("On simulated AMD GPUs the fix takes 2 broken cells to 0; on NVIDIA")


def test_an_interpreters_times_are_never_a_kernels(places):
    made.write(places / "run", made.kernels(made.CPU))
    title = findings.panels(read())["kernels"]
    assert title == "On CPU (AMD EPYC) Triton's interpreter ran, which says nothing about a GPU"


def test_wrong_checks_and_scores_are_said(places):
    record, other = made.kernels(), made.eagle()
    record["checks"]["outcome"][0] = "wrong"
    other["scores"] = [row | {"value": 0.2 if row["method"] == "eagle3" else 0.95} for row in other["scores"]]
    made.write(places / "run", record)
    made.write(places / "run", other)
    frames = read()
    assert findings.panels(frames)["error"] == "1 of 8 checks of kernels are wrong or failed on NVIDIA H200"
    assert "within a standard error in 0 of 4, off by 0.750" in findings.panels(frames)["match"]
    assert "1 of 8 kernel checks fail, EAGLE's exact match is not everywhere vanilla's" in findings.headline(frames)


def test_the_notebook_keeps_the_habits_of_the_house():
    assert lint_notebook(NOTEBOOK) == []


@pytest.mark.slow
def test_the_notebook_draws_the_reference_beside_a_run(places):
    """Through the suite's runner: a run whose 04 was of a CPU, the repository's records, a folder that is not there."""
    run = places / "run"
    made.write(run, made.kernels(made.CPU))
    asked = {"profile": "smoke", "runs": [str(places / "gone")], "reference": True}
    job = Job(NOTEBOOK, run, "smoke", asked, asked, budget_s=300, provenance={"git_commit": "c0ffee", "versions": {}})
    outcome = run_notebook(job, say=lambda line: None)
    assert outcome.ok, outcome.reason
    record = records.load_record(job.folder / "record.json")
    assert record["finding"] == outcome.finding and record["parameters"] == asked
    assert record["figures"] == ["answer.png", "answer.pdf", "answer.svg"]
    assert all((job.folder / name).stat().st_size > 20_000 for name in record["figures"])
    assert "CPU (AMD EPYC)" in record["checks"]["machine"]
    assert {"no such folder: " + asked["runs"][0]} < set(record["sources"]["reason"])
    (picture,) = [
        output
        for cell in nbformat.read(job.folder / "executed.ipynb", as_version=4).cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert picture.metadata["image/png"]["alt"].startswith("One page, seven panels.")
    assert 'alt="One page, seven panels.' in (job.folder / "report.html").read_text()
