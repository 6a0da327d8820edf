"""``csq plan``: `csq search --dry-run` under a name of its own, with the options that a plan can have."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from csqcli.cli.options import copy_options
from csqcli.cli.search import print_plan_of, search

_OF_A_RUN = ("output", "force", "resume", "log", "dry_run", "calib")  # a plan has no folder, and steps to be timed


_VerboseOption = Annotated[
    bool, typer.Option("--verbose", help="Print every tensor with its planes, and the whole recipe, too.")
]


def plan(*, verbose: bool, **options: Any) -> None:
    """Say what a search would come to: bytes, memory, time.

    It takes a few of the search's own steps, and writes nothing.

    Example: csq plan resnet18 --target-bits 3 --data /imagenet
    """
    print_plan_of(options, verbose=verbose)


copy_options(plan, search, without=_OF_A_RUN, own={"verbose": (_VerboseOption, False)})
