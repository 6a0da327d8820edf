"""``csq plan``: `csq search --dry-run` under a name of its own, with the options that a plan can have."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

from csqcli.cli.search import search

_OF_A_RUN = ("output", "force", "resume", "log", "dry_run", "calib")  # a plan has no folder, and steps to be timed


def plan(**options: Any) -> None:
    """Say what a search would do and come to, from a few of its own steps: recipe, layers, bytes, memory, time. Writes nothing.

    Example: csq plan resnet18 --target-bits 3 --data /imagenet
    """
    search(**options, dry_run=True)


# typer reads the options off the signature: they are those of the search, so that no plan misses one
_signature = inspect.signature(search)
_hints = get_type_hints(search, include_extras=True)
_kept = [
    parameter.replace(annotation=_hints[name])
    for name, parameter in _signature.parameters.items()
    if name not in _OF_A_RUN
]
plan.__signature__ = _signature.replace(parameters=_kept, return_annotation=None)  # type: ignore[attr-defined]
plan.__annotations__ = {parameter.name: parameter.annotation for parameter in _kept} | {"return": None}
