"""``csq sweep``: one model at many targets. The options of a search are `csq search`'s own."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

from csqcli.cli import output
from csqcli.cli.options import LOG_EVERY, JsonOption, LogOption, QuietOption, copy_options
from csqcli.cli.search import search, search_settings
from csqcli.errors import UserError
from csqcli.system.launcher import is_main_process, world_size

_NOT_OF_A_SWEEP = (
    *("target_bits", "target_size", "target_compression", "target_bops"),
    *("target_latency", "latency_table", "latency_engine"),
    *("planes", "output", "force", "resume", "dry_run", "quiet", "as_json", "log_every"),
)


Where: TypeAlias = Literal["local", "slurm"]  # where runs are started
_OWN: dict[str, Any] = {
    "targets": (
        Annotated[
            str | None,
            typer.Option(metavar="T,T,…", help="Mean bits (planes) per weight, a run for each: 1,1.5,2,3,4."),
        ],
        None,
    ),
    "max_drop": (
        Annotated[
            float | None,
            typer.Option(
                metavar="POINTS", help="Also find the smallest file whose top-1 is at most so many points below float."
            ),
        ],
        None,
    ),
    "with_": (
        Annotated[
            str | None,
            typer.Option(
                "--with", metavar="M,M,…", help="Methods to run at the same targets for comparison, e.g. ste,lsq,parq."
            ),
        ],
        None,
    ),
    "seeds": (
        Annotated[
            int,
            typer.Option(
                metavar="N",
                help="Run every target and method with so many seeds, --seed and those after it: mean ± standard deviation.",
            ),
        ],
        1,
    ),
    "warm": (
        Annotated[
            bool,
            typer.Option(
                "--warm/--cold",
                help="Begin each lower target with the highest one's weights and train it for fewer epochs, or with the float model.",
            ),
        ],
        False,
    ),
    "warm_epochs": (
        Annotated[
            int | None, typer.Option(min=1, help="Epochs of the runs that --warm shortens; 0.4 of --epochs if unset.")
        ],
        None,
    ),
    "output": (
        Annotated[
            Path | None,
            typer.Option("--output", "-o", help="Folder of the runs and the page; runs/MODEL-sweep if unset."),
        ],
        None,
    ),
    "jobs": (
        Annotated[
            int | None,
            typer.Option(
                "--jobs", "-j", min=1, max=1000, help="Runs at a time, in processes of their own; 1 if unset."
            ),
        ],
        None,
    ),
    "launcher": (
        Annotated[
            Where, typer.Option(help="Where the processes of --jobs run: here, or on a Slurm cluster through submitit.")
        ],
        "local",
    ),
    "launcher_set": (
        Annotated[
            list[str] | None,
            typer.Option(
                metavar="KEY=VALUE",
                help="With --launcher slurm: a setting of submitit, e.g. slurm_partition=gpu. Repeatable.",
            ),
        ],
        None,
    ),
    "log_every": (LogOption, LOG_EVERY),
    "quiet": (QuietOption, False),
    "as_json": (JsonOption, False),
}
_AT_ONCE = 64  # jobs that wait in a cluster's queue or run, where nobody says


def sweep(**options: Any) -> None:
    """Search one model at many targets, and plot the trade-off.

    What the runs share is done once; what is there already is not run again. The trade-off is written as a page, and
    as pareto.json.

    Example: csq sweep resnet18 --targets 1,1.5,2,3,4 --data /imagenet --output runs/sweep
    """
    from csqcli.sweeping.plan import Sweep, parse_targets, words
    from csqcli.system.progress import Display, counted

    own = {name: options.pop(name) for name in _OWN}
    _check(own)
    planned = Sweep(
        recipe=options["recipe"],
        overrides=search_settings(options),
        output=own["output"],
        targets=parse_targets(own["targets"]) if own["targets"] is not None else None,
        baselines=words(own["with_"] or ""),
        warm=own["warm"],
        warm_epochs=own["warm_epochs"],
        seeds=own["seeds"],
        max_drop=own["max_drop"],
    )
    members = planned.members()  # what cannot be run is known before PyTorch is loaded
    display = Display(quiet=own["quiet"] or not is_main_process(), log_every=own["log_every"])
    display.say(
        f"recipe {planned.recipe}: {planned.base.model.source} on {planned.base.data.source}, "
        f"{counted(len(members), 'run')}, into {planned.folder}"
    )
    for what in planned.left_out():
        display.say(f"left out: {what}")
    with display.step("loading PyTorch"):
        from csqcli.sweeping.launching import Launcher, LocalProcesses, Submitit
        from csqcli.sweeping.sweep import PAGE_FILE, run_sweep

    jobs = own["jobs"] or 1
    launcher: Launcher | None = None
    if own["launcher"] == "slurm":
        from csqcli.recipe.keys import parse_assignments

        jobs = own["jobs"] or _AT_ONCE
        launcher = Submitit(planned.folder / "slurm", parse_assignments(own["launcher_set"] or []))
    elif own["jobs"] is not None:
        launcher = LocalProcesses(jobs)
    found = run_sweep(
        planned, display=display, launcher=launcher, jobs=jobs, command=shlex.join(["csq", *sys.argv[1:]])
    )
    if not is_main_process():
        return
    if own["as_json"]:
        output.as_json(found)
        return
    from csqcli.sweeping.page import print_sweep

    print_sweep(found, output.console())
    output.line(f"wrote {planned.folder / PAGE_FILE}, pareto.json and a folder for each run")


def _check(own: dict[str, Any]) -> None:
    """UserError for options that do not go together."""
    if own["launcher_set"] and own["launcher"] != "slurm":
        raise UserError("is for runs on a cluster", where="--launcher-set", hint="pass --launcher slurm too")
    if world_size() > 1 and (own["jobs"] or own["launcher"] == "slurm" or own["max_drop"] is not None):
        name = "--max-drop" if own["max_drop"] is not None else "--jobs"
        hint = f"leave {name} out, or torchrun"
        raise UserError("does not go with torchrun, which shares each run among its processes", where=name, hint=hint)


copy_options(sweep, search, without=_NOT_OF_A_SWEEP, own=_OWN)


def sweep_run(
    folder: Annotated[Path, typer.Argument(help="The sweep's folder.")],
    key: Annotated[str, typer.Argument(help="The run's, or start for what the runs share.")],
) -> None:
    """One run of a sweep, from what its folder says: what `csq sweep --jobs` starts, here or on other machines.

    Example: csq sweep-run runs/sweep staged-2bit
    """
    from csqcli.sweeping.running import run_one
    from csqcli.system.progress import Display

    run_one(folder, key, display=Display(names_steps=False))
