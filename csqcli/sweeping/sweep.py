"""A sweep from start to end: its runs, what they came to, and the page."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from csqcli.errors import UserError
from csqcli.reporting.words import points
from csqcli.sweeping import folder, page, running
from csqcli.sweeping.launching import Launcher, run_elsewhere
from csqcli.sweeping.plan import START, Member, Sweep
from csqcli.sweeping.summary import Summary, is_within, next_target, summary
from csqcli.system.files import write_text
from csqcli.system.launcher import is_main_process
from csqcli.system.progress import Display

PAGE_FILE, SUMMARY_FILE = "pareto.html", "pareto.json"


def run_sweep(
    sweep: Sweep,
    *,
    display: Display,
    launcher: Launcher | None = None,
    jobs: int = 1,
    command: str = "",
) -> Summary:
    """Run or resume what is missing, and write pareto.json, pareto.html and its figures into the sweep's folder.

    With a launcher, ``jobs`` runs at a time in processes of their own; without one, all of them here. UserError for
    input that a run would refuse, for a folder of something else, and where no run holds the drop that was asked for; all that was
    run is kept.
    """
    main = is_main_process()
    with folder.opened(sweep) if main else contextlib.nullcontext():
        members, done = sweep.members(), list[str]()

        def run(more: Sequence[Member]) -> None:
            if main:
                folder.write_plan(sweep, more)
            if launcher is None:
                running.run_here(more, sweep.base, sweep.folder, display=display)
            else:
                run_elsewhere(more, sweep.folder, launcher, jobs=jobs, display=display, known=done)
            done.extend([START, *(member.key for member in more)])

        run(members)
        if not main:  # of torchrun's
            return {}
        found = summary(sweep, members)
        if sweep.max_drop is not None:
            found = _look_on(sweep, members, found, run, display=display)
        _write(sweep.folder, found, command=command)
    if sweep.max_drop is not None and found["max_drop"]["run"] is None:
        best = max(found["runs"], key=lambda row: row["top1"])
        what = f"no target is within {points(sweep.max_drop)} of float: the best is {best['run']}, {best['gap']:+.2f}"
        raise UserError(what, where=str(sweep.folder), hint="add higher --targets, or more --epochs, or allow more")
    return found


def _look_on(
    sweep: Sweep,
    members: list[Member],
    found: Summary,
    run: Callable[[Sequence[Member]], None],
    *,
    display: Display,
) -> Summary:
    """Further targets, one at a time, until the lowest that holds the drop is known."""
    assert sweep.max_drop is not None
    own, least = sweep.base.card.name, float(max(sweep.base.layers.floor, 0.25))
    while True:
        top1 = found["float"]["top1"]
        tried = {
            row["target_bits"]: is_within(row["top1"], top1, sweep.max_drop)
            for row in found["runs"]
            if row["method"] == own
        }
        target = next_target(tried, least=least)
        if target is None:
            return found
        display.say(f"looking for the smallest within {points(sweep.max_drop)} of {top1:.2f} %: {target:g} planes next")
        members.append(sweep.member(target))
        run(members[-1:])
        found = summary(sweep, members)


def _write(output: Path, found: Summary, *, command: str) -> None:
    drawn = page.figures(found)
    write_text(output / SUMMARY_FILE, json.dumps(found, indent=2) + "\n")
    write_text(output / PAGE_FILE, page.pareto_page(found, drawn, command=command))
    for figure in drawn:
        write_text(output / f"{figure.name}.svg", figure.svg())
