# SPDX-License-Identifier: Apache-2.0
"""A printed page as a figure: places in inches from the top left corner, text that is measured before it is set."""

from __future__ import annotations

import functools
import io

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from aiterlab import paths, records
from aiterlab.plots.style import FAINT, INK, plain

A4_LANDSCAPE = (11.69, 8.27)
DPI = 150
SMALL, TEXT = 7.0, 7.5  # points; nothing on a page is smaller
_LEADING = 1.22


class Page:
    """A figure that is filled by place."""

    def __init__(self, size: tuple[float, float] = A4_LANDSCAPE) -> None:
        self.width, self.height = size
        self.figure = plt.figure(figsize=size, dpi=DPI, facecolor="white")

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes of this place and size, without frame, ticks small."""
        place = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        ax = self.figure.add_axes(place)
        plain(ax)
        ax.tick_params(labelsize=SMALL, pad=2)
        return ax

    def text(self, left: float, top: float, text: str, size: float = TEXT, **options) -> None:
        """Set text with its upper left corner (or where `ha` and `va` say) at a place."""
        options = {"va": "top", "color": INK} | options
        self.figure.text(left / self.width, 1 - top / self.height, text, fontsize=size, **options)

    def paragraph(self, left: float, top: float, width: float, text: str, size: float, lines: int, **options) -> float:
        """Set text within a width and a number of lines, smaller where it must be; returns where it ends."""
        weight = options.get("fontweight", "normal")
        while len(set_lines := wrapped(text, width, size, weight)) > lines and size > SMALL:
            size -= 0.25
        if len(set_lines) > lines:
            set_lines = [*set_lines[: lines - 1], set_lines[lines - 1].rstrip(" ,;.") + " …"]
        self.text(left, top, "\n".join(set_lines), size, linespacing=_LEADING, **options)
        return top + len(set_lines) * size * _LEADING / 72

    def panel(self, letter: str, left: float, top: float, width: float, title: str, lines: int = 3) -> None:
        """Set a panel's letter and its title, which is its finding."""
        self.text(left, top, letter, 9.5, fontweight="bold")
        self.paragraph(left + 0.17, top + 0.015, width - 0.17, title, 7.75, lines, fontweight="bold")

    def signs(self, right: float, top: float, entries: list[tuple[str, dict]]) -> None:
        """Set a line of signs and their names that ends at a place."""
        left = right - sum(breadth(name, SMALL) + 0.26 for name, _ in entries)
        for name, style in entries:
            x, y = (left + 0.06) / self.width, 1 - (top - 0.05) / self.height
            style = {"markersize": 4, "linestyle": "", "color": INK} | style
            self.figure.add_artist(plt.Line2D([x], [y], **style))
            self.text(left + 0.13, top, name, SMALL, va="bottom")
            left += breadth(name, SMALL) + 0.26

    def rule(self, left: float, top: float, width: float, name: str) -> None:
        """Set a section's name above a line."""
        self.text(left, top, name, 9, fontweight="bold", color=FAINT, va="bottom")
        y = 1 - (top + 0.02) / self.height
        line = plt.Line2D([left / self.width, (left + width) / self.width], [y, y], color="#BBBBBB", linewidth=0.8)
        self.figure.add_artist(line)


def blank(ax: Axes) -> None:
    """Leave a panel empty; its title says why."""
    ax.set(xticks=[], yticks=[])
    ax.spines["bottom"].set_visible(False)


def note(ax: Axes, text: str) -> None:
    """Say in an empty part of a panel why it is empty."""
    blank(ax)
    width = ax.get_position().width * ax.figure.get_size_inches()[0]
    lines = "\n".join(wrapped(f"— {text}", width, SMALL))
    ax.text(0, 1, lines, transform=ax.transAxes, fontsize=SMALL, color=FAINT, va="top")


def wrapped(text: str, width: float, size: float, weight: str = "normal") -> list[str]:
    """Break text into lines that are no wider than `width` inches."""
    lines, left = [], -1.0
    for word in text.split():
        needed = breadth(f" {word}", size, weight)
        if lines and needed <= left:
            lines[-1] += f" {word}"
            left -= needed
        else:
            lines.append(word)
            left = width - needed
    return lines or [""]


def breadth(text: str, size: float, weight: str = "normal") -> float:
    """The width of a line of text in inches, at most: small text is set wider where pixels are few."""
    return 1.06 * size * _breadth(text, weight) / 72


@functools.cache
def _breadth(text: str, weight: str) -> float:
    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(weight=weight, size=1), ismath=False)
    return width


def publish(fig: Figure, stem: str, name: str) -> list[str]:
    """Write `fig` as PNG, PDF and SVG beside the record of notebook `stem`; returns the names of the files.

    A page keeps its size. The same figure gives the same bytes, and a reader sees an old file or a whole new one.
    """
    written = []
    with plt.rc_context({"svg.hashsalt": stem, "pdf.fonttype": 42}):
        for kind, undated in (("png", {}), ("pdf", {"CreationDate": None}), ("svg", {"Date": None})):
            data = io.BytesIO()
            fig.savefig(data, format=kind, facecolor="white", metadata=undated)
            written.append(records.atomic_write_bytes(paths.output_dir(stem) / f"{name}.{kind}", data.getvalue()).name)
    plt.close(fig)  # the notebook shows it once, where it says so
    return written
