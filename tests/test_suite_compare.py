# SPDX-License-Identifier: Apache-2.0
import copy
import json
import shutil

import pytest
from bs4 import BeautifulSoup
from suite_runs import REFERENCE, add_notebook, add_run, changed, reference

from aiterlab.suite import compare, comparison, judgement
from aiterlab.suite.judgement import Verdict

REPRODUCE, FIX, AUDIT = "01_reproduce_regression", "02_apply_fix", "03_audit_backend_selection"
KERNELS, SPEC = "04_run_attention_kernels", "05_run_eagle_spec_decode"
H200, CPU = "nvidia-h200", "cpu"


@pytest.fixture(scope="module")
def kernels():
    return reference(KERNELS, H200)


def judged(before, after, name, **labels):
    """Return the one judgement of a metric in a case."""
    found = [
        one
        for one in judgement.judge_metrics(before, after)
        if one.metric.name == name and labels.items() <= dict((one.after or one.before).case).items()
    ]
    assert len(found) == 1, found
    return found[0]


def scaled(record, factor, row=1):
    """Return a copy in which one kernel takes `factor` times as long, with all its spread."""
    timings = record["timings"]
    columns = {f"timings__{name}": {row: timings[name][row] * factor} for name in ("median_us", "p20_us", "p80_us")}
    return changed(record, **columns)


CASE = {"workload": "verify_q4_1x8k", "dtype": "bfloat16", "provider": "suite", "implementation": "paged"}


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.0, Verdict.SAME), (1.08, Verdict.SAME), (1.5, Verdict.WORSE), (0.5, Verdict.BETTER)],
)
def test_a_time_has_changed_when_it_passes_tolerance_and_spread(kernels, factor, verdict):
    assert judged(kernels, scaled(kernels, factor), "latency", **CASE).verdict is verdict


def test_medians_whose_spreads_meet_are_the_same_however_far_apart(kernels):
    after = changed(scaled(kernels, 1.5), timings__p20_us={1: kernels["timings"]["median_us"][1]})
    one = judged(kernels, after, "latency", **CASE)
    assert one.verdict is Verdict.SAME and one.reason == "+50.0%, within the spread"


def test_a_time_without_spread_is_no_verdict(kernels):
    after = changed(scaled(kernels, 1.5), timings__p20_us={1: None}, timings__p80_us={1: None})
    after["timings"]["samples_us"][1] = []
    one = judged(kernels, after, "latency", **CASE)
    assert (one.verdict, one.reason) == (Verdict.NOT_COMPARABLE, "no spread recorded")


def test_one_sample_has_no_spread(kernels):
    columns = {f"timings__{name}": {1: 30.0} for name in ("median_us", "p20_us", "p80_us")}
    after = changed(kernels, **columns, timings__samples_us={1: [30.0]})
    assert judged(kernels, after, "latency", **CASE).reason == "no spread recorded"


def test_times_of_another_machine_are_not_compared_but_facts_are(kernels):
    after = scaled(kernels, 0.1)
    after["provenance"]["cpu_usable_count"] = 64
    after["checks"]["error_over_tolerance"][1] = 1.5
    one = judged(kernels, after, "latency", **CASE)
    assert one.verdict is Verdict.NOT_COMPARABLE and one.reason.startswith("another machine (NVIDIA H200, ")
    assert judged(kernels, after, "error_over_tolerance", **CASE).verdict is Verdict.WORSE


def test_a_machine_that_is_not_recorded_is_no_known_one(kernels):
    after = copy.deepcopy(kernels)
    after["provenance"]["cpu_model"] = None
    assert judged(kernels, after, "latency", **CASE).reason == "the machine is not recorded"


def test_an_error_is_held_against_its_limit_not_against_the_other_error(kernels):
    close = changed(kernels, checks__error_over_tolerance={1: 0.99})
    assert judged(kernels, close, "error_over_tolerance", **CASE).verdict is Verdict.SAME
    beyond = changed(kernels, checks__error_over_tolerance={1: 1.01})
    assert judged(kernels, beyond, "error_over_tolerance", **CASE).verdict is Verdict.WORSE
    assert judged(beyond, kernels, "error_over_tolerance", **CASE).verdict is Verdict.BETTER


def test_a_missing_value_says_where_and_why(kernels):
    after = changed(kernels, timings__median_us={1: None}, timings__reason={1: "not timed: it raised"})
    one = judged(kernels, after, "latency", **CASE)
    assert (one.verdict, one.reason) == (Verdict.NOT_COMPARABLE, "missing in the second: not timed: it raised")


def test_other_parameters_keep_apart_what_depends_on_them():
    before = reference(SPEC, H200)
    after = copy.deepcopy(before)
    after["parameters"] |= {"count": 8, "rounds": 1}
    case = {"group": "models", "engine": "eagle K=1", "task": "code", "temperature": "0"}
    assert judged(before, after, "acceptance_length", **case).reason == "other parameters: count"
    # How many rounds are timed changes the spread, not the time.
    timed = {"group": "models", "engine": "vanilla", "batch": "1"}
    assert judged(before, after, "decode_speed", **timed).verdict is Verdict.SAME


def test_higher_acceptance_and_speed_are_better():
    before = reference(SPEC, H200)
    after = copy.deepcopy(before)
    for name in ("acceptance_length", "acceptance_length_low", "acceptance_length_high"):
        after["accepted"][0][name] *= 1.5
    case = {"group": "models", "engine": "eagle K=1", "task": "code", "temperature": "0"}
    assert judged(before, after, "acceptance_length", **case).verdict is Verdict.BETTER
    assert judged(after, before, "acceptance_length", **case).verdict is Verdict.WORSE


def test_a_count_of_unchanged_sources_has_to_be_found_again():
    before = reference(REPRODUCE)
    fewer = changed(before, cells_trapped=0)
    assert judged(before, fewer, "cells_trapped").verdict is Verdict.WORSE
    fewer["trees"]["regressed"][1] = "another hash"  # somebody's checkout, repaired
    assert judged(before, fewer, "cells_trapped").verdict is Verdict.BETTER


def test_cells_are_compared_one_by_one():
    before = reference(REPRODUCE)
    after = changed(before, cells__verdict={1: "builtin trap"}, cells__backend={1: "TRITON_ATTN"})
    (change,) = judgement.judge_cells(before, after)
    assert change.verdict is Verdict.WORSE
    assert change.case_words == "release:0.15.1 gfx90a aiter present switch unset ROCM_AITER_FA shuffle_switch unset"
    assert change.facts == (("verdict", "works", "builtin trap"), ("backend", "ROCM_AITER_FA", "TRITON_ATTN"))


def test_the_audits_answers_are_compared_question_by_question():
    before = reference(AUDIT)
    letters = before["answers"]["release:0.32.0"]
    after = copy.deepcopy(before)
    after["answers"]["release:0.32.0"] = "c" + letters[1:]
    (change,) = judgement.judge_cells(before, after)
    assert change.case_words.startswith("release:0.32.0 gfx90a|present|unset")
    assert change.facts == (("answer", "ROCM_ATTN", "an error"),) and change.verdict is Verdict.WORSE


@pytest.mark.parametrize(
    ("tree", "old", "new", "verdict"),
    [
        ("release:0.16.0", "works", "other backend", Verdict.WORSE),  # the same source answers differently
        ("hotfixed", "builtin trap", "works", Verdict.BETTER),  # the fix is this project's own code
        ("hotfixed", "works", "broken", Verdict.WORSE),
        ("hotfixed", "works", "other backend", Verdict.NOT_COMPARABLE),
        ("release:0.16.0", "no answer", "works", Verdict.BETTER),
        ("hotfixed", "works", "no answer", Verdict.WORSE),
    ],
)
def test_a_changed_answer_is_judged_by_what_it_was_and_whose_code_gave_it(tree, old, new, verdict):
    record = reference(FIX)
    row = record["cells"]["tree"].index(tree)
    before, after = (changed(record, cells__verdict={row: answer}) for answer in (old, new))
    (change,) = judgement.judge_cells(before, after)
    assert change.verdict is verdict, change


@pytest.fixture
def results(tmp_path):
    add_run(tmp_path, "one", [REPRODUCE, FIX])
    return tmp_path


def run_compare(results, capsys, *argv):
    code = compare.main([str(word) for word in argv], results)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_run_is_the_same_as_itself_under_each_of_its_names(results, capsys):
    (results / "latest").symlink_to("one")
    run = results / "one"
    for name in ("one", "latest", run, f"{run}/"):
        code, out, _ = run_compare(results, capsys, "one", name)
        assert code == 0 and "= same: 0 worse, 0 better" in out.replace("\\", ""), name
    folder = run / FIX
    for name in (folder, folder / "record.json"):
        code, out, _ = run_compare(results, capsys, name, name)
        assert code == 0 and "229 of 229" in out and REPRODUCE not in out


def test_latest_may_be_a_text_file(results, capsys):
    (results / "latest").write_text("one\n")
    assert run_compare(results, capsys, "latest", "one")[0] == 0


def test_a_run_is_compared_with_the_reference_of_its_class_of_machine(results, capsys):
    shutil.copytree(REFERENCE, results / "reference")
    code, out, _ = run_compare(results, capsys, "reference", "one")
    assert code == 0 and "240 of 240" in out and "229 of 229" in out
    gpu = add_run(results, "gpu", [KERNELS], _04=reference(KERNELS, H200))
    assert run_compare(results, capsys, "reference", gpu)[0] == 0
    # Nothing of a GPU is held against a processor's record, also where there is one of that notebook.
    for path in (results / "reference" / H200).glob("*/record.json"):
        path.unlink()
    code, out, _ = run_compare(results, capsys, "reference", gpu)
    assert code == 3 and "the reference has no record of this class of machine" in out


def test_a_cpu_is_held_against_the_reference_of_a_cpu_in_all_but_its_times(results, capsys):
    shutil.copytree(REFERENCE, results / "reference")
    slow = scaled(reference(KERNELS, CPU), 10)
    add_run(results, "own", [KERNELS, SPEC], _04=reference(KERNELS, CPU), _05=reference(SPEC, CPU))
    add_run(results, "slow", [KERNELS, SPEC], _04=slow, _05=reference(SPEC, CPU))
    code, out, _ = run_compare(results, capsys, "reference", "slow")
    assert code == 0 and "0 worse, 0 better" in out and "its times are compared between your own runs only" in out
    code, out, _ = run_compare(results, capsys, "own", "slow")
    assert code == 1 and "own runs only" not in out
    wrong = changed(reference(KERNELS, CPU), checks__outcome={0: "wrong"})
    add_run(results, "wrong", [KERNELS], _04=wrong)
    code, out, _ = run_compare(results, capsys, "reference", "wrong")
    assert code == 1 and "outcome: ok | outcome: wrong" in out
    fewer = copy.deepcopy(reference(SPEC, CPU))
    for row in fewer["accepted"]:
        row |= {name: row[name] * 0.5 for name in row if name.startswith("acceptance_length") and row[name]}
    add_run(results, "fewer", [SPEC], _05=fewer)
    code, out, _ = run_compare(results, capsys, "reference", "fewer")
    assert code == 1 and "acceptance length: " in out


def test_what_only_one_side_has_is_told_by_that_sides_name(results, capsys, tmp_path):
    shutil.copytree(REFERENCE, results / "reference")
    less = changed(reference(REPRODUCE))
    less["cells"] = {name: column[:100] for name, column in less["cells"].items()}
    less["parameters"]["workers"] = 7
    add_run(results, "less", [REPRODUCE], _01=less)
    _, out, _ = run_compare(results, capsys, "reference", "less", "--html", tmp_path / "page.html")
    assert "only in the reference" in out and "| name | reference | run | notebooks |" in out
    page = BeautifulSoup((tmp_path / "page.html").read_text(), "html.parser")
    assert [term.text for term in page.header.find_all("dt")] == ["Reference", "Run"]
    _, out, _ = run_compare(results, capsys, "one", "less")
    assert "only in the first" in out


def test_something_worse_is_exit_code_1_and_named_first(results, capsys):
    record = changed(reference(FIX), cells__verdict={4: "builtin trap"}, cells_trapped_after=1)
    add_run(results, "two", [FIX], _02=record)
    code, out, _ = run_compare(results, capsys, "one", "two")
    assert code == 1 and "worse: 2 worse" in out.splitlines()[2]
    assert "cells trapped after | 0 cells | 1 cells" in out and "verdict: works" in out
    assert "not in the second" in out  # notebook 01 was not run again


def test_a_notebook_that_fails_now_is_worse_even_without_a_record(results, capsys):
    add_notebook(results / "two", FIX, "failed", "E: x", error_cell=1)
    code, out, _ = run_compare(results, capsys, "one", "two")
    assert code == 1 and "| ▼ worse | ending | ok | failed |" in out


def test_changes_are_listed_up_to_a_limit_and_then_counted(results, capsys):
    record = changed(reference(REPRODUCE), cells__verdict=dict.fromkeys(range(100), "no answer"))
    add_run(results, "two", [REPRODUCE], _01=record)
    code, out, _ = run_compare(results, capsys, "one", "two")
    assert code == 1 and out.count("not answered any more") == 40 and "and 60 more changes" in out


def test_parameters_environment_and_findings_that_differ_are_shown(results, capsys):
    record = reference(FIX)
    record["provenance"]["versions"]["torch"] = "9.9"
    record["provenance"]["environment"] = {"VLLM_ROCM_USE_AITER": "1"}
    record["parameters"]["machine"] = "gfx950"
    record["finding"] = "Now | otherwise."
    add_run(results, "two", [FIX], _02=record)
    _, out, _ = run_compare(results, capsys, "one", "two")
    assert '| versions.torch | "2.13.0+cpu" | "9.9" | 02 |' in out
    assert '| environment.VLLM_ROCM_USE_AITER | - | "1" | 02 |' in out.replace("\\-", "-")
    assert '| machine | "gfx942" | "gfx950" | 02 |' in out
    assert "Now \\| otherwise." in out


def test_html_and_markdown_files_are_written(results, capsys, tmp_path):
    record = changed(reference(FIX), cells_trapped_after=1, finding="<script>alert(1)</script>")
    add_run(results, "two", [FIX], _02=record)
    page, text = tmp_path / "c.html", tmp_path / "c.md"
    code, out, _ = run_compare(results, capsys, "one", "two", "--html", page, "--markdown", text)
    assert code == 1 and text.read_text() == out.removesuffix("\n")
    soup = BeautifulSoup(page.read_text(), "html.parser")
    assert not soup.find_all(["script", "link"]) and soup.header["class"] == ["banner", "bad"]
    line = soup.find("li", class_="worse").get_text(" ", strip=True)
    assert "cells trapped after" in line and "0 cells" in line and "1 cells" in line
    assert "<script>alert(1)</script>" in soup.get_text()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["one", "tow"], "no such run, folder or record 'tow'; there are: reference, latest, one"),
        (["ones", "one"], "did you mean 'one'?"),
        (["one", "junk.json"], "junk.json: cannot be read (JSONDecodeError); name a record.json"),
        (["one", "list.json"], "is no JSON object"),
        (["one", "other.json"], "it names no stem"),
        (["one", "empty"], "holds neither a run nor a record"),
        (["reference", "reference"], "name a run for one side"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(results, capsys, argv, words):
    (results / "junk.json").write_text("{")
    (results / "list.json").write_text("[]")
    (results / "other.json").write_text('{"a": 1}')
    (results / "empty").mkdir()
    if "reference" in argv:
        shutil.copytree(REFERENCE, results / "reference")
    if words.startswith("no such run"):
        for name in ("junk.json", "list.json", "other.json"):
            (results / name).unlink()
        (results / "empty").rmdir()
    code, out, err = run_compare(results, capsys, *argv)
    assert code == 2 and not out and words in err and err.count("\n") == 1


def test_a_file_that_cannot_be_written_is_bad_input(results, capsys):
    (results / "file").write_text("")
    code, _, err = run_compare(results, capsys, "one", "one", "--html", results / "file" / "c.html")
    assert code == 2 and err.count("\n") == 1


def test_records_of_two_notebooks_are_not_comparable(results, capsys):
    one, two = (results / "one" / stem / "record.json" for stem in (REPRODUCE, FIX))
    code, out, _ = run_compare(results, capsys, one, two)
    assert code == 3 and "not in the second" in out


def listed(out):
    """Return what the lists of a comparison say, without Markdown's signs."""
    return [line.replace("\\", "").replace("`", "") for line in out.splitlines() if line.startswith("- ")]


def fail(run):
    (run / FIX / "record.json").unlink()
    add_notebook(run, FIX, "failed", "E: x")


def never_begin(run):
    shutil.rmtree(run / FIX)


def break_record(run):
    (run / FIX / "record.json").write_text("{")


def lose_with_the_plan(run):
    shutil.rmtree(run / FIX)
    (run / "run.json").unlink()


@pytest.mark.parametrize(
    ("lose", "ended", "reason", "found_again"),
    [
        (fail, "failed", "record of the second: there is none", "better"),
        (never_begin, "not run", "record of the second: there is none", "better"),
        (break_record, "ok", "record of the second: cannot be read (JSONDecodeError)", "same"),
        (lose_with_the_plan, "absent", "not in the second", "same"),
    ],
)
def test_a_notebook_that_is_lost_is_worse(results, capsys, tmp_path, lose, ended, reason, found_again):
    lose(add_run(results, "two", [REPRODUCE, FIX]))
    page = tmp_path / "c.html"
    code, out, _ = run_compare(results, capsys, "one", "two", "--html", page)
    assert code == 1 and "**▼ worse: 1 worse, 0 better" in out
    assert f"| ▼ worse | ending | ok | {ended} | {reason} |" in out and not listed(out)  # one reason is enough
    (line,) = BeautifulSoup(page.read_text(), "html.parser").find_all("li", class_="worse")
    assert line.small.string == reason
    code, out, _ = run_compare(results, capsys, "two", "one")
    assert code == 0 and f" {found_again}: 0 worse" in out
    if found_again == "better":
        assert f"| ▲ better | ending | {ended} | ok |" in out and not listed(out)
    else:
        assert listed(out) == [f"- {FIX}: {reason.replace('second', 'first')} (1)"]


def test_a_run_that_was_planned_without_a_notebook_has_not_lost_it(results, capsys):
    add_run(results, "two", [FIX])
    code, out, _ = run_compare(results, capsys, "one", "two")
    assert code == 0 and listed(out) == [f"- {REPRODUCE}: not in the second (1)"]
    for asked in ("two/" + FIX, f"two/{FIX}/record.json"):
        assert run_compare(results, capsys, "one", asked)[0] == 0


def test_a_notebook_without_the_record_that_the_reference_of_its_machine_has_is_worse(results, capsys):
    shutil.copytree(REFERENCE, results / "reference")
    fail(results / "one")
    code, out, _ = run_compare(results, capsys, "reference", "one")
    assert code == 1 and "| ▼ worse | ending | ok | failed | record of the run: there is none |" in out
    code, out, _ = run_compare(results, capsys, "one", "reference")
    assert code == 0 and "| ▲ better | ending | failed | ok |" in out
    # On a processor nobody expects the record of a GPU, but that of a processor.
    add_notebook(results / "two", KERNELS, "failed", "E: x")
    assert run_compare(results, capsys, "reference", "two")[0] == 1
    shutil.rmtree(results / "reference" / CPU)
    assert run_compare(results, capsys, "reference", "two")[0] == 3
    machine = reference(KERNELS, H200)["provenance"]
    add_notebook(results / "two", KERNELS, "failed", "E: x", provenance=machine)
    assert run_compare(results, capsys, "reference", "two")[0] == 1
    planned = {"notebooks": [KERNELS], "provenance": machine}
    (results / "three").mkdir()
    (results / "three" / "run.json").write_text(json.dumps(planned))
    code, out, _ = run_compare(results, capsys, "reference", "three")
    assert code == 1 and "| ▼ worse | ending | ok | not run |" in out


def test_a_notebook_that_fails_after_its_record_is_worse_than_the_reference(results, capsys):
    shutil.copytree(REFERENCE, results / "reference")
    add_notebook(results / "one", FIX, "failed", "E: x", record=reference(FIX))
    code, out, _ = run_compare(results, capsys, "reference", "one")
    assert code == 1 and "| ▼ worse | ending | ok | failed | how the run ended |" in out and "229 of 229" in out


def test_a_run_of_some_notebooks_is_held_against_no_more_of_the_reference(results, capsys):
    shutil.copytree(REFERENCE, results / "reference")
    add_run(results, "two", [FIX])
    code, out, _ = run_compare(results, capsys, "reference", "two")
    assert code == 0 and "= same: 0 worse" in out and not listed(out)


def test_copied_records_of_which_one_is_missing_are_worse(results, capsys):
    for name, stems in (("before", (REPRODUCE, FIX)), ("after", (FIX,))):
        for stem in stems:
            (results / name / stem).mkdir(parents=True)
            (results / name / stem / "record.json").write_text(json.dumps(reference(stem)))
    code, out, _ = run_compare(results, capsys, "before", "after")
    assert code == 1 and "| ▼ worse | ending | recorded | absent | not in the second |" in out
    assert run_compare(results, capsys, "after", "before")[0] == 0
    add_notebook(results / "two", FIX, "failed", "E: x")
    code, out, _ = run_compare(results, capsys, f"after/{FIX}", f"two/{FIX}")
    assert code == 1 and "| ▼ worse | ending | recorded | failed |" in out


def test_copies_are_matched_by_the_notebook_that_they_name_whatever_their_folders_are_called(results, capsys):
    for name, record in (("before", reference(FIX)), ("after", changed(reference(FIX), cells_trapped_after=1))):
        (results / "copies" / name / "kept").mkdir(parents=True)
        for folder in (name, f"{name}/kept"):
            (results / "copies" / folder / "record.json").write_text(json.dumps(record))
    before, after = results / "copies" / "before", results / "copies" / "after"
    code, out, _ = run_compare(results, capsys, before, after)
    assert code == 1 and "1 worse" in out and FIX in out
    for folder in (before, after):
        (folder / "record.json").unlink()
        (folder / "kept").rename(folder / f"of {folder.name}")
    code, out, _ = run_compare(results, capsys, before, after)
    assert code == 1 and "1 worse" in out and FIX in out


def test_two_records_of_one_notebook_in_one_folder_are_bad_input(results, capsys):
    for name in ("first", "second"):
        (results / "copies" / name).mkdir(parents=True)
        (results / "copies" / name / "record.json").write_text(json.dumps(reference(FIX)))
    code, out, err = run_compare(results, capsys, "copies", "one")
    assert code == 2 and not out and f"copies: holds two records of {FIX}; name one of them" in err


def test_help_documents_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as ended:
        compare.main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    for line in ("0  same or better", "1  something is worse", "2  bad input", "3  nothing could be compared"):
        assert line in said


def test_the_verdict_of_all_is_the_worst_of_each():
    def of(*verdicts):
        made = [comparison.Notebook("x", ending=comparison.Ending("-", "-", verdict, "")) for verdict in verdicts]
        made.append(comparison.Notebook("y", obstacle="not in the second"))
        return comparison.Comparison("a", "b", tuple(made))

    assert of(Verdict.BETTER, Verdict.WORSE).verdict is Verdict.WORSE
    assert of(Verdict.BETTER).verdict is Verdict.BETTER
    same = comparison.Notebook("x", cell_counts=(1, 0, 0))
    assert comparison.Comparison("a", "b", (same, *of().notebooks)).verdict is Verdict.SAME
    assert of().verdict is Verdict.NOT_COMPARABLE


def test_two_runs_in_which_everything_failed_are_not_comparable(results, capsys):
    for name in ("two", "three"):
        add_notebook(results / name, FIX, "failed", "E: x", error_cell=1)
        add_notebook(results / name, SPEC, "timeout", "took too long", record=reference(SPEC, H200))
        (results / name / SPEC / "record.json").write_text("{")
    code, out, _ = run_compare(results, capsys, "two", "three")
    assert code == 3 and "0 same" in out and "record of the first: there is none" in out


def test_notebooks_that_only_ended_alike_are_not_comparable(results, capsys):
    times = {"stem": KERNELS, "timings": reference(KERNELS, H200)["timings"]}
    for cores in (2, 64):
        machine = {"cpu_model": "A processor", "cpu_usable_count": cores}
        add_run(results, f"of {cores}", [KERNELS], _04=times | {"provenance": machine})
    code, out, _ = run_compare(results, capsys, "of 2", "of 64")
    assert code == 3 and "0 same" in out and "another machine" in out


def test_a_record_of_an_unknown_notebook_is_compared_by_its_finding_alone(results, capsys, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"stem": "99_new", "finding": name, "parameters": None}))
    code, out, _ = run_compare(results, capsys, tmp_path / "a.json", tmp_path / "b.json")
    assert code == 3 and "| 99_new | a | b |" in out


@pytest.mark.parametrize("ending", ["skipped", "interrupted"])
def test_what_was_not_tried_is_not_worse(tmp_path, ending):
    add_run(tmp_path, "one", [REPRODUCE, FIX])
    add_notebook(add_run(tmp_path, "two", [REPRODUCE]), FIX, ending, "for a reason of its own")
    compared = comparison.compare_sides(*(comparison.find_side(name, tmp_path) for name in ("one", "two")))
    assert compared.verdict is Verdict.SAME
    assert "record of the second" in {notebook.stem: notebook for notebook in compared.notebooks}[FIX].obstacle


def test_what_an_interrupted_run_did_not_get_to_is_not_worse(tmp_path):
    add_run(tmp_path, "one", [REPRODUCE, FIX])
    run = add_run(tmp_path, "two", [REPRODUCE])
    for ending, verdict in (("interrupted", Verdict.SAME), ("failed", Verdict.WORSE)):
        facts = json.loads((run / "run.json").read_text()) | {"notebooks": [REPRODUCE, FIX], "status": ending}
        (run / "run.json").write_text(json.dumps(facts))
        sides = [comparison.find_side(name, tmp_path) for name in ("one", "two")]
        assert comparison.compare_sides(*sides).verdict is verdict, ending


def test_a_machine_that_is_not_recorded_is_of_no_class(results, capsys):
    shutil.copytree(REFERENCE, results / "reference")
    for name, facts in (("none", {}), ("no driver", {"accelerators": None, "cpu_model": "A processor"})):
        record = copy.deepcopy(reference(KERNELS, CPU))
        record |= {"provenance": facts, "card": {}}
        add_run(results, name, [KERNELS], _04=record)
        code, out, _ = run_compare(results, capsys, "reference", name)
        assert code == 3 and "the reference has no record of this class of machine" in out
    gpu = copy.deepcopy(reference(KERNELS, H200))
    del gpu["provenance"]["cpu_model"]  # as on ARM
    add_run(results, "arm", [KERNELS], _04=gpu)
    code, out, _ = run_compare(results, capsys, "reference", "arm")
    assert code == 0 and "the machine is not recorded" in out and "496 of 496" in out
