"""A sweep as a page and as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from csqcli.errors import printable
from csqcli.reporting import charts
from csqcli.reporting.charts import Figure, Point
from csqcli.reporting.layout import LEAST_NAME, glyphs, print_columns, print_lines
from csqcli.reporting.layout import Column as Tabular
from csqcli.reporting.page import Column, Section, cards, page, table
from csqcli.reporting.svg import element, escaped
from csqcli.reporting.words import points, short, signed, size
from csqcli.sweeping.summary import Summary
from csqcli.system.progress import counted
from csqcli.version import __version__

_HOW_COUNTED = (
    "Planes are means over all quantized weights; a plane holds a digit in {−1, 0, 1} of every weight. Top-1 is that of the hard "
    "model as reloaded from its file. Bytes are those of the bit-packed file on disk, which is that model bit for bit, signs, "
    "scales, BatchNorm and description included; compression is the float model, 4 bytes a value, over them. A run is on the "
    "front where no other has as few bytes (or bit operations) and as much accuracy. One run is one draw: another seed "
    "would move every point."
)


def figures(found: Summary) -> list[Figure]:
    """Accuracy against bytes, and against bit operations where they were counted."""
    drawn = [_figure(found, "bytes", "pareto-bytes", "Accuracy against bytes on disk", "bytes of the bit-packed file")]
    if all(row["bops"] is not None for row in found["runs"]):
        drawn.append(
            _figure(found, "bops", "pareto-bops", "Accuracy against bit operations", "bit operations an image")
        )
    return drawn


def _figure(found: Summary, what: str, name: str, title: str, x_label: str) -> Figure:
    rows, top1 = found["runs"], found["float"]["top1"]
    drawn = [Point(row[what], row["top1"], row["method"], f"{row['target_bits']:g}") for row in rows]
    best = [row for row in rows if row[f"on_front_{what}"]]
    reference = size(found["float"][what]) if what == "bytes" else short(found["float"][what])
    description = (
        f"{counted(len(rows), 'run')}, each at its target of mean planes; {len(best)} that no other beats are joined. "
        f"Float: {top1:.2f} % at {reference}."
    )
    return charts.scatter(
        name,
        title,
        drawn,
        description=description,
        x_label=x_label,
        y_label="top-1, %",
        log_x=True,
        target=top1,
        target_label=f"float {top1:.2f} %",
    )


def pareto_page(found: Summary, drawn: Sequence[Figure], *, command: str) -> str:
    """The HTML of a sweep."""
    sections = [
        Section("headline", "Asked and reached", _headline(found)),
        Section("figures", "The trade-off", "".join(figure.html() for figure in drawn)),
        Section("runs", "Every run", _table(found)),
        Section("again", "Do it again", _again(found, command)),
    ]
    epochs = counted(found["epochs"], "epoch")
    subtitle = f"{found['data']}, {counted(found['samples'], 'validation image')}, {epochs}, seed {found['seed']}"
    title = f"{found['model']} at {counted(len(found['runs']), 'budget')}"
    return page(title, subtitle, sections, footer=f"Written by csq {__version__}.")


def _headline(found: Summary) -> str:
    reference, rows = found["float"], found["runs"]
    smallest = min(rows, key=lambda row: row["bytes"])
    best = max(rows, key=lambda row: (row["top1"], -row["bytes"]))
    entries = [("Float", f"{reference['top1']:.2f} %", f"{size(reference['bytes'])}, 4 bytes a value")]
    asked = found["max_drop"]
    if asked is not None:
        chosen = next((row for row in rows if row["run"] == asked["run"]), None)
        big = "none" if chosen is None else size(chosen["bytes"])
        small = (
            "of these runs"
            if chosen is None
            else f"{chosen['top1']:.2f} %, {chosen['compression']:.1f}×, {chosen['run']}"
        )
        entries.append((f"Smallest within {points(asked['asked'])}", big, small))
    for name, row in (("Best top-1", best), ("Smallest file", smallest)):
        entries.append((name, f"{row['top1']:.2f} %", f"{size(row['bytes'])}, {row['compression']:.1f}×, {row['run']}"))
    how = element("p", escaped(_HOW_COUNTED))
    if found["left_out"]:
        how += element("p", escaped(f"Left out: {'; '.join(found['left_out'])}."))
    return cards(entries) + how


def _table(found: Summary) -> str:
    headings = ("target", "planes", "top-1, %", "to float", "bytes", "compression", "BOPs", "epochs")
    columns = [
        Column("run"),
        Column("method"),
        *(Column(name, True) for name in headings),
        Column("begins with"),
        Column("front"),
    ]
    rows = [
        [
            (escaped(row["run"]), None),
            (escaped(row["method"]), None),
            (f"{row['target_bits']:g}", row["target_bits"]),
            (f"{row['mean_bits']:.4f}", row["mean_bits"]),
            (f"{row['top1']:.2f}", row["top1"]),
            (signed(row["gap"]), row["gap"]),
            (f"{row['bytes']:,}", row["bytes"]),
            (f"{row['compression']:.2f}×", row["compression"]),
            ("–" if row["bops"] is None else escaped(short(row["bops"])), row["bops"] or 0),
            (f"{row['epochs']}", row["epochs"]),
            (escaped(row["begins_with"] or "the float model"), None),
            (_front(row), None),
        ]
        for row in found["runs"]
    ]
    return table("run-table", "Each run is a folder beside this page, as `csq search` leaves it.", columns, rows)


def _again(found: Summary, command: str) -> str:
    command = command or "csqcli.sweep(…), from Python"
    shared = (
        "What does not depend on a target (the float model's accuracy, its adaptation, importance measured before training) "
        "was found once."
    )
    if found["warm"]:
        shared += " All targets but the highest begin with that one's weights, and train for fewer epochs."
    return element("p", escaped(shared)) + element("pre", element("code", escaped(command)), tabindex="0")


def print_sweep(found: Summary, console: Console) -> None:
    """A row per run; those that none beats are marked."""
    marks, rows = glyphs(console), found["runs"]
    columns = [
        Tabular("run", [printable(row["run"]) for row in rows], shrinks=LEAST_NAME),
        Tabular("target", [f"{row['target_bits']:g}" for row in rows], rank=2, right=True),
        Tabular("planes", [f"{row['mean_bits']:.4f}" for row in rows], rank=1, right=True),
        Tabular("top-1", [f"{row['top1']:.2f}" for row in rows], right=True),
        Tabular("to float", [f"{row['gap']:+.2f}" for row in rows], rank=3, right=True),
        Tabular("bytes", [f"{row['bytes']:,}" for row in rows], right=True),
        Tabular("smaller", [f"{row['compression']:.2f}×" for row in rows], rank=1, right=True),
        Tabular("BOPs", ["–" if row["bops"] is None else short(row["bops"]) for row in rows], rank=2, right=True),
        Tabular("epochs", [str(row["epochs"]) for row in rows], rank=4, right=True),
        Tabular("front", [_front(row) for row in rows], style="green"),
    ]
    print_columns(columns, console, marks)
    console.print()
    reference = found["float"]
    lines = [
        f"float        top-1 {reference['top1']:.2f} % of {counted(found['samples'], 'image')}, {reference['bytes']:,} bytes",
        "front        runs that no other beats: as few bytes, or bit operations (BOPs), and as much accuracy",
        f"trained      {counted(found['trained_epochs'], 'epoch')} in all",
    ]
    lines += [f"left out     {printable(what)}" for what in found["left_out"]]
    asked = found["max_drop"]
    if asked is not None and asked["run"] is not None:
        chosen = next(row for row in rows if row["run"] == asked["run"])
        lines.append(
            f"smallest     within {points(asked['asked'])} of float: {printable(asked['run'])}, {chosen['bytes']:,} bytes, "
            f"{chosen['top1']:.2f} % ({chosen['gap']:+.2f})"
        )
    print_lines(lines, console)


def _front(row: dict[str, Any]) -> str:
    return " ".join(name for name, what in (("bytes", "bytes"), ("BOPs", "bops")) if row[f"on_front_{what}"])
