"""``csq plan``: `csq search --dry-run` under a name of its own, with the options that a plan can have."""

from __future__ import annotations

from typing import Any

from csqcli.cli.options import take_options
from csqcli.cli.search import search

_OF_A_RUN = ("output", "force", "resume", "log", "dry_run", "calib")  # a plan has no folder, and steps to be timed


def plan(**options: Any) -> None:
    """Say what a search would do and come to, from a few of its own steps: recipe, layers, bytes, memory, time. Writes nothing.

    Example: csq plan resnet18 --target-bits 3 --data /imagenet
    """
    search(**options, dry_run=True)


take_options(plan, search, without=_OF_A_RUN)
