"""What the commands that look at a model print: tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from csqcli.errors import printable
from csqcli.reporting.layout import LEAST_NAME, Column, glyphs, print_columns, print_lines
from csqcli.reporting.words import layer_names, short


def names_of(rows: Any) -> list[str]:
    """The layers' names as a table shows them."""
    return layer_names([printable(row["name"]) for row in rows])


def print_allocation(found: Mapping[str, Any], console: Console) -> None:
    """What `csq allocate` prints."""
    marks, rows = glyphs(console), found["layers"]
    most = max((row["planes"] for row in rows), default=0)
    columns = [
        Column("layer", names_of(rows), shrinks=LEAST_NAME),
        Column("shape", ["×".join(map(str, row["shape"])) for row in rows], rank=3),
        Column("weights", [f"{row['weights']:,}" for row in rows], rank=1, right=True),
        Column("MACs", ["–" if row["macs"] is None else short(row["macs"]) for row in rows], rank=2, right=True),
        Column(
            "planes", [marks.full * row["planes"] + marks.empty * (most - row["planes"]) for row in rows], style="cyan"
        ),
        Column("bits", [str(row["planes"]) for row in rows], right=True),
        Column("share", [f"{100 * row['share']:.1f} %" for row in rows], right=True),
    ]
    print_columns(columns, console, marks)
    console.print()
    weights = sum(row["weights"] for row in rows)
    used = 100 * found["spent"] / max(found["allowed"], 1)
    lines = [
        f"mean bits    {found['mean_bits']:.4f} (target {found['target_bits']:g}) over {weights:,} weights, "
        f"by {printable(found['allocator'])}",
        f"budget       {used:.2f} % used, counted in {printable(found['cost'])}",
    ]
    print_lines(lines, console)
