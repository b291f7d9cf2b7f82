# SPDX-License-Identifier: Apache-2.0
"""Keep what must not be said out of what a run leaves, because reports are made to be shown around.

`scrub` masks secrets and home directories in text before it is written; `scan_folder` is the gate behind it, and reads
what was written. Both know the values of secret-named environment variables, in the forms in which files escape them,
and the shapes of the usual tokens, whoever they belong to. What is found is named by its kind, never shown.
"""

import base64
import html
import json
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

MASK = "(masked)"
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = re.compile(
    r"passw|passphrase|secret|credential|cookie|authorization|\b(?:auth|oauth|creds?|dsn|jwt|pat|webhook)\b"
    # Also at the end of a word (APIKEY); but token_ids and num_key_value_heads are a model's, a sort_key is nobody's.
    r"|(?<!per )token\b(?! (?:ids?|counts?|threshold|budget|limit|length|size|rate|type|mask|positions?|m?s)\b)"
    r"|(?<!sort )(?<!group )(?<!join )(?<!primary )(?<!foreign )"
    r"key\b(?! (?:value )?(?:heads?|cache|dims?|dtype|size|scales?|length|states?|layers?)\b)"
    r"|(?:api|access|private|ssh|app|encryption|signing|fernet) ?keys\b"
    # PWD alone is a folder, a pass_rate a share, and a forward_pass no word.
    r"|\w (?<!forward )(?<!backward )(?<!single )(?<!first )(?<!second )(?:pass|pwd)[ \d]*$"
)
# Shorter values ("1", "false") are no secrets, and would mask ordinary words all over a report.
_SHORTEST_SECRET = 8
# Each shape begins with letters that are searched for as such, which is a hundred times as fast as an expression that
# begins with a look behind; what must not stand before it is checked afterwards. A group is what is masked of it.
_SHAPES = tuple(
    (kind, opening, re.compile(re.escape(opening) + rest, re.DOTALL), re.compile(not_before))
    for kind, opening, rest, not_before in (
        ("Hugging Face token", "hf_", r"[A-Za-z0-9]{20,}", r"\w"),
        ("GitHub token", "gh", r"[pousr]_[A-Za-z0-9]{30,}", r"\w"),
        ("GitHub token", "github_pat_", r"\w{22,}", r"\w"),
        ("GitLab token", "glpat-", r"[\w-]{20,}", r"\w"),
        ("AWS access key", "AKIA", r"[A-Z0-9]{16}(?![A-Za-z0-9+/])", r"[\w+/]"),
        ("AWS access key", "ASIA", r"[A-Z0-9]{16}(?![A-Za-z0-9+/])", r"[\w+/]"),
        ("Google key", "AIza", r"[\w-]{35}(?![\w+/])", r"[\w+/]"),
        ("API key", "sk-", r"(?=[\w-]{0,80}\d)(?=[\w-]{0,80}[A-Z])[\w-]{20,}", r"[\w-]"),
        ("Slack token", "xox", r"[abeoprs]-[A-Za-z0-9-]{10,}", r"\w"),
        ("PyPI token", "pypi-AgEI", r"[\w-]{16,}", r"\w"),
        ("JSON web token", "eyJ", r"[\w-]{8,4096}\.eyJ[\w-]{8,}\.[\w-]{8,}", r"\w"),
        ("Jupyter token", "token=", r"([0-9a-f]{32,})", r"(?!)"),
        ("bearer token", "earer ", r"((?=[\w.~+/-]{0,80}\d)[\w.~+/-]{16,}=*)", r"(?!)"),
        ("password in an address", "://", r"([^\s/:@\"'<>]{0,256}:[^\s/@\"'<>]{1,256})@", r"(?!)"),
        # A key that lost its end is masked as far as it looks like one.
        (
            "private key",
            "-----BEGIN ",
            r"(?:[A-Z0-9]+ ){0,4}PRIVATE KEY-----(?:(?:[A-Za-z0-9+/=:,.\s]|-(?!----)|\\[nr]){4,65536}+-----END "
            r"(?:[A-Z0-9]+ ){0,4}PRIVATE KEY-----|(?:(?:\s|\\[nr]){0,4}[A-Za-z0-9+/=]{16,}){1,2048}+)",
            r"(?!)",
        ),
    )
)
_ENCODED = re.compile(r"[A-Za-z0-9+/]{256,}={0,2}")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_COLOUR_BEFORE = re.compile(r"\x1b\[[0-9;]*m\Z")
_CHUNK_CHARACTERS = 8 * 2**20
_LONGEST_LEAK = 2**17  # characters by which chunks overlap: a private key of any size in use


@dataclass(frozen=True, order=True)
class Leak:
    """Something in a file that must not be shown around: where, and of what kind; never the value itself."""

    file: str
    line: int | None  # None in a binary file and in a file's own name
    kind: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.line is None else f':{self.line}'}: {self.kind}"


@cache
def is_secret_name(name: str) -> bool:
    """Tell whether an environment variable or a parameter of this name may hold a secret, word by word."""
    return _SECRET_WORDS.search(" ".join(_WORD.findall(name)).lower()) is not None


def scrub(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Replace home directories by `~`, secrets by a mask, and what no file can hold (lone surrogates) by U+FFFD."""
    return _rules(environment).scrub(text)


def scrub_tree(value: Any) -> Any:
    """Return `value`, a JSON-like tree, with `scrub` applied to every string in it, keys included."""
    return _scrub_tree(value, cache(_rules(None).scrub))  # names and values repeat, in rows most of all


def scan_text(text: str, file: str = "", environment: Mapping[str, str] | None = None) -> list[Leak]:
    """Return what `scrub` would take out of `text`; long base64, such as pixels, is held against known values only."""
    return [Leak(file, line, kind) for line, kind in sorted(_by_line(text, _rules(environment)))]


def scan_folder(folder: Path, environment: Mapping[str, str] | None = None) -> list[Leak]:
    """Read every file below `folder`, or that one file, and return what must not be shown around.

    Links are not followed; where they lead is text like any other. A file that cannot be read is a leak of the kind
    "cannot be read", because nobody knows what is in it.
    """
    rules = _rules(environment)
    leaks: list[Leak] = []
    for path in _files(folder):
        name = path.relative_to(folder).as_posix() if path != folder else path.name
        leaks += [Leak(rules.scrub(name), None, f"{kind}, in the file's name") for _, kind in rules.find(name)]
        try:
            found = _scan_link(path, rules) if path.is_symlink() else _scan_file(path, rules)
            leaks += [Leak(rules.scrub(name), line, kind) for line, kind in sorted(found, key=str)]
        except OSError as error:
            leaks.append(Leak(rules.scrub(name), None, f"cannot be read ({error.strerror})"))
    return leaks


def _files(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        yield folder
        return
    for base, folders, names in os.walk(folder):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(base, name))]
        yield from (Path(base, name) for name in sorted([*names, *links]))


def _by_line(text: str, rules: "_Rules", first: int = 1) -> set[tuple[int, str]]:
    found = list(rules.find(text))
    ends = [match.start() for match in re.finditer("\n", text)] if found else []
    return {(first + bisect_left(ends, at), kind) for at, kind in found}


def _scan_link(path: Path, rules: "_Rules") -> set[tuple[int | None, str]]:
    return {(None, f"{kind}, in where the link leads") for _, kind in rules.find(os.readlink(path))}


def _scan_file(path: Path, rules: "_Rules") -> set[tuple[int | None, str]]:
    if not path.is_file():
        return set()  # a socket or a pipe holds nothing
    with open(path, "rb") as file:
        binary = b"\0" in file.read(4096)
    # Every byte is a character of latin-1, so a picture's text fields and a table's strings are read as well.
    coding = {"encoding": "latin-1"} if binary else {"encoding": "utf-8", "errors": "replace"}
    found: set[tuple[int | None, str]] = set()
    before, lines = "", 1
    with open(path, newline="", **coding) as file:
        while piece := file.read(_CHUNK_CHARACTERS):
            text = before + piece
            found |= {(None if binary else line, kind) for line, kind in _by_line(text, rules, lines)}
            kept = text[-_LONGEST_LEAK:]
            lines += text.count("\n") - kept.count("\n")
            before = kept
    return found


@dataclass(frozen=True)
class _Rules:
    """What to look for, made once for an environment."""

    secrets: tuple[tuple[str, str], ...]  # variable and value
    homes: tuple[str, ...]
    forms: list[tuple[str, str]] = field(init=False)  # variable and form of its value, longest first
    home_patterns: list[tuple[str, re.Pattern]] = field(init=False)

    def __post_init__(self) -> None:
        forms = {form: name for name, value in self.secrets for form in _forms_of(value)}
        # Longest first: a secret that contains another one would otherwise leave its tail behind.
        ordered = sorted(((name, form) for form, name in forms.items()), key=lambda pair: len(pair[1]), reverse=True)
        object.__setattr__(self, "forms", ordered)
        homes = {form for home in self.homes for form in (home, quote(home, safe=""), home.replace("/", "\\/"))}
        patterns = [(home, re.compile(re.escape(home) + r"(?![\w-])")) for home in sorted(homes, key=len, reverse=True)]
        object.__setattr__(self, "home_patterns", patterns)

    def scrub(self, text: str) -> str:
        if not text.isascii():
            text = _SURROGATE.sub("\ufffd", text)
        for _, form in self.forms:
            text = text.replace(form, MASK)
        for _, opening, shape, not_before in _SHAPES:
            if opening in text:
                text = shape.sub(partial(_masked, not_before), text)
        for home, pattern in self.home_patterns:
            if home in text:
                text = pattern.sub(_shortened, text)
        return text

    def find(self, text: str) -> Iterator[tuple[int, str]]:
        """Yield where something lies in `text`, and its kind."""
        for name, form in self.forms:
            at = text.find(form)
            while at >= 0:
                yield at, f"value of {name}"
                at = text.find(form, at + len(form))
        readable = self._readable(text)
        for kind, opening, shape, not_before in _SHAPES:
            if opening in readable:
                yield from ((m.start(), kind) for m in shape.finditer(readable) if _begins(not_before, m))
        for home, pattern in self.home_patterns:
            if home in readable:
                yield from ((m.start(), "home directory") for m in pattern.finditer(readable) if _is_whole(m))

    def _readable(self, text: str) -> str:
        """Blank what is encoded, such as pixels: it holds no paths, only chance matches."""
        return _ENCODED.sub(lambda match: " " * len(match.group()), text)


def _rules(environment: Mapping[str, str] | None) -> _Rules:
    environment = os.environ if environment is None else environment
    values = tuple(
        (name, value)
        for name, value in sorted(environment.items())
        if len(value) >= _SHORTEST_SECRET and is_secret_name(name)
    )
    return _rules_of(values, environment.get("HOME") or str(Path.home()))


@lru_cache(maxsize=8)
def _rules_of(values: tuple[tuple[str, str], ...], home: str) -> _Rules:
    folders = {home.rstrip("/"), os.path.realpath(home)}
    # HOST_PWD and its like name a folder, which stands in every report.
    secrets = tuple((name, value) for name, value in values if not (value[0] == "/" and os.path.isdir(value)))
    return _Rules(secrets, tuple(sorted(folder for folder in folders if folder.count("/") and len(folder) > 1)))


def _forms_of(value: str) -> Iterator[str]:
    """Yield a secret as it is, and as JSON, HTML, addresses and base64 write it."""
    raw = value.encode("utf-8", "surrogateescape")
    yield value
    yield json.dumps(value)[1:-1]
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield html.escape(value)
    yield html.escape(value, quote=False)
    yield quote(raw)
    yield quote(raw, safe="")
    yield quote_plus(raw)
    for before in range(3):
        # Within a longer text that is encoded as a whole, a secret may begin at any of three places of a group. The
        # groups that it shares with its neighbours are left out.
        encoded = base64.b64encode(b"\0" * before + raw).decode()
        inner = encoded[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6]
        if len(inner) >= _SHORTEST_SECRET:
            yield inner
            yield inner.translate(str.maketrans("+/", "-_"))


def _scrub_tree(value: Any, clean: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {clean(key) if isinstance(key, str) else key: _scrub_tree(item, clean) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_scrub_tree(item, clean) for item in value]
    return value


def _begins(not_before: re.Pattern, match: re.Match) -> bool:
    """Tell whether a shape begins where it was found, and is not the end of a longer word."""
    start = match.start()
    return not start or not_before.match(match.string, start - 1, start) is None or _follows_colour(match)


def _masked(not_before: re.Pattern, match: re.Match) -> str:
    if not _begins(not_before, match):
        return match.group()
    whole, first = match.group(), match.start()
    start, end = (at - first for at in match.span(match.re.groups))
    return whole[:start] + MASK + whole[end:]


def _follows_colour(match: re.Match) -> bool:
    """Tell whether a colour code, which ends in a letter, stands right before: tracebacks have them."""
    return _COLOUR_BEFORE.search(match.string, max(0, match.start() - 16), match.start()) is not None


def _is_whole(match: re.Match) -> bool:
    """Tell whether a found folder is a whole one: /home/al is not found in /mnt/home/al or /home/alice."""
    start = match.start()
    return not start or not re.match(r"[\w.~-]", match.string[start - 1]) or _follows_colour(match)


def _shortened(match: re.Match) -> str:
    return "~" if _is_whole(match) else match.group()
