"""The parts that charts are made of: escaped elements, scales, ticks, paint. Strings in, strings out; no library.

Every shape carries a class, which a page's style sheet colours for light, dark and print (`STYLE`), and the light colours
as attributes for where no style sheet is read: a paper, an image viewer, a converter.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

from csqcli.errors import printable
from csqcli.reporting.words import middle

FONT = 12.0  # pixels
INK, SOFT, FAINT, GROUND = "#1b1f24", "#59636e", "#d5dae0", "#ffffff"
_DARK = ("#e8eaed", "#a6b0ba", "#3a424c", "#14171b")
# After Okabe and Ito, whose colours differ for every common kind of colour vision; each darkened (for white) or
# lightened (for black) until text in it reaches a contrast of 4.5.
SERIES = ("#0069a8", "#b84a00", "#007a5a", "#a04080", "#7a5c00", "#4d5560")
_SERIES_DARK = ("#5ab8ee", "#ff9150", "#35c99a", "#e39ac4", "#e0b53c", "#b4bcc5")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2")  # beside colour, so that a series is known without it
# From few to many: one hue, lightness alone tells. The first is for none.
ORDINAL = ("#e3e7ec", "#bcd9ec", "#93c3e0", "#69aad2", "#4490c1", "#2777ad", "#145f96", "#0a487b", "#07335c", "#051f3b")
_ORDINAL_DARK = (
    "#2a3138", "#1f4a66", "#2a6288", "#377aa7", "#4a92c2", "#66a9d6", "#86bfe4", "#a8d3ef", "#cae6f8", "#eaf6ff",
)  # fmt: skip


def _variables(ink: str, soft: str, faint: str, ground: str, *, series: Sequence[str], ordinal: Sequence[str]) -> str:
    named = {"ink": ink, "soft": soft, "faint": faint, "ground": ground}
    named |= {f"s{number}": colour for number, colour in enumerate(series)}
    named |= {f"o{number}": colour for number, colour in enumerate(ordinal)}
    return "".join(f"--{name}:{colour};" for name, colour in named.items())


_LIGHT_VARIABLES = _variables(INK, SOFT, FAINT, GROUND, series=SERIES, ordinal=ORDINAL)
_DARK_VARIABLES = _variables(*_DARK, series=_SERIES_DARK, ordinal=_ORDINAL_DARK)
_CLASSES = [f"s{number}" for number in range(len(SERIES))] + [f"o{number}" for number in range(len(ORDINAL))]

STYLE = (
    f":root{{color-scheme:light dark;{_LIGHT_VARIABLES}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK_VARIABLES}}}}}\n"
    "svg.chart{display:block;font-family:inherit}\n"
    ".chart .ink{fill:var(--ink)}.chart .soft{fill:var(--soft)}.chart .ground{fill:var(--ground)}\n"
    ".chart .grid{stroke:var(--faint)}.chart .axis{stroke:var(--soft)}.chart .goal{stroke:var(--ink)}.chart .halo{stroke:var(--ground)}\n"
    + "".join(
        f".chart .{name}{{fill:var(--{name})}}.chart .line.{name}{{fill:none;stroke:var(--{name})}}"
        for name in _CLASSES
    )
    + "\n@media print{.chart *{print-color-adjust:exact;-webkit-print-color-adjust:exact}}\n"
)  # of a page that holds charts; dark is for screens, so that print is always light


def escaped(value: object) -> str:
    """Text that is text in HTML, in SVG and inside quotes, whatever it holds."""
    return html.escape(printable(str(value)), quote=True)


def element(tag: str, content: str = "", /, **attributes: object) -> str:
    """An element around ``content``, which is markup already; ``stroke_width`` becomes ``stroke-width``, None is left out."""
    named = (
        (name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value not in (None, "")
    )
    start = "".join([tag, *(f' {name}="{_number(value)}"' for name, value in named)])
    return f"<{start}>{content}</{tag}>" if content else f"<{start}/>"


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escaped(value)


def text(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "soft", **more: object) -> str:
    """A line of text; ``kind`` is ink, soft or a series."""
    return element(
        "text",
        escaped(words),
        x=x,
        y=y,
        text_anchor=anchor if anchor != "start" else None,
        class_=kind,
        fill=paint(kind),
        **more,
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str, **more: object) -> str:
    """A straight line; ``kind`` is grid, axis or goal."""
    colour = {"grid": FAINT, "axis": SOFT, "goal": INK}[kind]
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind, stroke=colour, **more)


def paint(kind: str) -> str:
    """The light colour of a class."""
    named = {"ink": INK, "soft": SOFT, "ground": GROUND}
    if kind in named:
        return named[kind]
    return SERIES[int(kind[1:])] if kind.startswith("s") else ORDINAL[int(kind[1:])]


def series(number: int) -> str:
    """The class of a series."""
    return f"s{number % len(SERIES)}"


def ordinal(number: int, count: int) -> str:
    """The class of one of ``count`` ordered groups, the first being that of none."""
    last = len(ORDINAL) - 1
    return f"o{0 if number == 0 or count < 2 else max(1, round(number * last / (count - 1)))}"


def text_width(words: str, size: float = FONT) -> float:
    """About how wide a text is in a proportional font, in pixels."""
    return size * sum(0.58 if ord(c) < 0x1100 else 1.05 for c in words)


def fitting(words: str, pixels: float) -> str:
    """``words``, shortened in the middle to about so many pixels."""
    return middle(words, max(3, int(pixels / (0.58 * FONT))))


def scale(low: float, high: float, start: float, end: float, *, log: bool = False) -> Callable[[float], float]:
    """Values from ``low`` to ``high`` onto pixels from ``start`` to ``end``."""
    warp: Callable[[float], float] = math.log if log else float
    first, last = warp(low), warp(high)
    return lambda value: start + (end - start) * (warp(value) - first) / ((last - first) or 1.0)


def ticks(low: float, high: float, *, most: int = 6, whole: bool = False) -> list[float]:
    """Round values within a range: multiples of 1, 2 or 5 times a power of ten."""
    span = (high - low) or 1.0
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next((factor for factor in (1, 2, 5, 10) if span / (step * factor) <= most), 10)
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, *, most: int = 8) -> list[float]:
    """Powers of ten within a range, with 2 and 5 between them, or more where that gives fewer than three."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in found if low <= value <= high]
        if 3 <= len(found) <= most:
            return found
    return ticks(low, high, most=most)


def spread(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Positions near those wanted, at least ``gap`` apart, within a range where that holds them all."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = list(wanted)
    for before, index in zip([None, *order], order, strict=False):
        placed[index] = max(wanted[index], low if before is None else placed[before] + gap)
    limit = high
    for index in reversed(order):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - gap
    return placed
