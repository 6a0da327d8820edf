"""The commands of a Typer application, made once in a process instead of at every call.

A process of ``csq`` makes its two dozen commands once. Here hundreds of command lines go through the entry point in one process,
and making the same commands for each took longer than most of what they do.
"""

from __future__ import annotations

import functools

import typer

from csqcli.cli.app import app


def make_once() -> None:
    """Make them now, and keep them for this process and its forks."""
    if not hasattr(typer.main.get_command, "cache_info"):
        typer.main.get_command = functools.cache(typer.main.get_command)  # type: ignore[assignment]
    typer.main.get_command(app)
