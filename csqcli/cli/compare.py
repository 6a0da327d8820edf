"""``csq compare``: without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csqcli.cli import output
from csqcli.cli.options import JsonOption


def compare(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Runs' folders, files that csq wrote, and report.json files."),
    ],
    as_json: JsonOption = False,
) -> None:
    """Show two or more quantized models side by side.

    Planes and bytes of every layer, accuracy, and which settings differ.

    Example: csq compare runs/a runs/b
    """
    from csqcli import api

    found = api.compare(*files)
    if as_json:
        output.as_json(found)
        return
    from csqcli.reporting.analyses import print_comparison

    print_comparison(found, output.console())
