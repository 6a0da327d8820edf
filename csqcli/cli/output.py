"""What reaches the terminal: lines that no name can forge, in whatever encoding the terminal has."""

from __future__ import annotations

import codecs
import io
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csqcli.errors import printable
from csqcli.system.launcher import is_main_process

if TYPE_CHECKING:
    from rich.console import Console

    from csqcli.file.manifest import Manifest
    from csqcli.system.progress import Display

_PLAIN = {
    "×": "x",
    "→": "->",
    "–": "-",
    "—": "-",
    "−": "-",
    "…": "...",
    "≤": "<=",
    "≥": ">=",
    "±": "+/-",
    "·": "*",
    "β": "beta",
    "λ": "lambda",
    "ρ": "rho",
    "σ": "sigma",
    "Σ": "sum",
    "─": "-",
    "━": "-",
}


class _OneLine(logging.Formatter):
    """Warnings name files, which may be called anything."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


_PIPE_COLUMNS = 140


def tolerate_any_text() -> None:
    """Let stdout and stderr write ASCII in place of signs that their encoding lacks, instead of failing, and let no warning
    steer the terminal. Who set up logging of their own is left alone.
    """
    if logging.lastResort is not None:  # what writes warnings to stderr where nobody asked for anything else
        logging.lastResort.setFormatter(_OneLine())
    codecs.register_error("csq-plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="csq-plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("unicode_escape").decode() for c in signs), error.end


def line(text: str) -> None:
    """One line on stdout; what would start another one or steer the terminal is escaped."""
    print(printable(text))


def block(text: str) -> None:
    """Several lines on stdout, as they are: YAML, JSON."""
    print(text, end="" if text.endswith("\n") else "\n")


def as_json(value: Any) -> None:
    """A value as JSON on stdout."""
    block(json.dumps(value, indent=2))


def error_line(text: str) -> None:
    """One line on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def console() -> Console:
    """Where tables go: stdout, of COLUMNS columns; unset, as wide as the terminal, or 140 where there is none.

    NO_COLOR is rich's to heed.
    """
    from rich.console import Console

    found, columns = Console(), os.environ.get("COLUMNS", "")
    asked = int(columns) if columns.isdecimal() else 0
    if asked or not found.is_terminal:
        return Console(width=asked or _PIPE_COLUMNS)
    return found if found.width else Console(width=_PIPE_COLUMNS)


def lines(texts: Iterable[str], *, indent: int) -> None:
    """Lines that are broken between words where the terminal ends, what follows a break ``indent`` columns in."""
    from csqcli.reporting.layout import print_lines

    print_lines(map(printable, texts), console(), indent=indent)


def result_of_run(file: Path, report: Mapping[str, Any], *, json_wanted: bool, display: Display) -> None:
    """What `csq search` and `csq finetune` print at the end: the report for people, with commands to go on with, or as it is."""
    from csqcli.file.header import read_manifest
    from csqcli.reporting.recompute import recomputed
    from csqcli.reporting.terminal import budget_line, print_report

    if not is_main_process():
        return
    if json_wanted:
        as_json(report)
    else:
        manifest = read_manifest(file)
        print_report(manifest, console(), history=report["history"], sparsity=recomputed(file).sparsity)
        lines(map(budget_line, report.get("budgets", ())), indent=13)
        line(f"wrote {file}")
        for command in _next_commands(file, manifest, report):
            display.say(f"next: {command}", whole=True)


def _next_commands(file: Path, manifest: Manifest, report: Mapping[str, Any]) -> list[str]:
    """What one does with the model of a run: measure it, and write the file that ships, if the run's budget has not."""
    run, data = shlex.quote(str(file.parent)), shlex.quote(str(report["recipe"]["data"]["source"]))
    trusted = " --trust-code" if manifest.spec.library == "factory" else ""
    shipped = [file.with_name(budget["file"]) for budget in report.get("budgets", ()) if "file" in budget]
    if shipped:
        return [f"csq evaluate {shlex.quote(str(shipped[0]))} --data {data}{trusted}"]
    evaluation = f"csq evaluate {run} --data {data}{trusted}"
    if not manifest.layers:
        return [evaluation]
    rounded = manifest.activations and all(entry.bits <= 8 for entry in manifest.activations)
    form = f"--onnx --activations int8 --calib {data}" if rounded else "--bit-packed"
    return [evaluation, f"csq export {run} {form}{trusted}"]


def print_plan(plan: Mapping[str, Any], *, json_wanted: bool, verbose: bool) -> None:
    """What `csq plan` and `csq search --dry-run` print: the plan for people, or as it is."""
    from csqcli.reporting.terminal import print_plan

    if not is_main_process():
        return
    if json_wanted:
        as_json(plan)
    else:
        print_plan(plan, console(), verbose=verbose)
