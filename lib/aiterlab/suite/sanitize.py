# SPDX-License-Identifier: Apache-2.0
"""Make HTML from cells harmless and self-contained: no script, nothing loaded from anywhere, tables and figures kept.

A report is opened by people who did not run the notebook, often straight from a review. Styled pandas tables bring
their colours in a style block; its rules for the table's own id are kept, with properties that can load nothing.
"""

# ruff: noqa: SIM905  -- word lists read better as words
import re

import bleach
import tinycss2
from bleach.css_sanitizer import CSSSanitizer
from bs4 import BeautifulSoup

_TAGS = frozenset(
    "a abbr b blockquote br caption code col colgroup dd del details div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 "
    "hr i img kbd li mark ol p pre s samp small span strong sub summary sup table tbody td tfoot th thead tr u ul "
    "var".split()
)
_PROPERTIES = frozenset(
    "background-color border border-bottom border-collapse border-color border-left border-right border-top color "
    "font-style font-weight height max-width min-width opacity padding padding-left padding-right text-align "
    "text-decoration vertical-align white-space width".split()
)
_ATTRIBUTES = frozenset("alt class colspan dir height id lang open rowspan scope start style title width".split())
_STYLE_BLOCK = re.compile(r"<style[^>]*>(.*?)</style\s*>", re.IGNORECASE | re.DOTALL)
_SCRIPT_BLOCK = re.compile(r"<script\b.*?</script\s*>", re.IGNORECASE | re.DOTALL)
_CSS = CSSSanitizer(allowed_css_properties=_PROPERTIES, allowed_svg_properties=frozenset())


def clean_html(html: str) -> str:
    """Return `html` without anything that runs or loads, its tables each in a box that scrolls on its own."""
    styles = "".join(_clean_stylesheet(block) for block in _STYLE_BLOCK.findall(html))
    # Taken out whole: bleach would keep the code between the tags as text.
    html = _SCRIPT_BLOCK.sub("", _STYLE_BLOCK.sub("", html))
    cleaned = bleach.clean(
        html,
        tags=_TAGS,
        attributes=_is_allowed,
        protocols={"http", "https", "mailto", "data"},
        css_sanitizer=_CSS,
        strip=True,
    )
    if "<table" in cleaned or "<img" in cleaned:
        cleaned = _rework(cleaned)
    return f"<style>{styles}</style>{cleaned}" if styles else cleaned


def _is_allowed(tag: str, name: str, value: str) -> bool:
    if name == "href":
        return tag == "a" and not value.strip().lower().startswith("data:")
    if name == "src":
        return tag == "img" and re.match(r"data:image/(png|jpeg|gif|webp|svg\+xml);base64,", value) is not None
    return name in _ATTRIBUTES


def _clean_stylesheet(css: str) -> str:
    """Keep the rules that select by the id of a pandas table, which is where Styler puts its colours."""
    kept = []
    for rule in tinycss2.parse_stylesheet(css, skip_comments=True, skip_whitespace=True):
        if rule.type != "qualified-rule":
            continue
        selector = tinycss2.serialize(rule.prelude).strip()
        declarations = _CSS.sanitize_css(tinycss2.serialize(rule.content))
        if re.fullmatch(r"#T_[\w\s#.,:>()-]+", selector) and declarations and not re.search(r"[<\\(]", declarations):
            kept.append(f"{selector} {{{declarations}}}")
    return "\n".join(kept)


def _rework(html: str) -> str:
    """Box the tables, and say in words where a picture was that would have been loaded."""
    soup = BeautifulSoup(html, "html.parser")
    for image in soup.find_all("img", src=False):
        image.replace_with(f"[picture not embedded: {image.get('alt') or 'no description'}]")
    for table in soup.find_all("table"):
        if table.find_parent("table") is None:
            del table["border"]
            # Reachable by keyboard, or what is out of sight stays there.
            table.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
    return str(soup)
