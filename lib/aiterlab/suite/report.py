# SPDX-License-Identifier: Apache-2.0
"""Render an executed notebook as one HTML file that needs nothing else: verdict first, failure visible, code folded.

nbconvert renders, with a template of our own. Its stock pages load scripts and fonts from the network, and open blank
or broken where a reviewer has none. Formulas are therefore shown as their source.
"""

import base64
import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from aiterlab.records import atomic_write_text
from aiterlab.suite.results import LINKED, number, text
from aiterlab.suite.sanitize import clean_html, clean_svg
from aiterlab.suite.status import CELL_NOT_RUN, METADATA_KEY, STATUS_NAME, code_cells, title_of
from aiterlab.suite.wording import (
    commit_words,
    duration_words,
    processor_words,
    provenance_rows,
    time_words,
    tone_of,
)

REPORT_NAME = "report.html"
_TEMPLATE = "report"
_CONTENTS_MARK, _REUSED_MARK = "<!--contents-->", "<!--reused-->"
_NETWORK_URLS = (
    "mathjax_url",
    "require_js_url",
    "jquery_url",
    "mermaid_js_url",
    "mermaid_layout_elk_js_url",
    "jupyter_widgets_base_url",
    "widget_renderer_url",
)
# In this order a figure is shown as pixels and a table as a table, whatever else the cell offered.
_SHOWN = ["text/html", "text/markdown", "image/png", "image/svg+xml", "image/jpeg", "text/latex", "text/plain"]


def write_report(notebook: nbformat.NotebookNode, folder: Path) -> Path:
    """Render `notebook` into `folder/report.html`.

    The notebook carries its status (`NotebookStatus.stamp`) and is already fit to be shown (`executed.publishable`).
    """
    # The status vouches for the report, so it is written after it.
    links = {name: words for name, words in LINKED.items() if name == STATUS_NAME or (folder / name).is_file()}
    links.pop(REPORT_NAME, None)
    return atomic_write_text(folder / REPORT_NAME, render_report(notebook, links))


def say_reused(folder: Path, words: str) -> None:
    """Say on the report in `folder` from where the result was taken over; it may show more than the executed copy."""
    page = (folder / REPORT_NAME).read_text(encoding="utf-8")
    note = f'<p class="note"><span class="pill idle">reused</span> This result is not of this run: {escape(words)}.</p>'
    if _REUSED_MARK in page:  # or it has been said
        atomic_write_text(folder / REPORT_NAME, page.replace(_REUSED_MARK, note, 1))


def render_report(notebook: nbformat.NotebookNode, links: Mapping[str, str] | None = None) -> str:
    """Return the page; `links` are files beside it, each with its words."""
    contents = Contents()
    exporter = _exporter()
    exporter.register_filter("prose", contents.prose)
    page, _ = exporter.from_notebook_node(notebook, resources={"links": links or {}, **_header(notebook)})
    return page.replace(_CONTENTS_MARK, contents.to_html(), 1)


def prepare() -> None:
    """Compile the templates, which takes longer than a small report; what is forked then has them."""
    notebook = nbformat.v4.new_notebook(metadata={METADATA_KEY: {}})
    render_report(notebook)


@cache
def _exporter() -> HTMLExporter:
    templates = Path(str(files("aiterlab.suite"))) / "template"
    css = (templates / "style.css").read_text(encoding="utf-8") + _code_colours()
    exporter = HTMLExporter(
        template_name=_TEMPLATE,
        extra_template_basedirs=[str(templates)],
        filters={
            "clean_html": clean_html,
            "tojson_plain": _json,
            "svg_source": _svg_source,
            "duration": duration_words,
            "tone": tone_of,
        },
        exclude_anchor_links=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        default_preprocessors=[],  # for this template they do nothing, with a copy and a validation each
        **dict.fromkeys(_NETWORK_URLS, ""),
    )
    exporter.config.NbConvertBase.display_data_priority = _SHOWN
    exporter.environment.globals["report_css"] = css
    return exporter


class Contents:
    """The table of contents, gathered while the notebook's prose is rendered."""

    def __init__(self) -> None:
        self._headings: list[tuple[int, str]] = []

    def prose(self, rendered: str) -> str:
        """Return a cell's prose, harmless, its headings numbered as targets; two of one name get two targets."""
        return re.sub(r"<h([1-6])\b[^>]*>(.*?)</h\1>", self._number, clean_html(rendered), flags=re.DOTALL)

    def to_html(self) -> str:
        """Return the list, once for the margin of a wide screen and once folded for a small one."""
        links = [
            f'<li class="level-{level}"><a href="#section-{index}">{words}</a></li>'
            for index, (level, words) in enumerate(self._headings, start=1)
            if level in (2, 3)
        ]
        if len(links) < 2:
            return ""
        listed = f"<ol>{''.join(links)}</ol>"
        return (
            f'<nav class="contents margin" aria-label="Contents"><p>Contents</p>{listed}</nav>'
            f'<details class="contents folded"><summary>Contents</summary>{listed}</details>'
        )

    def _number(self, heading: re.Match[str]) -> str:
        level, inner = heading.groups()
        self._headings.append((int(level), re.sub(r"<[^>]+>", "", inner).strip()))
        return f'<h{level} id="section-{len(self._headings)}">{inner}</h{level}>'


def _header(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """Word the facts of the header block; a status that was read back may lack any of them."""
    run = notebook.metadata[METADATA_KEY]
    facts = run.get("provenance") if isinstance(run.get("provenance"), Mapping) else {}
    parameters = run.get("parameters") if isinstance(run.get("parameters"), Mapping) else {}
    states = [cell.metadata.get(METADATA_KEY, {}) for cell in code_cells(notebook)]
    counts = Counter(state.get("status", CELL_NOT_RUN) for state in states)
    stopped = [
        state.get("title", "") for state in states if run.get("error_cell") and state.get("number") == run.error_cell
    ]
    memory, gpu_memory = (number(run.get(f"peak_{kind}_bytes")) for kind in ("memory", "gpu_memory"))
    rows = [
        ("Notebook", run.get("stem")),
        ("Run", run.get("run")),
        ("Profile", run.get("profile")),
        ("Started", time_words(run.get("started_utc"))),
        ("Duration", duration_words(number(run.get("seconds")))),
        ("Cells", ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"),
        ("Peak memory", f"{memory / 2**30:.2f} GiB" if memory else None),
        ("Peak GPU memory", f"{gpu_memory / 2**30:.2f} GiB" if gpu_memory is not None else None),
        ("Commit", commit_words(facts)),
        ("Python", facts.get("python")),
        ("Machine", facts.get("platform")),
        ("Processor", processor_words(facts)),
    ]
    left_over = run.get("left_over")
    return {
        "ending": text(run.get("status")) or CELL_NOT_RUN,
        "title": title_of(notebook, str(run.get("stem"))),
        "error_title": "".join(stopped[:1]),
        "facts": [(name, value) for name, value in rows if value],
        "parameters": [(name, _json(value)) for name, value in parameters.items()],
        "provenance": list(provenance_rows(facts)),
        "reused_mark": _REUSED_MARK,
        "left_over": [str(process) for process in left_over] if isinstance(left_over, list) else [],
        "contents_mark": _CONTENTS_MARK,
        "ran": any(state.get("status", CELL_NOT_RUN) != CELL_NOT_RUN for state in states),
    }


def _svg_source(svg: str) -> str | None:
    cleaned = clean_svg(svg)
    return f"data:image/svg+xml;base64,{base64.b64encode(cleaned.encode()).decode()}" if cleaned else None


def _code_colours() -> str:
    """Return pygments' colours for both colour schemes; backgrounds stay the page's own."""
    light, dark = HtmlFormatter(style="default"), HtmlFormatter(style="github-dark")
    rules = [light.get_token_style_defs(".highlight"), dark.get_token_style_defs(".highlight")]
    # nbconvert's ansi2html gives classes, not colours.
    colours = {"red": "#b3261e", "green": "#1a7f37", "yellow": "#8a6100", "blue": "#0a58ca", "magenta": "#8b3fa8",
               "cyan": "#0b6e7a", "black": "inherit", "white": "inherit"}  # fmt: skip
    ansi = [f".ansi-{name}-fg, .ansi-{name}-intense-fg {{ color: {value} }}" for name, value in colours.items()]
    ansi.append(".ansi-bold { font-weight: bold }")
    dark_ansi = [f".ansi-{name}-fg, .ansi-{name}-intense-fg {{ filter: brightness(1.9) }}" for name in colours]
    # Colours out of 256 arrive as inline styles, chosen for a light page.
    dark_ansi.append("pre span[style] { filter: brightness(1.9) }")
    dark_rules = "\n".join([*rules[1], *dark_ansi])
    return "\n".join([*rules[0], *ansi]) + f"\n@media screen and (prefers-color-scheme: dark) {{\n{dark_rules}\n}}\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
