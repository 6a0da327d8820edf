"""Charts as inline SVG: lines, bars per layer, scatter with a Pareto front, cells over time.

    figure = lines("mean-bits", "Mean bits over training", [Series("run", [(1, 8.0), (2, 3.1)])],
                   description="…", x_label="epoch", y_label="planes per weight", target=3)
    figure.svg(), figure.html()

Every kind gives a :class:`Figure`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from csqcli.reporting import svg
from csqcli.reporting.axes import Frame, mark, thinned, value_range, x_axis
from csqcli.reporting.figure import Cell, Figure
from csqcli.reporting.svg import element, escaped, text
from csqcli.reporting.words import short


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
    y_low, y_high = value_range([*ys, *([target] if target is not None else [])], from_zero=from_zero)

    def draw(width: float) -> tuple[float, str]:
        names = [svg.fitting(one.name, 0.34 * width) for one in series]
        right = max(map(svg.text_width, names), default=0.0) + 14 if len(series) > 1 else 12.0
        frame = Frame(width, 200.0, y_low, y_high, y_label, x_label, right=right)
        x_of, x_marks = x_axis(frame, xs, log=log_x, whole=whole_x)
        for value, label in marks:
            frame.upright(x_of(value), label)
        if target is not None:
            frame.goal(target, target_label, over_bars=False)
        frame.x_ticks(x_marks)
        ends = [_draw_line(frame, number, one, x_of) for number, one in enumerate(series)]
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
    high = y_high if y_high is not None else value_range([*totals, target or 0.0], from_zero=True)[1]
    kinds = [svg.ordinal(number, len(stacks)) if ordered else svg.series(number) for number in range(len(stacks))]

    def draw(width: float) -> tuple[float, str]:
        legend = list(zip(kinds, stacks, strict=True)) if len(stacks) > 1 else []
        frame = Frame(width, 130.0 if small else 190.0, 0.0, high, y_label, x_label, legend=legend)
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
            frame.goal(target, target_label, over_bars=True)
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
    y_low, y_high = value_range([*reach, *([target] if target is not None else [])], from_zero=False)
    xs = sorted({point.x for point in points})

    def draw(width: float) -> tuple[float, str]:
        legend = [(svg.series(number), group) for number, group in enumerate(groups)] if len(groups) > 1 else []
        frame = Frame(width, 240.0, y_low, y_high, y_label, x_label, legend=legend, right=16.0, marks=True)
        x_of, x_marks = x_axis(frame, xs, log=log_x, whole=False, margin=0.06)
        frame.x_ticks(x_marks)
        if target is not None:
            frame.goal(target, target_label, over_bars=False)
        if len(best) > 1:
            _draw_front(frame, best, x_of)
        taken: list[tuple[float, float, float]] = []
        for point in points:
            x, y, label = x_of(point.x), frame.y(point.y), svg.fitting(point.label, 0.3 * width)
            _draw_point(frame, groups.index(point.group), point, x, y)
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
        frame = Frame(width, tall * len(labels), 0.0, 1.0, y_label, x_label, legend=legend, left_labels=shown)
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
        frame.x_ticks(thinned(centres, frame.end - frame.left))
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


def _draw_line(frame: Frame, number: int, one: Series, x_of: Callable[[float], float]) -> float:
    """A series with a dot and its values in words at every point; the height where it ends."""
    kind = svg.series(number)
    path, dots, last = _trace(one.points, x_of, frame.y)
    dash = svg.DASHES[number % len(svg.DASHES)]
    more = {"stroke_width": "2", "stroke_linejoin": "round", "stroke_dasharray": dash}
    frame.parts.append(element("path", d=path, class_=f"line {kind}", fill="none", stroke=svg.paint(kind), **more))
    radius = 2.5 if len(dots) < 40 else 1.2
    for x, y, words in dots:
        tip = element("title", escaped(f"{one.name}: {words}"))
        frame.parts.append(element("circle", tip, cx=x, cy=y, r=radius, class_=kind, fill=svg.paint(kind)))
    return last


def _draw_front(frame: Frame, best: Sequence[Point], x_of: Callable[[float], float]) -> None:
    """Steps from one of the best points to the next."""
    first, *rest = best
    steps = "".join(f"H{x_of(point.x):.2f}V{frame.y(point.y):.2f}" for point in rest)
    path = f"M{x_of(first.x):.2f} {frame.y(first.y):.2f}{steps}"
    frame.parts.append(element("path", d=path, class_="axis", fill="none", stroke=svg.SOFT, stroke_dasharray="3 3"))


def _draw_point(frame: Frame, number: int, point: Point, x: float, y: float) -> None:
    """A point in the shape and colour of its group, with its error as an upright bar."""
    kind = svg.series(number)
    if point.error:
        low, high = frame.y(point.y - point.error), frame.y(point.y + point.error)
        bar = f"M{x:.2f} {low:.2f}V{high:.2f}M{x - 3:.2f} {low:.2f}h6M{x - 3:.2f} {high:.2f}h6"
        frame.parts.append(element("path", d=bar, class_=f"line {kind}", fill="none", stroke=svg.paint(kind)))
    error = f" ± {point.error:.4g}" if point.error else ""
    tip = element("title", escaped(f"{point.group} {point.label}: {short(point.x)}, {point.y:.4g}{error}"))
    frame.parts.append(element("path", tip, d=mark(number, x, y), class_=kind, fill=svg.paint(kind)))


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


def _under_bars(frame: Frame, labels: Sequence[str], step: float) -> list[tuple[float, str]]:
    """Names under bars where they fit, else every so many bars' number, counted from 1."""
    centres = [frame.left + (index + 0.5) * step for index in range(len(labels))]
    if all(svg.text_width(label) < step - 6 for label in labels):
        return list(zip(centres, labels, strict=True))
    return thinned([(x, f"{number}") for number, x in enumerate(centres, 1)], frame.end - frame.left)


def _beside(
    frame: Frame,
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
