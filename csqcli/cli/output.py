"""What reaches the terminal: lines that no name can forge, in whatever encoding the terminal has."""

from __future__ import annotations

import codecs
import io
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csqcli.errors import printable
from csqcli.system.launcher import is_main_process

if TYPE_CHECKING:
    from rich.console import Console

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
    """Where tables go: stdout, 140 columns wide where that is no terminal."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=140)


def result_of_run(file: Path) -> None:
    """What `csq search` and `csq finetune` print at the end."""
    from csqcli.file.header import read_manifest
    from csqcli.reporting.terminal import print_table

    if is_main_process():
        print_table(read_manifest(file), console())
        line(f"wrote {file}")
