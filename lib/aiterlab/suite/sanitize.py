# SPDX-License-Identifier: Apache-2.0
"""Make HTML from cells harmless and self-contained: no script, nothing loaded from anywhere, tables and figures kept.

A report is opened by people who did not run the notebook, often straight from a review. Styled pandas tables bring
their colours in a style block; its rules for the table's own id are kept, with properties that can load nothing. The
page's own classes and targets are not an output's to use: it could dress up as the verdict, or hide it.
"""

# ruff: noqa: SIM905  -- word lists read better as words
import base64
import binascii
import html
import re
from functools import cache
from importlib.resources import files
from xml.etree import ElementTree

import bleach
import tinycss2
import tinycss2.color3
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
_ATTRIBUTES = frozenset("alt colspan dir height lang open rowspan scope start style title width".split())
LONGEST_HTML = 2_000_000  # characters of one output; cleaning takes seconds for each million
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_TABLE_ID = r"T_[\w-]+"  # what pandas' Styler calls its tables and cells
_CSS_FUNCTION = re.compile(r"(?<![\w-])(?!(?:rgba?|hsla?)\()[\w-]*\(", re.IGNORECASE)
# What a browser skips when it reads the scheme of a link.
_BLANKS = re.compile(r"[\x00-\x20\x7f-\xa0\u200b-\u200f\u2028\u2029]")
_SVG = "http://www.w3.org/2000/svg"
_SVG_UNWANTED = frozenset("script foreignObject handler listener iframe audio video animate set".split())


def _ink_on(background: str) -> str | None:
    """Return the ink that can be read on a colour: the page's own is made for one that the reader's scheme decides."""
    colour = tinycss2.color3.parse_color(background)
    if not isinstance(colour, tinycss2.color3.RGBA) or colour.alpha < 0.5:
        return None
    brightness = 0.299 * colour.red + 0.587 * colour.green + 0.114 * colour.blue
    return "#1c2128" if brightness > 0.5 else "#ffffff"


class _Declarations(CSSSanitizer):
    """The allowed properties, as long as their value can only be a colour, a length or a word."""

    def sanitize_css(self, style: str) -> str:
        kept: dict[str, str] = {}
        for declaration in tinycss2.parse_blocks_contents(style, skip_comments=True, skip_whitespace=True):
            if declaration.type == "declaration" and declaration.lower_name in _PROPERTIES:
                value = tinycss2.serialize(declaration.value).strip()
                if not re.search(r"[<>\\;{}]", value) and not _CSS_FUNCTION.search(value):
                    kept[declaration.lower_name] = value
        if "background-color" in kept and "color" not in kept and (ink := _ink_on(kept["background-color"])):
            kept["color"] = ink
        return " ".join(f"{name}: {value};" for name, value in kept.items())


_CSS = _Declarations(allowed_css_properties=_PROPERTIES, allowed_svg_properties=frozenset())


def clean_html(text: str) -> str:
    """Return HTML without anything that runs or loads, its tables each in a box that scrolls on its own.

    What is too long is one sentence that says so.
    """
    if len(text) > LONGEST_HTML:
        return f"[HTML of {len(text) / 1e6:.1f} million characters is not shown; {LONGEST_HTML / 1e6:.0f} are at most]"
    # Taken out whole: bleach would keep the code between the tags as text.
    text, blocks = _cut_out("style", _COMMENT.sub("", text))
    text, _ = _cut_out("script", text)
    styles = "".join(map(_clean_stylesheet, blocks))
    cleaned = _cleaner().clean(text)
    if "<table" in cleaned or "<img" in cleaned:
        cleaned = _rework(cleaned)
    return f"<style>{styles}</style>{cleaned}" if styles else cleaned


def _cut_out(name: str, text: str) -> tuple[str, list[str]]:
    """Return HTML without its elements of this name, and what these hold; one that is never closed holds the rest."""
    opening, closing = (re.compile(rf"{start}{name}(?=[\s/>])", re.IGNORECASE) for start in ("<", "</"))
    kept, held, place = [], [], 0
    while start := opening.search(text, place):  # forwards only: a page of nothing but openings takes no longer
        kept.append(text[place : start.start()])
        end = closing.search(text, start.end())
        held.append(text[start.end() : end.start() if end else len(text)].partition(">")[2])
        place = text.find(">", end.end()) + 1 if end else 0
        if not place:
            return "".join([*kept, f"[what follows is not shown: {name} is opened there and never closed]"]), held
    return "".join([*kept, text[place:]]), held


def clean_svg(svg: str) -> str | None:
    """Return a drawing without script, events, links out of it and what embeds other documents; None if it is no SVG.

    A page shows it as an image, where nothing of this runs. Saved, or opened on its own, it would.
    """
    # Entities of its own can grow without end.
    if re.search(r"<!ENTITY", svg, re.IGNORECASE):
        return None
    try:
        return _clean_svg(ElementTree.fromstring(svg))
    except (ElementTree.ParseError, ValueError, RecursionError):
        return None


def _clean_svg(root: ElementTree.Element) -> str | None:
    if root.tag.rpartition("}")[2] != "svg":
        return None
    for parent in list(root.iter()):
        for child in list(parent):
            if not isinstance(child.tag, str) or child.tag.rpartition("}")[2] in _SVG_UNWANTED:
                parent.remove(child)
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            plain, target = name.rpartition("}")[2].lower(), _BLANKS.sub("", value).lower()
            loads = re.search(r"url\((?!['\"]?#)|expression\(|@import", target) is not None
            if plain in ("href", "src"):
                loads = not target.startswith(("#", "data:image/png;", "data:image/jpeg;"))
            if plain.startswith("on") or loads:
                del element.attrib[name]
        if element.tag.rpartition("}")[2] == "style" and re.search(r"url\((?!['\"]?#)|@import", element.text or ""):
            element.text = ""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return ElementTree.tostring(root, encoding="unicode")


def _is_allowed(tag: str, name: str, value: str) -> bool:
    if name == "href":
        return tag == "a" and re.match(r"https?:|mailto:|[^:]*$", _BLANKS.sub("", value), re.IGNORECASE) is not None
    if name == "src":
        return tag == "img" and re.match(r"data:image/(png|jpeg|gif|webp|svg\+xml);base64,", value) is not None
    if name == "id":
        return re.fullmatch(_TABLE_ID, value) is not None
    if name == "class":
        return _page_classes().isdisjoint(html.unescape(value).split())
    return name in _ATTRIBUTES


@cache
def _cleaner() -> bleach.Cleaner:
    protocols = {"http", "https", "mailto", "data"}
    return bleach.Cleaner(tags=_TAGS, attributes=_is_allowed, protocols=protocols, css_sanitizer=_CSS, strip=True)


@cache
def _page_classes() -> frozenset[str]:
    """Return the classes that the page's own stylesheet speaks of."""
    css = (files("aiterlab.suite") / "template" / "style.css").read_text(encoding="utf-8")
    return frozenset(re.findall(r"\.([a-z][\w-]*)", css))


def _clean_stylesheet(css: str) -> str:
    """Keep the rules that select by the id of a pandas table, which is where Styler puts its colours."""
    kept = []
    for rule in tinycss2.parse_stylesheet(css, skip_comments=True, skip_whitespace=True):
        if rule.type != "qualified-rule":
            continue
        selector = tinycss2.serialize(rule.prelude).strip()
        declarations = _CSS.sanitize_css(tinycss2.serialize(rule.content))
        # Every one of a list's: `#T_1, body` would style the page. Siblings (+, ~) are not the table's either.
        own = all(re.fullmatch(rf"\s*#{_TABLE_ID}[\w\s#.:>()-]*", one) for one in selector.split(","))
        if own and declarations and not re.search(r"[<\\(]", declarations):
            kept.append(f"{selector} {{{declarations}}}")
    return "\n".join(kept)


def _rework(html: str) -> str:
    """Box the tables, and say in words where a picture was that would have been loaded."""
    soup = BeautifulSoup(html, "html.parser")
    for image in soup.find_all("img", src=re.compile("^data:image/svg")):
        image["src"] = _clean_svg_source(image["src"])
        if not image["src"]:
            del image["src"]
    for image in soup.find_all("img", src=False):
        image.replace_with(f"[picture not embedded: {image.get('alt') or 'no description'}]")
    for table in soup.find_all("table"):
        if table.find_parent("table") is None:
            del table["border"]
            # Reachable by keyboard, or what is out of sight stays there.
            table.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
    return str(soup)


def _clean_svg_source(source: str) -> str:
    try:
        svg = clean_svg(base64.b64decode(source.partition(",")[2], validate=True).decode("utf-8"))
    except (binascii.Error, UnicodeDecodeError):
        svg = None
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}" if svg else ""
