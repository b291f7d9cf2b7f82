# SPDX-License-Identifier: Apache-2.0
"""What a reader sees of the pages: in a real browser, the network off, on a desk and on a phone, light and dark."""

import pytest
from browser import PROGRAM, Browser
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from suite_runs import HOSTILE, add_notebook, add_run, changed, reference

from aiterlab.suite import bundle, compare
from aiterlab.suite.results import read_run

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no chromium or google-chrome on PATH: apt-get install chromium"
)
STEM, FAILED = "02_apply_fix", "04_run_attention_kernels"
PAGES = ("index.html", f"{STEM}/report.html", f"{FAILED}/report.html", "06_plot_accuracy_latency/report.html", "c.html")
PHONE, DESK = 360, 1280


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    run_dir = add_run(results, "20261127T100000Z-standard", [STEM])
    before = reference(STEM)
    after = changed(before, cells__verdict={4: "builtin trap"}, cells_trapped_after=1)
    add_notebook(run_dir, STEM, record=after)
    cells = [
        new_markdown_cell(f"# Hostile\n\n## Prose\n\n{HOSTILE}\n\n![x](https://evil.example/md.png)\n\n## Output"),
        new_code_cell("show()", outputs=[new_output("display_data", data={"text/html": HOSTILE})]),
        new_code_cell("broken()", outputs=[new_output("error", ename="E", evalue="v", traceback=["E: " + "v" * 400])]),
        new_code_cell("never()"),
    ]
    add_notebook(run_dir, FAILED, "failed", f"E: {HOSTILE}", cells=cells, error_cell=2, finding=HOSTILE)
    add_notebook(run_dir, "06_plot_accuracy_latency", "skipped", "needs the record of 04_run_attention_kernels")
    (run_dir / "run.json").unlink()  # as after a kill: the pages come from what the notebooks left
    bundle.write_bundle(run_dir)
    assert compare.main(["reference", str(run_dir), "--html", str(run_dir / "c.html")]) == 1
    assert [entry.ending for entry in read_run(run_dir).entries] == ["ok", "failed", "skipped"]
    return run_dir


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def luminance(colour):
    return sum(colour) / 3


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESK, PHONE], ids=["desk", "phone"])
def test_a_page_fits_has_the_readers_colours_and_asks_for_nothing(run_dir, browser, page, width, dark):
    browser.open(run_dir / page, width=width, dark=dark)
    assert browser.ask("document.documentElement.scrollWidth") <= width
    # Neither is there anything past the edge that could not be scrolled to.
    outside = "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre, nav') &&"
    outside += f" e.getBoundingClientRect().right > {width} + 1).map(e => e.outerHTML.slice(0, 120))"
    assert browser.ask(outside) == []
    picture = browser.picture()
    assert picture.size[0] == width
    corner = picture.getpixel((2, picture.size[1] - 3))
    assert luminance(corner) < 60 if dark else luminance(corner) > 230
    shades = {luminance(colour) for _, colour in picture.getcolors(2**24)}
    assert max(shades) - min(shades) > 150, "the page is blank"
    assert browser.requests() == []


def test_an_address_outside_would_have_been_seen(tmp_path, browser):
    (tmp_path / "bad.html").write_text("<img src='http://evil.example/x.png'>")
    assert browser.open(tmp_path / "bad.html").requests() == ["http://evil.example/x.png"]


def contrast(browser, selector):
    """Return the contrast ratio (WCAG 2) of an element's ink to the nearest background under it."""
    script = """(() => {
      const numbers = c => c.match(/[\\d.]+/g).map(Number);
      const light = c => { const [r, g, b] = numbers(c).map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126*r + 0.7152*g + 0.0722*b; };
      const element = document.querySelector(SELECTOR);
      let under = element;
      while (under && (numbers(getComputedStyle(under).backgroundColor)[3] === 0)) under = under.parentElement;
      const ink = getComputedStyle(element).color, paper = getComputedStyle(under || document.body).backgroundColor;
      const pair = [light(ink), light(paper)];
      return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05); })()"""
    return browser.ask(script.replace("SELECTOR", repr(selector)))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_words_can_be_read_on_what_is_under_them(run_dir, browser, dark):
    browser.open(run_dir / STEM / "report.html", dark=dark)
    # A styled table brings its own background, made for a white page.
    for selector in ("#T_1a_row0_col0", ".verdict strong", "dt", "summary", ".prose p", ".prose h2"):
        assert contrast(browser, selector) >= 4.5, selector
    browser.open(run_dir / "index.html", dark=dark)
    for selector in (".pill.good", ".pill.bad", ".pill.idle", ".findings p", ".changes small", "td.worse"):
        assert contrast(browser, selector) >= 4.5, selector


def test_a_reader_sees_verdict_contents_figures_and_the_failing_cell(run_dir, browser):
    browser.open(run_dir / STEM / "report.html", width=1440)
    seen = browser.ask("document.body.innerText")
    assert "Measure" in seen and "styled cell" in seen and "measure()" not in seen  # code is folded
    assert browser.ask("getComputedStyle(document.querySelector('nav.contents')).position") == "fixed"
    assert browser.ask("document.querySelector('figure img').naturalWidth") == 900
    browser.open(run_dir / FAILED / "report.html", width=PHONE)
    seen = browser.ask("document.body.innerText")
    assert "broken()" in seen and "never()" not in seen and "not run" in seen
    assert browser.ask("getComputedStyle(document.querySelector('nav.contents')).display") == "none"
    assert (
        browser.ask("document.querySelectorAll('script, iframe, link, object, form, [onerror], [onload]').length") == 0
    )
    browser.open(run_dir / "index.html")
    images = "[...document.images].map(image => image.complete && image.naturalWidth > 100 && image.alt)"
    assert browser.ask(images) == ["Error by provider"]


def test_links_of_the_index_lead_to_files_that_are_there(run_dir, browser):
    browser.open(run_dir / "index.html")
    targets = browser.ask("[...document.links].map(link => link.getAttribute('href'))")
    assert f"{STEM}/report.html" in targets and f"{STEM}/report.html#cell-3" in targets
    for target in targets:
        path, _, anchor = target.partition("#")
        assert (run_dir / path).exists() if path else browser.ask(f"!!document.getElementById('{anchor}')"), target
