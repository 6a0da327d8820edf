"""Tables and lines that fit a terminal of any width: names shortened in the middle, the least wanted columns left out, lines
broken between words. Where the terminal's encoding has no blocks, dots or arrows, ASCII stands in their place.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from csqcli.reporting.words import middle

LABEL = 13  # columns before what a line says
_GAP = 2
LEAST_NAME = 18  # columns; a name of fewer is not told from its neighbours


@dataclass(frozen=True)
class Glyphs:
    """What bars and shortened names are drawn with."""

    full: str = "█"
    empty: str = "░"
    levels: str = "▁▂▃▄▅▆▇█"  # of a sparkline
    mark: str = "…"


ASCII = Glyphs(full="#", empty=".", levels="_.:-=+*#", mark="..")


def glyphs(console: Console) -> Glyphs:
    """Blocks where the terminal's encoding has them all, else ASCII."""
    drawn = Glyphs()
    try:
        "".join([drawn.full, drawn.empty, drawn.levels, drawn.mark]).encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return drawn


def spark(values: Sequence[float], marks: Glyphs, *, most: int = 40) -> str:
    """A sparkline: a sign per value, or per every so many where there are more than ``most``."""
    shown = [values[index * len(values) // most] for index in range(most)] if len(values) > most else list(values)
    shown[-1:] = values[-1:]
    low, high, top = min(shown), max(shown), len(marks.levels) - 1
    return "".join(marks.levels[round(top * (value - low) / ((high - low) or 1.0))] for value in shown)


@dataclass(frozen=True)
class Column:
    """A column of a terminal's table."""

    heading: str
    cells: Sequence[str]
    rank: int = 0  # columns of the highest rank are left out first; those of 0 stay
    right: bool = False
    shrinks: int | None = None  # columns to which its cells may be shortened in the middle
    style: str = ""

    @property
    def width(self) -> int:
        return max(map(cell_len, (self.heading, *self.cells)))

    @property
    def least(self) -> int:
        return self.width if self.shrinks is None else min(self.width, self.shrinks)


def print_columns(columns: Sequence[Column], console: Console, marks: Glyphs) -> None:
    """The columns that fit, as a heading, a rule and a line per row."""
    kept = _fitting(columns, console.width)
    free = console.width - _GAP * (len(kept) - 1) - sum(column.least for column in kept)
    widths = []
    for column in kept:
        width = min(column.width, column.least + max(free, 0))
        free -= width - column.least
        widths.append(width)
    pairs = list(zip(kept, widths, strict=True))
    _print_row([_padded(column.heading, width, column, marks) for column, width in pairs], console, "bold")
    _print_row([("-" if marks is ASCII else "─") * width for _, width in pairs], console, "dim")
    for row in range(len(kept[0].cells)):
        text = Text()
        for index, (column, width) in enumerate(pairs):
            text.append(" " * _GAP if index else "")
            text.append(_padded(column.cells[row], width, column, marks), style=column.style)
        text.rstrip()
        console.print(text, soft_wrap=True)


def print_lines(lines: Iterable[str], console: Console, *, indent: int = LABEL) -> None:
    """Lines of a label and what it says, broken between words, with what follows a break under the beginning."""
    for line in lines:
        for part in wrapped(line, console.width, indent=indent):
            console.print(part, highlight=False, markup=False, soft_wrap=True)


def wrapped(line: str, width: int, *, indent: int = LABEL) -> list[str]:
    """``line`` in lines of at most ``width`` columns, a longer word excepted: it stays whole."""
    inset = " " * (indent if width > 2 * indent else 2)
    options = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
    return textwrap.wrap(line, max(width, 20), subsequent_indent=inset, **options) or [""]  # type: ignore[arg-type]


def shortened(text: str, width: int, marks: Glyphs) -> str:
    """``text`` in at most ``width`` columns of the terminal, shortened in the middle."""
    if cell_len(text) <= width:
        return text
    return next(
        (cut for count in range(width, 0, -1) if cell_len(cut := middle(text, count, mark=marks.mark)) <= width), ""
    )


def _fitting(columns: Sequence[Column], width: int) -> list[Column]:
    kept = list(columns)
    while sum(column.least for column in kept) + _GAP * (len(kept) - 1) > width:
        last = max(kept, key=lambda column: column.rank)
        if last.rank == 0:
            break
        kept.remove(last)
    return kept


def _padded(text: str, width: int, column: Column, marks: Glyphs) -> str:
    cut = shortened(text, width, marks)
    space = " " * (width - cell_len(cut))
    return space + cut if column.right else cut + space


def _print_row(cells: Sequence[str], console: Console, style: str) -> None:
    console.print(Text((" " * _GAP).join(cells).rstrip(), style=style), soft_wrap=True)
