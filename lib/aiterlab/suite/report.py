# SPDX-License-Identifier: Apache-2.0
"""Render an executed notebook as one HTML file that needs nothing else: verdict first, failure visible, code folded.

nbconvert renders, with a template of our own. Its stock pages load scripts and fonts from the network, and open blank
or broken where a reviewer has none. Formulas are therefore shown as their source.
"""

import json
from collections import Counter
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from aiterlab.records import atomic_write_text
from aiterlab.suite.sanitize import clean_html
from aiterlab.suite.status import METADATA_KEY, code_cells

REPORT_NAME = "report.html"
_TEMPLATE = "report"
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
    return atomic_write_text(folder / REPORT_NAME, render_report(notebook))


def render_report(notebook: nbformat.NotebookNode) -> str:
    """Return the page."""
    with as_file(files("aiterlab.suite") / "template") as templates:
        exporter = HTMLExporter(
            template_name=_TEMPLATE,
            extra_template_basedirs=[str(templates)],
            filters={"clean_html": clean_html, "tojson_plain": _json},
            exclude_anchor_links=True,
            exclude_input_prompt=True,
            exclude_output_prompt=True,
            **dict.fromkeys(_NETWORK_URLS, ""),
        )
        exporter.config.NbConvertBase.display_data_priority = _SHOWN
        css = (templates / _TEMPLATE / "style.css").read_text(encoding="utf-8") + _code_colours()
        page, _ = exporter.from_notebook_node(notebook, resources={"report_css": css, **_header(notebook)})
    return page


def _header(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """Word the facts of the header block."""
    run = notebook.metadata[METADATA_KEY]
    facts = run["provenance"]
    cells = [cell.metadata[METADATA_KEY] for cell in code_cells(notebook)]
    counts = Counter(cell["status"] for cell in cells)
    stopped = [cell["title"] for cell in cells if cell["number"] == run["error_cell"]]
    commit = facts.get("git_commit")
    if commit:
        commit += " with uncommitted changes" if facts.get("git_dirty") else ""
    else:
        commit = f"- ({facts.get('missing', {}).get('git_commit', 'not recorded')})"
    cores, memory = facts.get("cpu_usable_count"), facts.get("memory_bytes")
    parts = [
        facts.get("cpu_model"),
        f"{cores} cores" if cores else None,
        f"{memory / 2**30:.0f} GiB" if memory else None,
    ]
    return {
        "error_title": "".join(stopped),
        "duration": _duration(run["seconds"]),
        "cell_counts": ", ".join(f"{count} {name}" for name, count in counts.items()),
        "commit": commit,
        "processor": ", ".join(part for part in parts if part),
    }


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 120 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


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
