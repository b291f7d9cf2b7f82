# SPDX-License-Identifier: Apache-2.0
"""What stands at the top of a run's folder for people: summary.md and index.html, and that all of it is written."""

import base64
import io
import json
import re
import time
from urllib.parse import unquote

import pytest
from bs4 import BeautifulSoup
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from nbformat.v4 import new_code_cell, new_output
from PIL import Image
from suite_runs import HOSTILE, REFERENCE, add_notebook, add_run, changed, drawing, reference

from aiterlab.suite import bundle, summary
from aiterlab.suite.markdown import bullets, compose, escape, link, table
from aiterlab.suite.metrics import METRICS

REPRODUCE, FIX, KERNELS, SPEC = (
    "01_reproduce_regression",
    "02_apply_fix",
    "04_run_attention_kernels",
    "05_run_eagle_spec_decode",
)
RECORDS = sorted(REFERENCE.rglob("[0-9]*/record.json"))
NAMES = ["samples.csv", "record.schema.json", "summary.md", "index.html"]


def rendered(markdown):
    """Return the Markdown as a code host shows it: raw HTML in it allowed, bare links made links."""
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    return BeautifulSoup(html, "html.parser")


def test_the_bundle_is_four_files_and_leaves_no_other(tmp_path):
    run = add_run(tmp_path, "one", [REPRODUCE])
    before = {path.name for path in run.iterdir()}
    assert [path.name for path in bundle.write_bundle(run)] == NAMES
    assert {path.name for path in run.iterdir()} == before | set(NAMES)


def test_the_bundle_of_a_run_takes_less_than_a_second(tmp_path):
    run = add_run(tmp_path, "one", [path.parent.name for path in RECORDS if path.parents[1] == REFERENCE])
    bundle.write_bundle(run)  # imports
    began = time.process_time()
    bundle.write_bundle(run)
    assert time.process_time() - began < 1.0


def test_the_summary_says_the_verdict_first_then_findings_changes_endings_metrics_and_files(tmp_path):
    worse = changed(reference(FIX), cells_trapped_after=1)
    run = add_run(tmp_path, "one", [REPRODUCE, FIX], _02=worse)
    add_notebook(run, KERNELS, "out-of-memory", "the kernel took 7.6 of 8 GiB", error_cell=2)
    bundle.write_bundle(run)
    text = (run / summary.SUMMARY_NAME).read_text()
    assert text.splitlines()[0] == (
        "# 2 of 3 notebooks ok; 1 out-of-memory: 04_run_attention_kernels (the kernel took 7.6 of 8 GiB); "
        "2 worse than the reference"
    )
    page = rendered(text)
    assert [title.string for title in page.find_all("h2")] == [
        "Findings", "Against the reference", f"Changes in {FIX}", f"Changes in {KERNELS}", "Endings", "Key metrics",
        "Files",
    ]  # fmt: skip
    endings = page.find("h2", string="Endings").find_next("table")
    rows = [[cell.get_text() for cell in row.find_all("td")] for row in endings.find_all("tr")[1:]]
    assert rows[0][:3] == [REPRODUCE, "ok", "12.5 s"] and rows[0][3].startswith("18 of 240 cells")
    assert rows[2] == [KERNELS, "out-of-memory", "12.5 s", "the kernel took 7.6 of 8 GiB"]
    metrics_shown = page.find("h2", string="Key metrics").find_next("table").get_text(" ", strip=True)
    assert "cells trapped - 18 - cells" in metrics_shown
    targets = [unquote(anchor["href"]) for anchor in page.find_all("a")]
    bundle.write_bundle(run)
    assert targets and all((run / target).exists() for target in targets)


def test_a_reused_result_says_so_and_since_when(tmp_path):
    run = add_run(tmp_path, "one", [FIX])
    told = {"reused_from": "before", "reused_since_utc": "2026-11-26T09:04:11+00:00"}
    add_notebook(run, REPRODUCE, record=reference(REPRODUCE), **told)
    bundle.write_bundle(run)
    words = "reused from run before, there since 2026-11-26 09:04:11 UTC"
    text = (run / "summary.md").read_text()
    assert words in text and "1 reused from an earlier run" in text
    for page in ("index.html", f"{REPRODUCE}/report.html"):
        assert words in BeautifulSoup((run / page).read_text(), "html.parser").get_text()


@pytest.mark.parametrize(
    "words",
    [
        HOSTILE,
        "a | b ` c ``` d",
        "[go](javascript:alert(1)) ![x](https://evil.example/x.png) <https://evil.example>",
        "@someone please, see https://evil.example and www.evil.example",
        "# title\n\n| a |\n| - |\n\n```\ncode",
        "- item", "1. item", "+ item", "===", "---", "> quote",
        "&lt;b&gt; &#64;someone", "$x$ ~~no~~ __init__ *b* _i_", "\\",
    ],
)  # fmt: skip
def test_words_of_a_notebook_stay_words_in_markdown(words):
    plain = " ".join(words.split())
    for text in (escape(words, 10_000), compose([table(["a", "b"], [[escape(words, 10_000), "end"]])], 20_000)):
        page = rendered(text)
        assert page.find(["a", "img", "script", "b", "em", "strong", "code", "li", "blockquote", "h1", "h2"]) is None
        assert page.find(["iframe", "style", "svg", "div", "del", "hr"]) is None
        shown = page.get_text().replace("\u2060", "")
        assert plain in shown, shown
        assert not re.search(r"(?<!\w)@\w|\w://|www\.", page.get_text())
    cells = page.find_all("td")
    assert [len(cells), cells[1].string] == [2, "end"]


def test_hostile_words_stay_words_in_summary_and_index(tmp_path):
    run = add_run(tmp_path, "one", [FIX], _02=changed(reference(FIX), finding=HOSTILE + " | `"))
    add_notebook(run, KERNELS, "failed", "E: " + HOSTILE + " | ` @someone", error_cell=1)
    bundle.write_bundle(run)
    page = rendered((run / "summary.md").read_text())
    assert page.find(["script", "img", "iframe", "style", "svg", "link"]) is None
    assert all("evil" not in anchor["href"] and ":" not in anchor["href"] for anchor in page.find_all("a"))
    page = BeautifulSoup((run / "index.html").read_text(), "html.parser")
    assert page.find(["script", "iframe", "svg", "link"]) is None
    assert all(image["src"].startswith("data:image/png") for image in page.find_all("img"))
    assert all(":" not in anchor["href"] for anchor in page.find_all("a"))
    assert "evil.example" not in "".join(style.string for style in page.find_all("style"))
    assert "<script>alert(1)</script>" in page.get_text()


def test_a_link_target_is_quoted():
    assert rendered(link("x", "a b)/<c>.html")).a["href"] == "a%20b%29/%3Cc%3E.html"


def test_a_long_document_is_cut_between_rows_with_a_notice():
    blocks = [
        bullets("First", ["one"]),
        table(["a"], [[str(i)] for i in range(10_000)], title="Long"),
        bullets("No", []),
    ]
    text = compose(blocks, 5_000)
    assert 4_500 < len(text.encode()) <= 5_000
    *_, last_row, empty, notice, _ = text.split("\n")
    assert re.fullmatch(r"\| \d+ \|", last_row) and not empty and "Cut here" in notice
    assert "## No" not in text


def test_a_table_of_which_no_row_fits_is_not_begun():
    text = compose([bullets("First", ["x" * 300]), table(["a"], [["y" * 800]], title="Long")], 700)
    assert "Long" not in text and "Cut here" in text


def test_a_huge_run_stays_under_64_kb(tmp_path):
    record = changed(reference(REPRODUCE), finding="é" * 100_000)
    run = add_run(tmp_path, "one", [REPRODUCE], _01=record)
    for index in range(400):
        folder = run / f"{index:03d}_{'n' * 80}"
        folder.mkdir()
        (folder / "status.json").write_text(json.dumps({"status": "failed", "reason": "é" * 5_000}))
    bundle.write_bundle(run)
    text = (run / summary.SUMMARY_NAME).read_text()
    assert len(text.encode()) <= 64_000 and "Cut here" in text


def test_secrets_and_home_do_not_reach_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_TOKEN", "t0psecret-value")
    monkeypatch.setenv("HOME", "/home/someone")
    record = changed(reference(FIX), finding="t0psecret-value in /home/someone/x")
    run = add_run(tmp_path, "one", [FIX], _02=record)
    record["cells"]["verdict"][0] = "t0psecret-value"
    facts = {
        "stem": KERNELS,
        "timings": [{"workload": "t0psecret-value", "median_us": None, "reason": "/home/someone"}],
    }
    add_notebook(run, KERNELS, record=facts)
    for path in bundle.write_bundle(run):
        text = path.read_text()
        assert "t0psecret" not in text and "/home/someone" not in text, path


@pytest.mark.parametrize("left", ["nothing", "folder", "status", "broken", "no report"])
def test_a_broken_or_half_finished_run_still_has_its_pages(tmp_path, left):
    run = tmp_path / "one"
    run.mkdir()
    folder = run / FIX
    if left != "nothing":
        folder.mkdir()
    if left == "status":
        (folder / "status.json").write_text('{"status": "interrupted", "reason": "the runner ended before"}')
    if left == "broken":
        for path in (run / "run.json", folder / "status.json", folder / "record.json", folder / "executed.ipynb"):
            path.write_text('{"half": ')
    if left == "no report":
        (folder / "status.json").write_text('{"status": "ok"}')
        (folder / "record.json").write_text(json.dumps(reference(FIX)))
    assert [path.name for path in bundle.write_bundle(run)] == NAMES
    index = BeautifulSoup((run / "index.html").read_text(), "html.parser")
    words = {
        "nothing": "No notebook has left anything",
        "folder": "No notebook has left anything",
        "status": "0 of 1 notebooks ok; 1 interrupted: 02_apply_fix (the runner ended before)",
        "broken": "0 of 1 notebooks ok; 1 interrupted: 02_apply_fix (status.json: cannot be read (JSONDecodeError))",
        "no report": "1 of 1 notebooks ok; the same as the reference",
    }
    if left in ("status", "broken"):
        words[left] += "; not comparable with the reference"
    assert index.h1.string == words[left]
    assert words[left] in (run / "summary.md").read_text().replace("\\", "")


def test_what_was_planned_and_never_started_is_shown_as_not_run(tmp_path):
    run = add_run(tmp_path, "one", [FIX], ending="interrupted")
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"notebooks": [FIX, KERNELS, "../outside"]}))
    bundle.write_bundle(run)
    index = BeautifulSoup((run / "index.html").read_text(), "html.parser")
    assert [pill.string for pill in index.select(".endings .pill")] == ["ok", "not run"]
    assert "the run was interrupted" in index.h1.string and index.header["class"] == ["banner", "bad"]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = sorted(
    {"status", "reason", "finding", "seconds", "cells", "provenance", "parameters", "notebooks", "run", "reused_from"}
    | {"peak_memory_bytes", "metadata", "questions", "answers", "answer_signs", "trees", "card", "stem", "left_over"}
    | {metric.table or metric.value for metric in METRICS if isinstance(metric.table, str)}
    | {"verdicts", "differences_to_upstream", "looked_at", "error_cell"}
)
OBJECTS = st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(told=st.tuples(OBJECTS, OBJECTS, OBJECTS, OBJECTS), stem=st.sampled_from([REPRODUCE, FIX, KERNELS, SPEC]))
def test_no_file_of_a_run_can_keep_its_pages_from_being_written(tmp_path_factory, told, stem):
    facts, status, record, notebook = told
    run = tmp_path_factory.mktemp("run")
    (run / stem).mkdir()
    files = {"status.json": status, "record.json": record | {"stem": stem}, "executed.ipynb": notebook}
    for name, value in files.items():
        (run / stem / name).write_text(json.dumps(value))
    (run / "run.json").write_text(json.dumps(facts))
    assert [path.name for path in bundle.write_bundle(run)] == NAMES


def test_the_index_shows_figures_small_with_their_description_and_leads_to_the_report(tmp_path):
    run = add_run(tmp_path, "one", [FIX])
    bundle.write_bundle(run)
    page = BeautifulSoup((run / summary.INDEX_NAME).read_text(), "html.parser")
    (image,) = page.select(".figures img")
    assert image["alt"] == "Error by provider" and image["src"].startswith("data:image/png;base64,")
    assert image.parent["href"] == f"{FIX}/report.html#cell-3"
    assert len(image["src"]) < 20_000
    assert Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))).width == 900  # as it was drawn


def test_memory_of_gpus_has_a_column_where_there_are_any(tmp_path):
    run = add_run(tmp_path, "one", [REPRODUCE, FIX])
    heads = []
    for told in ({}, {"peak_gpu_memory_bytes": 3 * 2**30}):
        add_notebook(run, FIX, **told)
        bundle.write_bundle(run)
        table = BeautifulSoup((run / summary.INDEX_NAME).read_text(), "html.parser").select_one("table.endings")
        heads.append([head.text for head in table.thead.find_all("th")])
    assert "GPU memory" not in heads[0] and heads[1].index("GPU memory") == 4
    rows = [[cell.text for cell in row.find_all(["th", "td"])] for row in table.tbody.find_all("tr")]
    assert [row[4] for row in rows] == ["-", "3.00 GiB"] and {len(row) for row in rows} == {len(heads[1])}


def test_figures_that_stand_side_by_side_on_the_index_are_smaller(tmp_path):
    figure = new_output("display_data", data={"image/png": drawing()})
    spoilt = new_output("display_data", data={"image/png": "no picture"})
    cells = [new_code_cell("figure", outputs=[spoilt, figure]), new_code_cell("figure", outputs=[figure] * 3)]
    run = add_run(tmp_path, "one", [FIX])
    add_notebook(run, FIX, cells=cells)
    bundle.write_bundle(run)
    page = BeautifulSoup((run / summary.INDEX_NAME).read_text(), "html.parser")
    sources = [image["src"].partition(",")[2] for image in page.select(".figures img")]
    assert [Image.open(io.BytesIO(base64.b64decode(source))).width for source in sources] == [720] * 3
