# SPDX-License-Identifier: Apache-2.0
import re

import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

from aiterlab.suite import status
from aiterlab.suite.report import render_report, say_reused, write_report
from aiterlab.suite.status import NotebookStatus, list_cells

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
TABLE = '<table border="1" class="dataframe"><thead><tr><th>tree</th></tr></thead><tr><td>x</td></tr></table>'
HOSTILE = (
    "<script>alert(1)</script><img src='https://evil.example/x.png'><img src=x onerror=alert(2)>"
    "<iframe src='https://evil.example'></iframe><a href='javascript:alert(3)'>go</a>"
    "<div style=\"background-image:url('https://evil.example/y.png');color:red\">styled</div>"
    "<link rel=stylesheet href='https://evil.example/z.css'><svg onload=alert(4)></svg>"
)


def build(*cells, ending="ok", reason=None, error_cell=None, **facts):
    """Return a stamped notebook, as the runner hands it to the report."""
    notebook = new_notebook(cells=list(cells))
    facts.setdefault("provenance", {"git_commit": "c0ffee", "git_dirty": True, "versions": {"torch": "2.13.0"}})
    outcome = NotebookStatus("01_x", "20261122T123456Z-smoke", "smoke", {"workers": 3}, seconds=125.0, **facts)
    outcome.end(ending, reason)
    outcome.error_cell = error_cell
    outcome.cells = list_cells(notebook)
    for cell in outcome.cells:
        cell.status, cell.seconds = (ending, 1.0) if cell.number == error_cell else ("ok", 1.0)
    outcome.stamp(notebook)
    return notebook


def page_of(*cells, **options):
    return BeautifulSoup(render_report(build(*cells, **options)), "html.parser")


def shown(data, **metadata):
    return new_code_cell("show()", outputs=[new_output("display_data", data=data, metadata=metadata)])


def assert_loads_nothing(page):
    """No element of the page makes a browser ask anyone for anything."""
    assert not page.find_all(["script", "link", "iframe", "object", "embed", "base", "form"])
    for element in page.find_all(True):
        for name in ("src", "srcset", "data", "action", "background", "poster"):
            assert element.get(name, "data:").startswith("data:"), element
        assert not [name for name in element.attrs if name.startswith("on")], element
        if element.name != "a":
            assert not element.get("href"), element
        assert not re.search(r"url\(|@import", element.get("style", "")), element
    for style in page.find_all("style"):
        assert not re.search(r"url\(|@import|https?:", style.string)


def test_the_header_says_verdict_duration_run_commit_versions_and_parameters():
    header = page_of(new_markdown_cell("# Is it so?"), new_code_cell("1"), finding="It is so.").header
    text = header.get_text(" ", strip=True)
    assert header["class"] == ["banner", "good"]
    assert header.strong.string == "ok" and "It is so." in header.find(class_="verdict").get_text()
    for fact in ("2 min 5 s", "20261122T123456Z-smoke", "c0ffee with uncommitted changes", "torch 2.13.0", "workers 3"):
        assert fact in text


def test_an_unknown_commit_is_a_dash_with_its_reason():
    facts = {"git_commit": None, "missing": {"git_commit": "no repository"}, "versions": {"torch": None}}
    text = page_of(new_code_cell("1"), provenance=facts).header.get_text(" ", strip=True)
    assert "- (no repository)" in text and "torch - (not recorded)" in text


def test_a_failure_is_on_top_and_its_cell_is_open_and_linked():
    error = new_output("error", ename="E", evalue="v", traceback=["\x1b[31mE\x1b[0m: <b>v</b>"])
    cells = [new_code_cell("fine()"), new_code_cell("# Draw\nbroken()", outputs=[error])]
    page = page_of(*cells, ending="failed", reason="E: v", error_cell=2)
    assert page.header["class"] == ["banner", "bad"] and page.header.strong.string == "failed"
    assert "E: v" in page.header.find(class_="verdict").get_text()
    assert page.header.a["href"] == "#cell-2" and "Draw" in page.header.a.string
    failing, fine = page.find(id="cell-2"), page.find(id="cell-1")
    assert failing.details.has_attr("open") and not fine.details.has_attr("open")
    assert "E: <b>v</b>" in failing.find("pre", class_="error").get_text()
    assert failing.find("span", class_="ansi-red-fg") is not None


def test_a_finding_of_a_failed_run_is_not_the_verdict():
    page = page_of(new_code_cell("1"), ending="timeout", reason="too long", error_cell=1, finding="It is so.")
    assert "It is so." not in page.find("p", class_="verdict").get_text()
    assert "It is so." in page.find("p", class_="note").get_text()


def test_code_is_folded_and_never_deleted():
    page = page_of(new_code_cell("answer = 42  # why"))
    details = page.find("details", class_="code")
    assert not details.has_attr("open") and "answer = 42  # why" in details.get_text()
    assert "ok" in details.summary.get_text()


def test_the_page_loads_nothing_whatever_the_cells_hold():
    cells = [
        new_markdown_cell(HOSTILE + "\n\n![x](https://evil.example/md.png)"),
        shown({"text/html": HOSTILE}),
        new_raw_cell(HOSTILE + "<p>raw prose</p>", metadata={"raw_mimetype": "text/html"}),
        shown({"text/markdown": HOSTILE}),
        shown({"application/javascript": "alert(5)", "text/plain": "plain"}),
        shown({"image/png": PIXEL}),
        shown({"image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg' onload='alert(6)'/>"}),
        shown({"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "widget"}),
        new_code_cell("1", outputs=[new_output("stream", text=HOSTILE)]),
    ]
    page = page_of(*cells)
    assert_loads_nothing(page)
    assert "alert(1)" not in page.find("section", id="cell-1").get_text()
    assert "javascript:" not in str(page.find("section", id="cell-1"))
    assert page.find("p", string="raw prose") is not None
    assert "picture not embedded" in page.get_text() and "plain" in page.get_text()
    # What a program printed is shown as it is, as text.
    assert "<script>alert(1)</script>" in page.find("section", id="cell-7").find(class_="output").pre.get_text()


def test_status_words_are_escaped():
    page = page_of(new_code_cell("1"), ending="failed", reason="<script>alert(1)</script>", error_cell=1)
    assert_loads_nothing(page)
    assert "<script>alert(1)</script>" in page.header.get_text()


def test_links_in_prose_stay():
    page = page_of(new_markdown_cell("see [the pull request](https://github.com/vllm-project/vllm/pull/33749)"))
    assert page.main.a["href"] == "https://github.com/vllm-project/vllm/pull/33749"


@pytest.mark.parametrize("kind", ["display_data", "execute_result"])
def test_tables_stay_each_in_a_box_that_scrolls(kind):
    extra = {"execution_count": 1} if kind == "execute_result" else {}
    output = new_output(kind, data={"text/html": TABLE, "text/plain": "tree"}, **extra)
    table = page_of(new_code_cell("table", outputs=[output])).main.table
    assert [cell.string for cell in table.find_all(["th", "td"])] == ["tree", "x"]
    assert table.parent["class"] == ["scroll"] and not table.has_attr("border")


def test_figures_are_embedded_with_a_description():
    given = page_of(shown({"image/png": PIXEL}, **{"image/png": {"alt": 'Latency "by" backend'}})).main.img
    assert given["src"] == f"data:image/png;base64,{PIXEL}" and given["alt"] == 'Latency "by" backend'
    derived = page_of(new_markdown_cell("## Look"), shown({"image/png": PIXEL, "text/plain": "<Figure>"})).main
    assert derived.img["alt"] == "Figure: Look" and "<Figure>" not in derived.get_text()


def test_the_page_brings_its_own_style_for_light_dark_and_print():
    css = page_of(new_code_cell("1")).style.string
    assert "prefers-color-scheme: dark" in css and "@media print" in css and ".highlight" in css and "system-ui" in css


def test_write_report_writes_one_file(tmp_path):
    path = write_report(build(new_code_cell("1")), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("ending", "tone"),
    [
        (status.FAILED, "bad"), (status.TIMEOUT, "bad"), (status.KERNEL_DIED, "bad"), ("out-of-memory", "bad"),
        (status.SETUP_FAILED, "bad"), (status.INTERRUPTED, "warn"), ("skipped", "idle"), ("not run", "idle"),
        ("a new word", "bad"),
    ],
)  # fmt: skip
def test_every_ending_has_its_banner(ending, tone):
    header = page_of(new_code_cell("1"), ending=ending, reason="the reason").header
    assert header["class"] == ["banner", tone]
    assert header.strong.string == ending and "the reason" in header.p.find_next("p").get_text()
    css = page_of(new_code_cell("1")).style.string
    assert f".{tone} {{ --tone:" in css


def test_cells_after_the_stop_are_marked_not_run():
    notebook = build(new_code_cell("a"), new_code_cell("b"), new_code_cell("c"), ending="timeout", reason="too long")
    notebook.metadata.aiterlab["error_cell"] = 2
    for cell, word in zip(notebook.cells, ("ok", "timeout", "not run"), strict=True):
        cell.metadata.aiterlab["status"] = word
    page = BeautifulSoup(render_report(notebook), "html.parser")
    marked = [(cell["class"][1:], cell.select_one(".state").string) for cell in page.find_all("section")]
    assert marked == [([], "ok"), (["stopped"], "timeout"), (["not-run"], "not run")]
    assert "1 ok, 1 timeout, 1 not run" in page.header.get_text()


def test_contents_lead_to_every_section_also_to_those_of_one_name():
    cells = ["# Q\n\n## Look", "### A `code` <b>&amp;</b>\n\n#### Deep", "## Look", "## <script>alert(1)</script>x"]
    page = page_of(*map(new_markdown_cell, cells))
    for contents in page.select(".contents"):
        links = [(link.get_text(), page.find(id=link["href"][1:])) for link in contents.find_all("a")]
        assert [words for words, _ in links] == ["Look", "A code &", "Look", "x"]
        assert [target.name for _, target in links] == ["h2", "h3", "h2", "h2"]
        assert len({target["id"] for _, target in links}) == 4
    assert len(page.select(".contents")) == 2


def test_a_short_notebook_has_no_contents():
    assert not page_of(new_markdown_cell("# Q\n\n## Look")).select(".contents")


def test_a_result_that_is_reused_says_so_once_on_the_page_that_is_there(tmp_path):
    page = write_report(build(new_code_cell("answer = 42")), tmp_path)
    for _ in range(2):
        say_reused(tmp_path, "reused from run <before>, there since 2026-11-26 09:00:00 UTC")
        shown = BeautifulSoup(page.read_text(), "html.parser")
        assert shown.header.get_text().count("reused from run <before>, there since 2026-11-26 09:00:00 UTC") == 1
    assert "answer = 42" in shown.main.get_text()


def test_processes_that_had_to_be_ended_are_named():
    notebook = build(new_code_cell("1"))
    notebook.metadata.aiterlab["left_over"] = ["python -c <x>", "sleep 1000"]
    header = BeautifulSoup(render_report(notebook), "html.parser").header
    assert "python -c <x>, sleep 1000" in header.get_text()
