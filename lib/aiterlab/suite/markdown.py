# SPDX-License-Identifier: Apache-2.0
"""Write Markdown out of words that nobody vouches for, and stop in time: code hosts cut or drop what is too long.

Findings and errors come from notebooks. None of them may open a table cell, a tag, a link or a fence, or call a person.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

_MARKS = re.compile(r"([\\`*\[\]<>|~&$])")
# An underscore within a word starts nothing, and names are full of them.
_OUTER_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")
_LONGEST_CELL = 400
_WORD_JOINER = "\u2060"


@dataclass
class Block:
    """Some lines that belong together: those that open it, and rows of which as many are shown as fit."""

    head: Sequence[str]
    rows: Sequence[str] = ()
    tail: Sequence[str] = field(default_factory=tuple)


def escape(text: object, longest: int = _LONGEST_CELL) -> str:
    """Return `text` as one line of plain words in Markdown, cut to `longest` characters."""
    words = " ".join(str(text).split())
    words = words if len(words) <= longest else words[: longest - 1] + "…"
    words = _OUTER_UNDERSCORE.sub(r"\\_", _MARKS.sub(r"\\\1", words))
    # Neither a link nor a mention is made of what only looks like one.
    words = words.replace("://", f":{_WORD_JOINER}//").replace("www.", f"www{_WORD_JOINER}.")
    words = words.replace("@", f"@{_WORD_JOINER}")
    return re.sub(r"^([#+=-]|\d+[.)])(?=\s|$|[-=])", r"\\\1", words)


def link(words: object, target: str) -> str:
    """Return a link to a file, given relative to the document."""
    return f"[{escape(words)}]({quote(target)})"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", tail: Sequence[str] = ()) -> Block:
    """Return a table; the cells are Markdown already."""
    head = [f"## {title}", ""] if title else []
    head += [_row(headers), _row(["---"] * len(headers))]
    return Block(head, [_row(row) for row in rows], tail)


def bullets(title: str, items: Iterable[str], *, tail: Sequence[str] = ()) -> Block:
    """Return a list; the items are Markdown already."""
    return Block([f"## {title}", ""], [f"- {item}" for item in items], tail)


def compose(blocks: Iterable[Block], limit_bytes: int) -> str:
    """Return the document, whole rows only; what is left out past the limit is said in its last line."""
    notice = "**Cut here: the rest would pass {} bytes. The HTML report and the records have all of it.**"
    notice = notice.format(f"{limit_bytes:,}")
    room = limit_bytes - len(notice.encode()) - 2
    lines: list[str] = []
    for block in blocks:
        cost = _cost([*block.head, *block.rows[:1]])
        if cost > room:
            return "\n".join([*lines, notice, ""])
        lines += block.head
        room -= _cost(block.head)
        for row in block.rows:
            if _cost([row]) > room:
                return "\n".join([*lines, "", notice, ""])
            lines.append(row)
            room -= _cost([row])
        end = [*(["", *block.tail] if block.tail else []), ""]
        lines += end
        room -= _cost(end)
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cost(lines: Iterable[str]) -> int:
    return sum(len(line.encode()) + 1 for line in lines)
