"""Charts: well-formed, complete without sight, colour or script, and never markup out of a name."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from csqcli.reporting import charts, svg
from csqcli.reporting.charts import Point, Series
from csqcli.reporting.figure import NARROW, WIDE, Figure
from csqcli.reporting.words import middle, short, size
from tests.drawing import needs_png

HOSTILE = "</title></svg><script>alert(1)</script>\"'&\x00\x1b[2J\u202e"
SVG = "{http://www.w3.org/2000/svg}"


def figures(name: str = "conv1") -> dict[str, Figure]:
    """One of each kind; ``name`` stands wherever a name may."""
    words = {"description": f"Words on {name}.", "x_label": f"x {name}", "y_label": f"y {name}"}
    title, labels = f"Title {name}", [f"{name}.{number}" for number in range(4)]
    line = [Series(f"{name}{number}", [(1, 3.0 + number), (2, None), (3, 2.0)]) for number in range(2)]
    points = [Point(10.0**number, number, name, f"{name} {number}", error=0.5) for number in range(3)]
    return {
        "lines": charts.lines("lines", title, line, target=3, target_label=name, marks=[(2, name)], **words),
        "log lines": charts.lines("log-lines", title, line, log_x=True, **words),
        "bars": charts.bars("bars", title, labels, {"": [1, 2, 3, 0]}, target=2, target_label=name, **words),
        "stacks": charts.bars("stacks", title, labels, {name: [1] * 4, "b": [2] * 4}, ordered=True, **words),
        "scatter": charts.scatter("scatter", title, points, log_x=True, **words),
        "cells": charts.cells("cells", title, labels, [1, 2], [[8, 3]] * 4, high=8, unit=name, **words),
    }


@pytest.mark.parametrize("kind", figures())
def test_a_figure_says_what_it_shows_to_who_does_not_see_it(kind: str) -> None:
    figure = figures()[kind]
    root = ET.fromstring(figure.svg())
    assert root.get("role") == "img"
    named = [root.find(f".//*[@id='{name}']") for name in root.get("aria-labelledby", "").split()]
    assert [part.text for part in named if part is not None] == ["Title conv1", "Words on conv1."]
    page = ET.fromstring(figure.html())
    rows = page.findall(".//tbody/tr")
    assert len(rows) == len(figure.rows)
    assert all(len(row) == len(page.findall(".//thead/tr/th")) for row in rows)
    identifiers = [part.get("id") for part in page.iter() if part.get("id")]
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.parametrize("kind", figures())
def test_a_name_out_of_a_file_is_text_wherever_it_stands(kind: str) -> None:
    harmless, hostile = figures()[kind], figures(HOSTILE)[kind]
    for drawn, expected in ((hostile.svg(), harmless.svg()), (hostile.html(), harmless.html())):
        root, plain = ET.fromstring(drawn), ET.fromstring(expected)  # not well-formed would raise
        assert {part.tag for part in root.iter()} == {part.tag for part in plain.iter()}
        assert not any(name.startswith("on") for part in root.iter() for name in part.attrib)
        assert not re.search("[\x00\x1b\u202e]", drawn)


@pytest.mark.parametrize("kind", figures())
def test_a_file_of_its_own_needs_no_style_sheet_and_no_network(kind: str) -> None:
    drawn = figures()[kind].svg()
    assert "var(" not in drawn
    assert not re.search(r"<style|<script|href|url\(", drawn)
    for part in ET.fromstring(drawn).iter():
        if part.get("class") and part.tag in (f"{SVG}path", f"{SVG}rect", f"{SVG}circle", f"{SVG}text"):
            assert part.get("fill") or part.get("stroke"), part.attrib


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("kind", figures("blocks.6.0.a_rather_long_name_of_a_layer.weight"))
def test_nothing_is_drawn_outside_of_the_drawing(kind: str, width: int) -> None:
    figure = figures("blocks.6.0.a_rather_long_name_of_a_layer.weight")[kind]
    root = ET.fromstring(figure.svg(width))
    height = float(root.get("height", 0))
    for part in root.iter():
        x, y = (float(part.get(name, part.get(f"c{name}", 0))) for name in "xy")
        assert -0.01 <= x <= width + 0.01
        assert -0.01 <= y <= height + 0.01


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_words_in_every_colour_can_be_read_on_light_and_on_dark() -> None:
    for variables in re.findall(r":root\{([^}]*)\}", svg.STYLE):
        colours = dict(re.findall(r"--(\w+):(#\w+);", variables))
        for name in ("ink", "soft", *(name for name in colours if name.startswith("s") and name != "soft")):
            assert contrast(colours[name], colours["ground"]) >= 4.5, name


def test_the_front_is_what_no_point_beats() -> None:
    points = [Point(1, 50, "a"), Point(2, 60, "a"), Point(2, 61, "b"), Point(3, 55, "b"), Point(4, 70, "a")]
    assert [(point.x, point.y) for point in charts.pareto(points)] == [(1, 50), (2, 61), (4, 70)]


def test_a_line_of_one_point_and_one_of_equal_values_are_drawn() -> None:
    words = {"description": "", "x_label": "epoch", "y_label": "bits"}
    for points in ([(1, 3.0)], [(1, 3.0), (2, 3.0)], [(1, 0.0)], [(1, 3.0), (2, None), (3, 3.0)], []):
        root = ET.fromstring(charts.lines("one", "One", [Series("a", points)], **words).svg())
        seen = [y for _, y in points if y is not None]
        dots = root.findall(f".//{SVG}circle")
        assert len(dots) == len(seen)
        assert len(root.findall(f".//{SVG}path")) == 1
        assert len({dot.get("cy") for dot in dots}) == min(len(seen), 1)  # equal values are drawn at one height
        assert len({dot.get("cx") for dot in dots}) == len(seen)


def test_labels_at_the_ends_of_lines_do_not_touch() -> None:
    assert svg.spread([10, 10, 10], gap=14, low=0, high=100) == [10, 24, 38]
    assert svg.spread([99, 98, 3], gap=14, low=0, high=100) == [100, 86, 3]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 8, [0, 2, 4, 6, 8]), (0.9, 3.2, [1, 1.5, 2, 2.5, 3]), (0, 95, [0, 20, 40, 60, 80])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert svg.ticks(low, high, most=5) == pytest.approx(expected)
    assert svg.log_ticks(1e3, 1e6) == pytest.approx([1e3, 1e4, 1e5, 1e6])


def test_names_are_shortened_in_the_middle_and_numbers_have_units() -> None:
    assert middle("blocks.0.0.conv_pw.weight", 13) == "blocks…weight"
    assert [len(middle("layer4.1.conv2", width)) for width in (1, 2, 5, 14, 20)] == [1, 2, 5, 14, 14]
    assert (short(1_810_000_000), short(999), size(2_347_916), size(12)) == ("1.81 G", "999", "2.35 MB", "12 B")


def test_a_png_shows_what_the_svg_does_at_three_times_its_size() -> None:
    needs_png()
    from csqcli.reporting.png import png

    drawing = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="10">'
        '<rect width="20" height="10" fill="#ffffff"/><rect x="10" width="10" height="10" fill="#0069a8"/></svg>'
    )
    image = Image.open(io.BytesIO(png(drawing))).convert("RGB")
    assert image.size == (60, 30)
    assert (image.getpixel((5, 15)), image.getpixel((50, 15))) == ((255, 255, 255), (0, 0x69, 0xA8))
