"""A sweep as a page and as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from csqcli.errors import printable
from csqcli.reporting import charts
from csqcli.reporting.charts import Point
from csqcli.reporting.figure import Figure
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
    "front where no other has as few bytes (or bit operations) and as much accuracy."
)
_ONE_DRAW = " One run is one draw: another seed would move every point."


def figures(found: Summary) -> list[Figure]:
    """Accuracy against bytes, and against bit operations where they were counted."""
    drawn = [
        _figure(
            found, "bytes", "pareto-bytes", "Accuracy against bytes on disk", "bytes of the bit-packed file, log scale"
        )
    ]
    if all(group["bops"] is not None for group in found["groups"]):
        drawn.append(
            _figure(
                found, "bops", "pareto-bops", "Accuracy against bit operations", "bit operations an image, log scale"
            )
        )
    return drawn


def _figure(found: Summary, what: str, name: str, title: str, x_label: str) -> Figure:
    groups, top1 = found["groups"], found["float"]["top1"]
    drawn = [
        Point(group[what], group["top1"], group["method"], f"{group['target_bits']:g}", group["top1_sd"])
        for group in groups
    ]
    best = [group for group in groups if group[f"on_front_{what}"]]
    reference = size(found["float"][what]) if what == "bytes" else short(found["float"][what])
    points_of = "mean" if found["seeds"] > 1 else "run"
    spread = f", bars are ± one standard deviation over {_seeds(found)}" if found["seeds"] > 1 else ""
    description = (
        f"{counted(len(groups), points_of)}, each at its target of mean planes{spread}; {len(best)} that no other beats are joined. "
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
    means = [Section("groups", "Means over seeds", _group_table(found))] if found["seeds"] > 1 else []
    sections = [
        Section("headline", "Asked and reached", _headline(found)),
        Section("figures", "The trade-off", "".join(figure.html() for figure in drawn)),
        *means,
        Section("runs", "Every run", _table(found)),
        Section("again", "Do it again", _again(found, command)),
    ]
    epochs = counted(found["epochs"], "epoch")
    subtitle = f"{found['data']}, {counted(found['samples'], 'validation image')}, {epochs}, {_seeds(found)}"
    title = f"{found['model']} at {counted(len(found['groups']), 'budget')}"
    return page(title, subtitle, sections, footer=f"Written by csq {__version__}.")


def _headline(found: Summary) -> str:
    reference, groups = found["float"], found["groups"]
    smallest = min(groups, key=lambda group: group["bytes"])
    best = max(groups, key=lambda group: (group["top1"], -group["bytes"]))
    entries = [("Float", f"{reference['top1']:.2f} %", f"{size(reference['bytes'])}, 4 bytes a value")]
    asked = found["max_drop"]
    if asked is not None:
        chosen = next((group for group in groups if group["group"] == asked["run"]), None)
        big = "none" if chosen is None else size(chosen["bytes"])
        small = (
            "of these runs" if chosen is None else f"{_top1(chosen)} %, {chosen['compression']:.1f}×, {chosen['group']}"
        )
        entries.append((f"Smallest within {points(asked['asked'])}", big, small))
    for name, group in (("Best top-1", best), ("Smallest file", smallest)):
        small = f"{size(group['bytes'])}, {group['compression']:.1f}×, {group['group']}"
        entries.append((name, f"{_top1(group)} %", small))
    how = element("p", escaped(_HOW_COUNTED + (_of_seeds(found) if found["seeds"] > 1 else _ONE_DRAW)))
    if found["left_out"]:
        how += element("p", escaped(f"Left out: {'; '.join(found['left_out'])}."))
    return cards(entries) + how


def _seeds(found: Summary) -> str:
    """``seed 0``, ``seeds 0 to 2``."""
    first, last = found["seed"], found["seed"] + found["seeds"] - 1
    return f"seed {first}" if first == last else f"seeds {first} to {last}"


def _of_seeds(found: Summary) -> str:
    """What means over seeds are means of."""
    return (
        f" Each target was run with {_seeds(found)}: numbers are means over them, the front is that of the means, and ± is one "
        f"standard deviation (sample). Every seed begins with the float network of seed {found['seed']}, so the spread is that of "
        "the search, given one float network."
    )


def _top1(group: Summary) -> str:
    """``95.79 ± 0.15``; the mean alone where there is one seed."""
    spread = "" if group["top1_sd"] is None else f" ± {group['top1_sd']:.2f}"
    return f"{group['top1']:.2f}{spread}"


def _group_table(found: Summary) -> str:
    headings = ("seeds", "target", "planes", "top-1, %", "±", "to float", "bytes", "compression", "BOPs")
    columns = [Column("runs"), Column("method"), *(Column(name, True) for name in headings), Column("front")]
    rows = [
        [
            (escaped(group["group"]), None),
            (escaped(group["method"]), None),
            (f"{group['n']}", group["n"]),
            (f"{group['target_bits']:g}", group["target_bits"]),
            (f"{group['mean_bits']:.4f}", group["mean_bits"]),
            (f"{group['top1']:.2f}", group["top1"]),
            (f"{group['top1_sd']:.2f}", group["top1_sd"]),
            (signed(group["gap"]), group["gap"]),
            *_costs(group),
            (_front(group), None),
        ]
        for group in found["groups"]
    ]
    caption = f"Means over {_seeds(found)}, each named as its run of seed {found['seed']}."
    return table("group-table", caption, columns, rows)


def _table(found: Summary) -> str:
    headings = ("target", "seed", "planes", "top-1, %", "to float", "bytes", "compression", "BOPs", "epochs")
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
            (f"{row['seed']}", row["seed"]),
            (f"{row['mean_bits']:.4f}", row["mean_bits"]),
            (f"{row['top1']:.2f}", row["top1"]),
            (signed(row["gap"]), row["gap"]),
            *_costs(row),
            (f"{row['epochs']}", row["epochs"]),
            (escaped(row["begins_with"] or "the float model"), None),
            (_front(row), None),
        ]
        for row in found["runs"]
    ]
    return table("run-table", "Each run is a folder beside this page, as `csq search` leaves it.", columns, rows)


def _costs(row: Summary) -> list[tuple[str, float]]:
    """Cells of bytes, compression and bit operations, of a run or of means."""
    bops = "–" if row["bops"] is None else escaped(short(row["bops"]))
    return [
        (f"{row['bytes']:,.0f}", row["bytes"]),
        (f"{row['compression']:.2f}×", row["compression"]),
        (bops, row["bops"] or 0),
    ]


def _again(found: Summary, command: str) -> str:
    command = command or "csqcli.sweep(…), from Python"
    shared = (
        "What does not depend on a target (the float model's accuracy, its adaptation, importance measured before training) "
        "was found once"
    )
    shared += "." if found["seeds"] == 1 else f", by seed {found['seed']}, and all seeds begin with it."
    if found["warm"]:
        whose = " of the same seed" if found["seeds"] > 1 else ""
        shared += f" All targets but the highest begin with that one's weights{whose}, and train for fewer epochs."
    return element("p", escaped(shared)) + element("pre", element("code", escaped(command)), tabindex="0")


def print_sweep(found: Summary, console: Console) -> None:
    """A row per method and target, their means where there are several seeds; those that none beats are marked."""
    marks, rows = glyphs(console), found["groups"]
    several = found["seeds"] > 1
    columns = [
        Tabular("runs" if several else "run", [printable(row["group"]) for row in rows], shrinks=LEAST_NAME),
        Tabular("target", [f"{row['target_bits']:g}" for row in rows], rank=2, right=True),
        Tabular("planes", [f"{row['mean_bits']:.4f}" for row in rows], rank=1, right=True),
        Tabular("top-1", [_top1(row) for row in rows], right=True),
        Tabular("to float", [f"{row['gap']:+.2f}" for row in rows], rank=3, right=True),
        Tabular("bytes", [f"{row['bytes']:,.0f}" for row in rows], right=True),
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
        f"front        {'means' if several else 'runs'} that no other beats: as few bytes, or bit operations (BOPs), and as much accuracy",
        *[
            f"seeds        means of {_seeds(found)}, ± one standard deviation; all begin with the float network of seed {found['seed']}"
        ]
        * several,
        f"trained      {counted(found['trained_epochs'], 'epoch')} in all",
    ]
    lines += [f"left out     {printable(what)}" for what in found["left_out"]]
    asked = found["max_drop"]
    if asked is not None and asked["run"] is not None:
        chosen = next(row for row in rows if row["group"] == asked["run"])
        lines.append(
            f"smallest     within {points(asked['asked'])} of float: {printable(asked['run'])}, {chosen['bytes']:,.0f} bytes, "
            f"{_top1(chosen)} % ({chosen['gap']:+.2f})"
        )
    print_lines(lines, console)


def _front(row: dict[str, Any]) -> str:
    return " ".join(name for name, what in (("bytes", "bytes"), ("BOPs", "bops")) if row[f"on_front_{what}"])
