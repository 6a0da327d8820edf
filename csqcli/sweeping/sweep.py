"""A sweep from start to end: its runs, what they came to, and the page."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from csqcli.errors import UserError
from csqcli.quant.budget import mean_planes
from csqcli.reporting.words import points
from csqcli.sweeping import folder, page, running
from csqcli.sweeping.launching import Launcher, run_elsewhere
from csqcli.sweeping.plan import START, Member, Sweep
from csqcli.sweeping.summary import RESOLUTION, WHOLE, Summary, is_within, next_target, read_report, summary
from csqcli.system.files import write_text
from csqcli.system.launcher import is_main_process
from csqcli.system.progress import Display
from csqcli.training.limits import Ways, limits_of

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
        _write(sweep.folder, found, command=command)
        while sweep.max_drop is not None and (target := _next(sweep, members[0], found)) is not None:
            within, top1 = points(sweep.max_drop), found["float"]["top1"]
            display.say(f"looking for the smallest within {within} of {top1:.2f} %: {target:g} planes next")
            more = sweep.members_at(target)
            members += more
            run(more)
            found = summary(sweep, members)
            _write(sweep.folder, found, command=command)
    if sweep.max_drop is not None and found["max_drop"]["run"] is None:
        best = max(found["groups"], key=lambda group: group["top1"])
        what = f"no target is within {points(sweep.max_drop)} of float: the best is {best['group']}, {best['gap']:+.2f}"
        raise UserError(what, where=str(sweep.folder), hint="add higher --targets, or more --epochs, or allow more")
    return found


def _next(sweep: Sweep, first: Member, found: Summary) -> float | None:
    """The target to try next; None once the lowest that holds the drop is known. ``first`` is a run that has ended."""
    assert sweep.max_drop is not None
    top1 = found["float"]["top1"]
    tried: dict[float, bool] = {}
    for row in found["groups"]:
        if row["method"] == sweep.base.card.name:
            # under rules of single layers the others have a target's whole part (`quant.allocators.base.uniform`)
            target = row["target_bits"] if sweep.mixes else math.floor(row["target_bits"])
            tried[target] = tried.get(target, False) or is_within(row["top1"], top1, sweep.max_drop)
    least = least_target(sweep, read_report(sweep.folder / first.key))
    return next_target(tried, least=least, resolution=RESOLUTION if sweep.mixes else WHOLE)


class _Layer(NamedTuple):
    name: str
    weights: int


def least_target(sweep: Sweep, report: Mapping[str, Any]) -> float:
    """The lowest target that the method and the recipe's rules leave room for in a network, of which a run's report tells."""
    layers = [_Layer(layer["name"], layer["weights"]) for layer in report["layers"]]
    weights = [layer.weights for layer in layers]
    ways = Ways(needed=report.get("needed", []), together=report.get("together", []))
    limits = limits_of(sweep.base, layers, ways)
    if sweep.mixes:
        fewest = mean_planes(limits.min_planes, weights)
        return max(math.ceil(100 * fewest) / 100, sweep.base.card.min_planes, RESOLUTION)
    most = sweep.base.quantization.max_bits
    return next((k for k in range(1, most) if mean_planes(limits.alike(k), weights) <= k), most)


def _write(output: Path, found: Summary, *, command: str) -> None:
    drawn = page.figures(found)
    write_text(output / SUMMARY_FILE, json.dumps(found, indent=2) + "\n")
    write_text(output / PAGE_FILE, page.pareto_page(found, drawn, command=command))
    for figure in drawn:
        write_text(output / f"{figure.name}.svg", figure.svg())
