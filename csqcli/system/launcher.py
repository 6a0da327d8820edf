"""What torchrun says to each process that it starts, in environment variables. Importing this imports no torch."""

from __future__ import annotations

import os

from csqcli.errors import UserError

HINT = "torchrun sets these; unset them to run in one process"


def number(name: str, *, default: int) -> int:
    """A variable that holds a whole number from 0 up. UserError for anything else."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"`{text[:40]}` is not a number", where=f"environment variable {name}", hint=HINT)
    return int(text)


def world_size() -> int:
    """Processes in all; 1 without a launcher."""
    world = number("WORLD_SIZE", default=1)
    if world == 0:
        raise UserError("there is no group of 0 processes", where="environment variable WORLD_SIZE", hint=HINT)
    return world


def local_world_size() -> int:
    """Processes on this machine."""
    return max(1, number("LOCAL_WORLD_SIZE", default=1))


def is_main_process() -> bool:
    """Whether this process speaks. A rank means something in a group only, and what cannot be read is for others to refuse."""
    try:
        return world_size() == 1 or number("RANK", default=0) == 0
    except UserError:
        return True
