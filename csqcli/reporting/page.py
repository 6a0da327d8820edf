"""A page of its own: one HTML file with all that it needs inside. It works from a disk, offline, without its script too.

Its policy (Content-Security-Policy) allows the one style sheet and the one script in it, by their hashes, and nothing else:
no request leaves the page, whatever a name in it looks like.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from csqcli.reporting import figure, svg
from csqcli.reporting.svg import element, escaped

_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:.5rem;background:var(--ground);padding:.25rem .5rem}
header,main,footer{max-width:70rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;line-height:1.25;margin:.25rem 0;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:0 0 .5rem}
p{margin:.25rem 0 .75rem;max-width:44rem;overflow-wrap:anywhere}
a{color:var(--s0)}code,pre{font-family:ui-monospace,Menlo,Consolas,monospace}
code{overflow-wrap:anywhere}pre{overflow:auto;background:var(--o0);padding:.75rem;border-radius:.375rem;font-size:.8125rem}
header p{margin:0;color:var(--soft);overflow-wrap:anywhere}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1rem;margin:.5rem 0 0;padding:0}
section{border-top:1px solid var(--faint);padding:1rem 0 .5rem;margin-top:1rem}
:focus-visible{outline:3px solid var(--s1);outline-offset:2px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:1rem;margin:0 0 1rem}
.cards div{border:1px solid var(--faint);border-radius:.5rem;padding:.75rem 1rem}
.cards dt{color:var(--soft);font-size:.875rem}.cards dd{margin:0}.cards .big{font-size:1.5rem;font-weight:650;line-height:1.3}
.cards dd:not(.big){font-size:.875rem;color:var(--soft)}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));gap:1.5rem 2rem}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding:0 0 .25rem}
th,td{padding:.25rem .5rem .25rem 0;text-align:left;white-space:nowrap;border-bottom:1px solid var(--faint)}
thead th{position:sticky;top:0;background:var(--ground);vertical-align:bottom}
.number{text-align:right}td.number,th.number{padding-left:.25rem}tbody th{font-weight:500}
th button{font:inherit;font-weight:600;color:inherit;background:none;border:0;padding:.25rem 0;cursor:pointer}
th button::after{content:" ↕";color:var(--soft)}
th[aria-sort=ascending] button::after{content:" ↑";color:var(--ink)}
th[aria-sort=descending] button::after{content:" ↓";color:var(--ink)}
.scroll{overflow:auto}.filter{margin:0 0 .5rem}.filter input{font:inherit;color:inherit;background:var(--ground);
border:1px solid var(--soft);border-radius:.375rem;padding:.25rem .5rem;max-width:100%}
footer{color:var(--soft);font-size:.875rem}
@media print{nav,.skip,.filter{display:none}
th button::after{content:none!important}h2{break-after:avoid}tr{break-inside:avoid}
body{font-size:10pt}section{break-inside:auto}.scroll{overflow:visible}
thead th{position:static}pre{white-space:pre-wrap}.cards div{break-inside:avoid}@page{margin:14mm}}
"""
_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], rows = [...body.rows];
  const key = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      rows.sort((a, b) => {
        const one = key(a, column), two = key(b, column);
        const order = head.classList.contains("number") ? one - two : one.localeCompare(two, undefined, { numeric: true });
        return down ? -order : order;
      });
      body.append(...rows);
    });
  });
  const filter = document.getElementById(table.id + "-filter"), count = document.getElementById(table.id + "-count");
  filter.closest("[hidden]").hidden = false;
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(" ").filter(Boolean);
    for (const row of rows) row.hidden = !words.every((word) => row.cells[0].textContent.toLowerCase().includes(word));
    count.textContent = rows.filter((row) => !row.hidden).length + " of " + rows.length;
  });
}
"""


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading of its own; ``body`` is markup."""

    id: str
    heading: str
    body: str


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and whether it holds numbers."""

    heading: str
    is_number: bool = False


def page(title: str, subtitle: str, sections: Sequence[Section], *, footer: str) -> str:
    """The HTML of a whole page. Text is escaped here, but for the sections' bodies."""
    style = svg.STYLE + figure.STYLE + _STYLE
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(_SCRIPT)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    links = "".join(
        element("li", element("a", escaped(section.heading), href=f"#{section.id}")) for section in sections
    )
    body = "".join(
        element(
            "section",
            element("h2", escaped(section.heading), id=f"{section.id}-heading") + section.body,
            id=section.id,
            aria_labelledby=f"{section.id}-heading",
        )
        for section in sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f'<link rel="icon" href="data:,">\n<title>{escaped(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n'
        '<a class="skip" href="#main">Skip to the report</a>\n'
        f"<header>\n<h1>{escaped(title)}</h1>\n<p>{escaped(subtitle)}</p>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n<main id="main">\n{body}\n</main>\n'
        f"<footer>{escaped(footer)}</footer>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def cards(entries: Sequence[tuple[str, str, str]]) -> str:
    """What a reader wants first: (name, large, small) of each number."""
    parts = (
        element(
            "div",
            element("dt", escaped(name)) + element("dd", escaped(big), class_="big") + element("dd", escaped(small)),
        )
        for name, big, small in entries
    )
    return element("dl", "".join(parts), class_="cards")


def table(name: str, caption: str, columns: Sequence[Column], rows: Sequence[Sequence[tuple[str, object]]]) -> str:
    """A table that the page's script makes sortable, and filters by its first column; whole without it.

    Each cell is markup and the value that it is sorted by, None for its text.
    """
    number = ["number" if column.is_number else None for column in columns]
    head = "".join(
        element("th", escaped(column.heading), scope="col", class_=kind)
        for column, kind in zip(columns, number, strict=True)
    )
    body = ""
    for row in rows:
        cells = ""
        for index, ((content, value), kind) in enumerate(zip(row, number, strict=True)):
            tag, scope = ("th", "row") if index == 0 else ("td", None)
            cells += element(tag, content or " ", scope=scope, class_=kind, data_value=value)
        body += element("tr", cells)
    label = element(
        "label", f"Show only rows with {element('input', type='search', id=f'{name}-filter', autocomplete='off')}"
    )
    count = element("span", f"{len(rows)} of {len(rows)}", id=f"{name}-count", role="status")
    inner = element("caption", escaped(caption)) + element("thead", element("tr", head)) + element("tbody", body or " ")
    held = element("table", inner, id=name, class_="sortable")
    return element("p", f"{label} {count}", class_="filter", hidden="hidden") + element(
        "div", held, class_="scroll", tabindex="0", role="region", aria_label=caption
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
