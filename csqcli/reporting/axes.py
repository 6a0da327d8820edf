"""Where a chart's data goes: the frame with its axes, its legend and the line of a target; ranges and ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from csqcli.reporting import svg
from csqcli.reporting.svg import element, text
from csqcli.reporting.words import short

_LEGEND_ROW = 18.0


@dataclass
class Frame:
    """Where a chart's data goes, and the axes around it. Words stand above the plot, so that none is turned on its side."""

    width: float
    plot_height: float
    y_low: float
    y_high: float
    y_label: str
    x_label: str
    right: float = 8.0
    legend: Sequence[tuple[str, str]] = ()  # class and name
    left_labels: Sequence[str] = ()  # in the place of ticks
    marks: bool = False  # the legend shows the groups' shapes, not squares
    parts: list[str] = field(default_factory=list)
    over: list[str] = field(default_factory=list)  # drawn last

    def __post_init__(self) -> None:
        self.y_ticks = [] if self.left_labels else svg.ticks(self.y_low, self.y_high, most=5)
        labels = self.left_labels or [short(value) for value in self.y_ticks]
        self.left = min(max(map(svg.text_width, labels), default=0.0), 0.36 * self.width) + 10
        legend, rows = self._legend()
        self.top = 22.0 + _LEGEND_ROW * rows + (6.0 if rows else 0.0)
        self.bottom = self.top + self.plot_height
        self.height = self.bottom + (40.0 if self.x_label else 24.0)
        self.end = self.width - self.right
        self.y = svg.scale(self.y_low, self.y_high, self.bottom, self.top)
        self.parts += [text(0.0, 13.0, self.y_label), legend]
        for value in self.y_ticks:
            self.parts.append(svg.line(self.left, self.y(value), self.end, self.y(value), "grid"))
            self.parts.append(text(self.left - 6, self.y(value) + 4, short(value), anchor="end"))
        if self.x_label:
            self.parts.append(text((self.left + self.end) / 2, self.height - 4, self.x_label, anchor="middle"))

    def _legend(self) -> tuple[str, int]:
        drawn, x, row = [], 0.0, 0
        for number, (kind, name) in enumerate(self.legend):
            wide = 18 + svg.text_width(name) + 12
            if x and x + wide > self.width:
                x, row = 0.0, row + 1
            y = 24.0 + _LEGEND_ROW * row
            shape = mark(number, x + 6, y + 6) if self.marks else f"M{x:.2f} {y:.2f}h12v12h-12z"
            drawn.append(element("path", d=shape, class_=kind, fill=svg.paint(kind)))
            drawn.append(text(x + 17, y + 10, name))
            x += wide
        return "".join(drawn), row + 1 if drawn else 0

    def x_ticks(self, at: Sequence[tuple[float, str]]) -> None:
        """The lower axis, with what stands under it; a label that would touch the one before is left out."""
        self.parts.append(svg.line(self.left, self.bottom, self.end, self.bottom, "axis"))
        free = -math.inf
        for x, label in at:
            half = svg.text_width(label) / 2
            centre = min(x, self.width - half)
            if centre - half < free:
                continue
            free = centre + half + 6
            self.parts.append(svg.line(x, self.bottom, x, self.bottom + 4, "axis"))
            self.parts.append(text(centre, self.bottom + 17, label, anchor="middle"))

    def upright(self, x: float, label: str) -> None:
        """A dotted line from top to bottom, for a moment, with its name to the right, or to the left where that is too short."""
        self.parts.append(svg.line(x, self.top, x, self.bottom, "axis", stroke_dasharray="1 3"))
        before = x + svg.text_width(label) + 6 > self.end
        words = text(x + (-4 if before else 4), self.top + 11, label, anchor="end" if before else "start")
        self.parts.append(words)

    def goal(self, value: float, label: str, *, over_bars: bool) -> None:
        """A dashed line across, for what was asked for, and its name (`target 3` where it has none), kept apart from what they cross."""
        label = label or f"target {value:g}"
        y = self.y(value)
        halo = {"class_": "halo", "stroke": svg.GROUND, "stroke_width": "4", "stroke_linejoin": "round"}
        if over_bars:
            self.parts.append(element("path", d=f"M{self.left:.2f} {y:.2f}H{self.end:.2f}", **halo))
        self.parts.append(svg.line(self.left, y, self.end, y, "goal", stroke_dasharray="5 4"))
        x, anchor = (self.end - 4, "end") if over_bars else (self.left + 4, "start")
        base = y - 7 if y - self.top > 16 else y + 16  # not into the words above the plot
        for kind in ("ground", "ink"):
            words = text(x, base, label, kind=kind, anchor=anchor, font_weight="600")
            self.over.append(element("g", words, **halo) if kind == "ground" else words)

    def finished(self) -> tuple[float, str]:
        return self.height, "".join(self.parts + self.over)


def value_range(values: Sequence[float], *, from_zero: bool) -> tuple[float, float]:
    """A range that holds the values, with air, and is never empty."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if from_zero:
        low = min(low, 0.0)
    air = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if from_zero and low == 0.0 else low - air), high + air


def x_axis(
    frame: Frame, xs: Sequence[float], *, log: bool, whole: bool, margin: float = 0.0
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """The scale of a numeric lower axis, and its ticks in pixels."""
    low, high = (xs[0], xs[-1]) if xs else (0.0, 1.0)
    log = log and low > 0
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    if log:
        air = (high / low) ** margin
        low, high = low / air, high * air
    else:
        low, high = low - margin * (high - low), high + margin * (high - low)
    most = max(2, int((frame.end - frame.left) / 60))
    found = svg.log_ticks(low, high, most=most) if log else svg.ticks(low, high, most=most, whole=whole)
    x_of = svg.scale(low, high, frame.left + 4, frame.end - 4, log=log)
    return x_of, [(x_of(value), short(value)) for value in found]


def thinned(marks: Sequence[tuple[float, str]], pixels: float) -> list[tuple[float, str]]:
    """The first of every round number of marks, so that they do not touch."""
    most = max(1, int(pixels / 34))
    every = next((count for count in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if len(marks) / count <= most), 5000)
    return [mark for number, mark in enumerate(marks, 1) if number % every == 0 or (number == 1 and every > 2)]


def mark(number: int, x: float, y: float) -> str:
    """The shape of a group, around a point."""
    return (
        f"M{x - 4:.2f} {y:.2f}a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
        f"M{x - 4:.2f} {y - 4:.2f}h8v8h-8z",
        f"M{x:.2f} {y - 5:.2f}l5 9h-10z",
        f"M{x:.2f} {y - 5:.2f}l5 5l-5 5l-5-5z",
        f"M{x:.2f} {y + 5:.2f}l5-9h-10z",
        f"M{x - 5:.2f} {y - 1.5:.2f}h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z",
    )[number % 6]
