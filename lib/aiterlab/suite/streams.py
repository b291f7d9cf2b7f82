# SPDX-License-Identifier: Apache-2.0
"""Keep the two ends of what a cell prints: the log has all of it, and nobody is shown the middle.

nbclient joins the pieces of a stream at the end of its cell, which takes minutes where they are many megabytes.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field

import nbformat

LONGEST_CHARACTERS = 20_000  # of a stream in the executed copy and in the report
_KEPT_CHARACTERS = 5 * LONGEST_CHARACTERS  # of each end, while the cell runs


@dataclass
class _Ends:
    first_characters: int = 0
    last_characters: int = 0
    last: deque[nbformat.NotebookNode] = field(default_factory=deque)


class Streams:
    """The streams of one cell."""

    def __init__(self) -> None:
        self._ends: dict[str, _Ends] = defaultdict(_Ends)

    def add(self, outputs: list[nbformat.NotebookNode]) -> None:
        """Take note of the newest of a cell's outputs, a stream's, and empty one that has come to be in the middle.

        It stays in its place, because updates of displays find theirs by number.
        """
        if len(outputs[-1].text) > 2 * _KEPT_CHARACTERS:
            outputs[-1] = nbformat.from_dict({**outputs[-1], "text": shorten(outputs[-1].text, _KEPT_CHARACTERS)})
        newest = outputs[-1]
        ends = self._ends[newest.name]
        if ends.first_characters < _KEPT_CHARACTERS:
            ends.first_characters += len(newest.text)
            return
        ends.last.append(newest)
        ends.last_characters += len(newest.text)
        while ends.last_characters - len(ends.last[0].text) > _KEPT_CHARACTERS:
            middle = ends.last.popleft()
            ends.last_characters -= len(middle.text)
            middle.text = ""


def shorten(text: str, characters: int = LONGEST_CHARACTERS) -> str:
    """Return the beginning and the end of a text that is longer than that."""
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]}\n... the middle is left out here; log.txt has it ...\n{text[-half:]}"
