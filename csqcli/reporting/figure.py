"""A figure: its drawing at any width, a title and a description for who does not see it, and its numbers as a table.

``svg()`` is a file for a paper; ``html()`` goes into a page whose style sheet holds `svg.STYLE` and `figure.STYLE`. Offline and without
a script. Names may come out of files that anybody made: all text is escaped where it becomes markup, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from csqcli.reporting import svg
from csqcli.reporting.svg import element, escaped, text

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
Cell = str | int | float | None


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
