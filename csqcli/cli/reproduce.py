"""``csq reproduce``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from csqcli.cli import output
from csqcli.cli.options import (
    LOG_EVERY,
    DataOption,
    JsonOption,
    LogOption,
    QuietOption,
    SetOption,
    ValSplitOption,
    val_split,
    with_settings,
)
from csqcli.system.launcher import is_main_process


def reproduce(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="table1, table4, fig2, …; without one, a list of them.")
    ] = None,
    data: DataOption = None,
    val_split_: ValSplitOption = None,
    model: Annotated[str | None, typer.Option(help="Another network than the paper's, for a trial.")] = None,
    scale: Annotated[float, typer.Option(min=1e-6, help="Share of the paper's epochs, e.g. 0.1.")] = 1.0,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs per row, from seed 0.")] = 1,
    folder: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of runs and tables; runs/reproduce-SCALE if unset.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Write the recipes, print the runs as commands, and start none.")
    ] = False,
    settings: SetOption = None,
    log_every: LogOption = LOG_EVERY,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Rerun a table or figure of the paper.

    Trains what is missing, resumes what was stopped, and writes the table.

    Example: csq reproduce table4 --data cifar10:/cifar --model cifar_resnet20 --scale 0.1
    """
    from csqcli.reproducing.experiments import EXPERIMENTS, find_experiment
    from csqcli.system.progress import Display, counted

    if name is None:
        for experiment in EXPERIMENTS.values():
            runs = sum(row.trained for row in experiment.rows)
            output.line(f"{experiment.name:<16} {experiment.title} ({counted(runs, 'run')} a seed)")
        return
    experiment = find_experiment(name)
    typed = {"data.source": data, "data.val_split": val_split(val_split_), "model.source": model}
    more = with_settings(typed, settings, model__source="--model")
    target, chosen = folder or Path("runs") / f"reproduce-{scale:g}", range(seeds)
    display = Display(quiet=quiet or not is_main_process(), log_every=log_every)
    from csqcli.reproducing import runs as reproducing

    if plan:
        planned = reproducing.plan(experiment, scale=scale, seeds=chosen, more=more)
        reproducing.check_images(planned)
        short = reproducing.few_epochs(experiment, planned)
        if short is not None:
            display.say(short)
        reproducing.write_recipes(planned, target)
        for run in planned:
            output.line(reproducing.command(run, target))
        epochs = sum(run.recipe.adaptation.epochs + run.recipe.epochs + run.recipe.finetune.epochs for run in planned)
        output.line(f"# {counted(len(planned), 'run')}, {counted(epochs, 'epoch')} in all")
        return
    from csqcli.reproducing import page
    from csqcli.system.files import write_text

    found = reproducing.run_all(experiment, target, scale=scale, seeds=chosen, more=more, display=display)
    summary = reproducing.summary(experiment, found, scale=scale, seeds=chosen)
    if not is_main_process():
        return
    text, figure = page.markdown(experiment, summary), page.figure(experiment, summary)
    write_text(target / f"{name}.json", json.dumps(summary, indent=2) + "\n")
    write_text(target / f"{name}.md", text)
    write_text(target / f"{name}.svg", figure.svg())
    if as_json:
        output.as_json(summary)
    else:
        output.block(text)
        output.line(f"wrote {target / name}.md, .json and .svg")
