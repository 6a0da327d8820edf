"""Charts as inline SVG: lines, bars per layer, scatter with a Pareto front, cells over time. Offline and without a script.

Each is a :class:`Figure`: its drawing at any width, a title and a description for who does not see it, and its numbers as a
table. ``svg()`` is a file for a paper; ``html()`` goes into a page whose style sheet holds `svg.STYLE` and `charts.STYLE`.

    figure = lines("mean-bits", "Mean bits over training", [Series("run", [(1, 8.0), (2, 3.1)])],
                   description="…", x_label="epoch", y_label="planes per weight", target=3)
    figure.svg(), figure.html()

Names may come out of files that anybody made: all text is escaped where it becomes markup, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from csqcli.reporting import svg
from csqcli.reporting.svg import element, escaped, text
from csqcli.reporting.words import short

WIDE, SMALL, NARROW = 1088, 520, 344  # pixels, on a page: across it, two or more side by side, on a phone
_PAPER = 720
STYLE = (
    "figure.chart{margin:0 0 1rem;min-width:0}figure.chart figcaption{font-weight:600;margin:0 0 .25rem}\n"
    "figure.chart p{margin:0 0 .5rem;color:var(--soft);font-size:.875rem}\n"
    "figure.chart svg{max-width:100%;height:auto}figure.chart svg.narrow{display:none}\n"
    "figure.chart details{font-size:.875rem;color:var(--soft)}figure.chart summary{cursor:pointer}\n"
    "figure.chart .data{overflow:auto;max-height:24rem}\n"
    "@media screen and (max-width:50rem){figure.chart svg.narrow{display:block}figure.chart svg.wide{display:none}}\n"
    "@media print{figure.chart{break-inside:avoid}figure.chart details{display:none}}\n"
)
_LEGEND_ROW = 18.0
Cell = str | int | float | None


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, float | None]]  # None breaks the line


@dataclass(frozen=True)
class Point:
    """A point of a scatter; ``error`` is half the length of its vertical bar."""

    x: float
    y: float
    group: str
    label: str = ""
    error: float | None = None


@dataclass(frozen=True)
class Figure:
    """A drawing, what it says in words, and its numbers."""

    name: str  # of its file; letters, digits and dashes
    title: str
    description: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    draw: Callable[[float], tuple[float, str]]  # width → height and markup
    small: bool = False  # to stand beside another

    def svg(self, width: int = _PAPER) -> str:
        """A file of its own: for a paper, for any viewer."""
        head, margin = 28.0, 8.0
        height, body = self.draw(width - 2 * margin)
        ground = element("rect", width=width, height=height + head, class_="ground", fill=svg.GROUND)
        title = text(margin, 19.0, self.title, kind="ink", font_weight="600", font_size="14")
        inner = element("g", body, transform=f"translate({margin:g} {head:g})")
        namespace = {"xmlns": "http://www.w3.org/2000/svg", "font_family": "Helvetica, Arial, sans-serif"}
        return self._root(ground + title + inner, width, height + head, "", **namespace) + "\n"

    def html(self) -> str:
        """A <figure>: caption, description, drawing for wide and narrow screens, and the numbers as a table."""
        sizes = ((SMALL if self.small else WIDE, "wide"), (NARROW, "narrow"))
        drawings = ""
        for width, kind in sizes:
            height, body = self.draw(width)
            drawings += self._root(body, width, height, kind)
        words = element("figcaption", escaped(self.title)) + element("p", escaped(self.description))
        table = element(
            "div", self._table(), class_="data", tabindex="0", role="region", aria_label=f"Numbers: {self.title}"
        )
        return element(
            "figure",
            words + drawings + element("details", "<summary>Numbers</summary>" + table),
            class_="chart",
            id=self.name,
        )

    def _root(self, body: str, width: float, height: float, kind: str, **more: object) -> str:
        names = [f"{self.name}-{part}{f'-{kind}' if kind else ''}" for part in ("title", "desc")]
        words = element("title", escaped(self.title), id=names[0]) + element(
            "desc", escaped(self.description), id=names[1]
        )
        return element(
            "svg",
            words + body,
            viewBox=f"0 0 {width:g} {height:g}",
            width=width,
            height=height,
            class_=f"chart {kind}".strip(),
            role="img",
            aria_labelledby=" ".join(names),
            font_size=svg.FONT,
            **more,
        )

    def _table(self) -> str:
        head = "".join(element("th", escaped(name), scope="col") for name in self.columns)
        body = "".join(element("tr", "".join(map(_cell, row))) for row in self.rows)
        return element("table", element("thead", element("tr", head)) + element("tbody", body or " "))


def _cell(value: Cell) -> str:
    if value is None:
        return element("td", "–", class_="number")
    if isinstance(value, str):
        return element("td", escaped(value) or " ")
    return element("td", f"{value:,}" if isinstance(value, int) else f"{value:.6g}", class_="number")


@dataclass
class _Frame:
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
            shape = _mark(number, x + 6, y + 6) if self.marks else f"M{x:.2f} {y:.2f}h12v12h-12z"
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

    def goal(self, value: float, label: str, *, over_bars: bool) -> None:
        """A dashed line across, for what was asked for, and its name, both kept apart from what they cross."""
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


def lines(
    name: str,
    title: str,
    series: Sequence[Series],
    *,
    description: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    from_zero: bool = False,
    whole_x: bool = False,
    target: float | None = None,
    target_label: str = "",
    marks: Sequence[tuple[float, str]] = (),
    small: bool = False,
) -> Figure:
    """Lines with their names at their ends; a dashed line at ``target``, and upright ones at ``marks`` (x, what is there)."""
    xs = sorted({x for one in series for x, _ in one.points})
    ys = [y for one in series for _, y in one.points if y is not None]
    y_low, y_high = _range([*ys, *([target] if target is not None else [])], from_zero=from_zero)

    def draw(width: float) -> tuple[float, str]:
        names = [svg.fitting(one.name, 0.34 * width) for one in series]
        right = max(map(svg.text_width, names), default=0.0) + 14 if len(series) > 1 else 12.0
        frame = _Frame(width, 200.0, y_low, y_high, y_label, x_label, right=right)
        x_of, x_marks = _x_axis(frame, xs, log=log_x, whole=whole_x)
        for value, label in marks:
            frame.parts.append(
                svg.line(x_of(value), frame.top, x_of(value), frame.bottom, "axis", stroke_dasharray="1 3")
            )
            before = x_of(value) + svg.text_width(label) + 6 > frame.end
            at = x_of(value) + (-4 if before else 4)
            frame.parts.append(text(at, frame.top + 11, label, anchor="end" if before else "start"))
        if target is not None:
            frame.goal(target, target_label or f"target {target:g}", over_bars=False)
        frame.x_ticks(x_marks)
        ends = []
        for number, one in enumerate(series):
            kind = svg.series(number)
            path, dots, last = _trace(one.points, x_of, frame.y)
            dash = svg.DASHES[number % len(svg.DASHES)]
            more = {"stroke_width": "2", "stroke_linejoin": "round", "stroke_dasharray": dash}
            frame.parts.append(
                element("path", d=path, class_=f"line {kind}", fill="none", stroke=svg.paint(kind), **more)
            )
            for x, y, words in dots:
                tip = element("title", escaped(f"{one.name}: {words}"))
                frame.parts.append(
                    element(
                        "circle", tip, cx=x, cy=y, r=2.5 if len(dots) < 40 else 1.2, class_=kind, fill=svg.paint(kind)
                    )
                )
            ends.append(last)
        if len(series) > 1:
            placed = svg.spread(ends, gap=14.0, low=frame.top, high=frame.bottom)
            for number, (label, y) in enumerate(zip(names, placed, strict=True)):
                frame.parts.append(text(frame.end + 8, y + 4, label, kind=svg.series(number)))
        return frame.finished()

    values = [dict(one.points) for one in series]
    rows: list[list[Cell]] = [[_plain(x), *(value.get(x) for value in values)] for x in xs]
    return Figure(name, title, description, [x_label, *(one.name for one in series)], rows, draw, small)


def bars(
    name: str,
    title: str,
    labels: Sequence[str],
    stacks: Mapping[str, Sequence[float]],
    *,
    description: str,
    x_label: str,
    y_label: str,
    ordered: bool = False,
    y_high: float | None = None,
    target: float | None = None,
    target_label: str = "",
    small: bool = False,
) -> Figure:
    """A bar per label, in the order given, of one part or of several stacked ones.

    ``ordered``: the parts are from few to many and told by lightness.
    """
    totals = [sum(values) for values in zip(*stacks.values(), strict=True)]
    high = y_high if y_high is not None else _range([*totals, target or 0.0], from_zero=True)[1]
    kinds = [svg.ordinal(number, len(stacks)) if ordered else svg.series(number) for number in range(len(stacks))]

    def draw(width: float) -> tuple[float, str]:
        legend = list(zip(kinds, stacks, strict=True)) if len(stacks) > 1 else []
        frame = _Frame(width, 130.0 if small else 190.0, 0.0, high, y_label, x_label, legend=legend)
        step = (frame.end - frame.left) / max(len(labels), 1)
        gap = min(0.2 * step, 6.0) if step > 3 else 0.0
        bases = [0.0] * len(labels)
        for kind, values in zip(kinds, stacks.values(), strict=True):
            path = ""
            for index, value in enumerate(values):
                top, base = frame.y(bases[index] + value), frame.y(bases[index])
                bases[index] += value
                x = frame.left + index * step + gap / 2
                if value > 0:
                    path += f"M{x:.2f} {base:.2f}V{top:.2f}h{step - gap:.2f}V{base:.2f}z"
            if path:
                frame.parts.append(element("path", d=path, class_=kind, fill=svg.paint(kind)))
        for index, label in enumerate(labels):
            words = "; ".join(
                f"{part} {values[index]:.4g}" if part else f"{values[index]:.4g}" for part, values in stacks.items()
            )
            tip = element("title", escaped(f"{label}: {words}"))
            box = {"x": frame.left + index * step, "y": frame.top, "width": step, "height": frame.bottom - frame.top}
            frame.parts.append(element("rect", tip, **box, fill_opacity="0"))
        if target is not None:
            frame.goal(target, target_label or f"target {target:g}", over_bars=True)
        frame.x_ticks(_under_bars(frame, labels, step))
        return frame.finished()

    rows: list[list[Cell]] = [
        [label, *(values[index] for values in stacks.values())] for index, label in enumerate(labels)
    ]
    return Figure(name, title, description, [x_label, *(part or y_label for part in stacks)], rows, draw, small)


def scatter(
    name: str,
    title: str,
    points: Sequence[Point],
    *,
    description: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    front: bool = True,
    target: float | None = None,
    target_label: str = "",
    small: bool = False,
) -> Figure:
    """Points of several groups, told apart by colour and shape; ``front`` joins those that none beats (less x, more y), and a
    dashed line stands at the height of ``target``."""
    groups = list(dict.fromkeys(point.group for point in points))
    best = pareto(points) if front else []
    reach = [y for point in points for y in (point.y - (point.error or 0), point.y + (point.error or 0))]
    y_low, y_high = _range([*reach, *([target] if target is not None else [])], from_zero=False)
    xs = sorted({point.x for point in points})

    def draw(width: float) -> tuple[float, str]:
        legend = [(svg.series(number), group) for number, group in enumerate(groups)] if len(groups) > 1 else []
        frame = _Frame(width, 240.0, y_low, y_high, y_label, x_label, legend=legend, right=16.0, marks=True)
        x_of, x_marks = _x_axis(frame, xs, log=log_x, whole=False, margin=0.06)
        frame.x_ticks(x_marks)
        if target is not None:
            frame.goal(target, target_label or f"target {target:g}", over_bars=False)
        if len(best) > 1:
            first, *rest = best
            steps = "".join(f"H{x_of(p.x):.2f}V{frame.y(p.y):.2f}" for p in rest)
            path = f"M{x_of(first.x):.2f} {frame.y(first.y):.2f}{steps}"
            frame.parts.append(
                element("path", d=path, class_="axis", fill="none", stroke=svg.SOFT, stroke_dasharray="3 3")
            )
        taken: list[tuple[float, float, float]] = []
        for point in points:
            number = groups.index(point.group)
            x, y, kind = x_of(point.x), frame.y(point.y), svg.series(number)
            if point.error:
                low, high = frame.y(point.y - point.error), frame.y(point.y + point.error)
                bar = f"M{x:.2f} {low:.2f}V{high:.2f}M{x - 3:.2f} {low:.2f}h6M{x - 3:.2f} {high:.2f}h6"
                frame.parts.append(element("path", d=bar, class_=f"line {kind}", fill="none", stroke=svg.paint(kind)))
            error = f" ± {point.error:.4g}" if point.error else ""
            tip = element("title", escaped(f"{point.group} {point.label}: {short(point.x)}, {point.y:.4g}{error}"))
            frame.parts.append(element("path", tip, d=_mark(number, x, y), class_=kind, fill=svg.paint(kind)))
            label = svg.fitting(point.label, 0.3 * width)
            above = len(best) > 1 and point in best
            frame.parts.append(_beside(frame, taken, x, y, label, above=above, has_bar=bool(point.error)))
        return frame.finished()

    rows: list[list[Cell]] = [
        [point.group, point.label, _plain(point.x), point.y, point.error, "yes" if point in best else ""]
        for point in points
    ]
    columns = ["group", "point", x_label, y_label, "±", "on the front"]
    return Figure(name, title, description, columns, rows, draw, small)


def cells(
    name: str,
    title: str,
    labels: Sequence[str],
    columns: Sequence[float],
    values: Sequence[Sequence[int]],
    *,
    description: str,
    x_label: str,
    y_label: str,
    high: int,
    unit: str,
) -> Figure:
    """A row per label, a column per moment, and lightness for a whole number from 0 to ``high``: what changed when."""

    def draw(width: float) -> tuple[float, str]:
        tall = 14.0 if len(labels) <= 80 else 7.0
        legend = [(svg.ordinal(value, high + 1), f"{value}") for value in range(high + 1)]
        legend[-1] = (legend[-1][0], f"{high} {unit}")
        shown = [svg.fitting(label, 0.34 * width) for label in labels]
        frame = _Frame(width, tall * len(labels), 0.0, 1.0, y_label, x_label, legend=legend, left_labels=shown)
        step = (frame.end - frame.left) / max(len(columns), 1)
        for row, (label, counts) in enumerate(zip(shown, values, strict=True)):
            y = frame.top + tall * row
            if tall > 10 or row % 2 == 0:
                frame.parts.append(text(frame.left - 6, y + 11, label, anchor="end", font_size="10"))
            start = 0
            for end in range(1, len(counts) + 1):
                if end < len(counts) and counts[end] == counts[start]:
                    continue
                kind = svg.ordinal(counts[start], high + 1)
                x, wide = frame.left + start * step, (end - start) * step
                tip = element(
                    "title", escaped(f"{labels[row]}: {counts[start]} {unit} from {x_label} {columns[start]:g}")
                )
                box = {"x": x, "y": y, "width": wide, "height": tall - 1}
                frame.parts.append(element("rect", tip, **box, class_=kind, fill=svg.paint(kind)))
                start = end
        centres = [(frame.left + (index + 0.5) * step, f"{column:g}") for index, column in enumerate(columns)]
        frame.x_ticks(_thinned(centres, frame.end - frame.left))
        return frame.finished()

    rows: list[list[Cell]] = [[label, *counts] for label, counts in zip(labels, values, strict=True)]
    return Figure(name, title, description, [y_label, *(f"{column:g}" for column in columns)], rows, draw)


def spark(values: Sequence[float], *, label: str, width: float = 96.0, height: float = 20.0) -> str:
    """A drawing of the size of a word: a bar per value, for a cell of a table."""
    top, step = max([*values, 1e-30]), width / max(len(values), 1)
    path = "".join(
        f"M{index * step:.1f} {height:g}v{-max(height * value / top, 0.7):.1f}h{step:.1f}V{height:g}z"
        for index, value in enumerate(values)
        if value > 0
    )
    drawn = element("path", d=path, class_="s0", fill=svg.paint("s0"))
    return element(
        "svg",
        drawn,
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        class_="chart spark",
        role="img",
        aria_label=label,
    )


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats with as little x and as much y, by rising x."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def _plain(value: float) -> Cell:
    return int(value) if float(value).is_integer() else value


def _range(values: Sequence[float], *, from_zero: bool) -> tuple[float, float]:
    """A range that holds the values, with air, and is never empty."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if from_zero:
        low = min(low, 0.0)
    air = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if from_zero and low == 0.0 else low - air), high + air


def _x_axis(
    frame: _Frame, xs: Sequence[float], *, log: bool, whole: bool, margin: float = 0.0
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


def _trace(
    points: Sequence[tuple[float, float | None]], x_of: Callable[[float], float], y_of: Callable[[float], float]
) -> tuple[str, list[tuple[float, float, str]], float]:
    """A path with a break at every None, its points with their values in words, and the height where it ends."""
    path, dots, pen = "", [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        path += f"{pen}{x_of(x):.2f} {y_of(y):.2f}"
        dots.append((x_of(x), y_of(y), f"{x:g}, {y:.4g}"))
        pen = "L"
    return path, dots, dots[-1][1] if dots else 0.0


def _under_bars(frame: _Frame, labels: Sequence[str], step: float) -> list[tuple[float, str]]:
    """Names under bars where they fit, else every so many bars' number, counted from 1."""
    centres = [frame.left + (index + 0.5) * step for index in range(len(labels))]
    if all(svg.text_width(label) < step - 6 for label in labels):
        return list(zip(centres, labels, strict=True))
    return _thinned([(x, f"{number}") for number, x in enumerate(centres, 1)], frame.end - frame.left)


def _thinned(marks: Sequence[tuple[float, str]], pixels: float) -> list[tuple[float, str]]:
    """The first of every round number of marks, so that they do not touch."""
    most = max(1, int(pixels / 34))
    every = next((count for count in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if len(marks) / count <= most), 5000)
    return [mark for number, mark in enumerate(marks, 1) if number % every == 0 or (number == 1 and every > 2)]


def _mark(number: int, x: float, y: float) -> str:
    """The shape of a group, around a point."""
    return (
        f"M{x - 4:.2f} {y:.2f}a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
        f"M{x - 4:.2f} {y - 4:.2f}h8v8h-8z",
        f"M{x:.2f} {y - 5:.2f}l5 9h-10z",
        f"M{x:.2f} {y - 5:.2f}l5 5l-5 5l-5-5z",
        f"M{x:.2f} {y + 5:.2f}l5-9h-10z",
        f"M{x - 5:.2f} {y - 1.5:.2f}h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z",
    )[number % 6]


def _beside(
    frame: _Frame,
    taken: list[tuple[float, float, float]],
    x: float,
    y: float,
    label: str,
    *,
    above: bool,
    has_bar: bool,
) -> str:
    """A point's label where none stands yet: to its right, left, above or below; nothing where all is taken. ``above`` first
    where a line leaves the point to its right; above and below are beside its upright bar, where it has one."""
    wide = svg.text_width(label)
    start = x + 8 if has_bar else x - wide / 2
    places = [(x + 8, y + 4), (x - 8 - wide, y + 4), (start, y - 9), (start, y + 18)]
    for start, base in places[2:3] * above + places:
        inside = frame.left <= start and start + wide <= frame.width and frame.top <= base - 8 and base <= frame.bottom
        free = all(abs(base - other) > 12 or start + wide < left or right < start for left, right, other in taken)
        if label and inside and free:
            taken.append((start, start + wide, base))
            return text(start, base, label)
    return ""
