"""From a table's rows to recipes and runs: what is missing is trained or resumed, what is finished is read."""

from __future__ import annotations

import os
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from csqcli.data.specs import same_place
from csqcli.errors import UserError
from csqcli.quant.catalog import CARDS
from csqcli.quant.method_settings import PAPER
from csqcli.recipe.complete import check_complete
from csqcli.recipe.resolve import resolve, to_yaml
from csqcli.recipe.schema import Recipe
from csqcli.reporting.words import near_chance
from csqcli.reproducing.experiments import Experiment, Row
from csqcli.system.files import write_text
from csqcli.system.progress import Display, counted
from csqcli.system.settings import RESULT_NEUTRAL, without

Report = dict[str, Any]
_RECIPES = "recipes"  # folder inside the output
_FEW_EPOCHS = 10  # of a schedule from scratch: fewer are said to be few
SHORT_OF_TARGET = 0.3  # planes: a search that ended further below its target is marked


@dataclass(frozen=True)
class Run:
    """One row at one seed."""

    row: Row
    seed: int
    name: str  # of its folder
    recipe: Recipe


def plan(experiment: Experiment, *, scale: float, seeds: Sequence[int], more: Mapping[str, Any]) -> list[Run]:
    """Every run of an experiment, rows first. UserError for what does not fit together, and for a recipe without data."""
    runs = [
        Run(row, seed, name_of(experiment, row, seed), recipe_of(experiment, row, seed, scale=scale, more=more))
        for row in experiment.rows
        if row.trained
        for seed in seeds
    ]
    for run in runs:
        check_complete(run.recipe)
    return runs


def recipe_of(experiment: Experiment, row: Row, seed: int, *, scale: float, more: Mapping[str, Any]) -> Recipe:
    """The recipe of one run: the experiment's, at ``scale`` times its epochs, with what the row and the user say."""
    settings = _settings(row, seed)
    whole = resolve(experiment.recipe, settings)
    epochs: dict[str, Any] = {
        "epochs": max(1, round(whole.epochs * scale)),
        "finetune.epochs": round(whole.finetune.epochs * scale),
    }
    recipe = resolve(experiment.recipe, settings | epochs | dict(more))
    if row.pretrain:
        before = {"adaptation.epochs": recipe.epochs, "adaptation.lr": recipe.optimizer.peak_lr}
        recipe = resolve(experiment.recipe, settings | epochs | before | dict(more))
    for key in (*_common(row, seed), *row.settings):
        if _value(recipe, key) != settings[key]:
            what = f"`{key}` is what {experiment.name} sets for each of its runs"
            raise UserError(what, where="--set", hint="leave it out")
    return _from_anywhere(recipe)


def name_of(experiment: Experiment, row: Row, seed: int) -> str:
    """Name of a run's folder: its recipe and what the row changes in it, so that runs have one name where they are equal,
    whichever tables need them, and only there."""
    usual = resolve(experiment.recipe, _settings(replace(row, settings={}), seed))
    own = resolve(experiment.recipe, _settings(row, seed))
    changed = {key: _value(own, key) for key in sorted(row.settings) if _value(own, key) != _value(usual, key)}
    values = "".join(f"-{key.rpartition('.')[2]}{value:g}" for key, value in changed.items())
    trained = "-pretrained" if row.pretrain else ""
    return f"{experiment.recipe}-{row.method}{trained}{values}-a{row.act_bits}-seed{seed}"


def _common(row: Row, seed: int) -> dict[str, Any]:
    return {"quantization.method": row.method, "quantization.act_bits": row.act_bits, "seed": seed}


def _settings(row: Row, seed: int) -> dict[str, Any]:
    settings: dict[str, Any] = {**_common(row, seed), **row.settings}
    if row.method == "csq-uniform":  # the paper's schedule; a recipe's section belongs to one method
        fields = CARDS[row.method].settings.model_fields
        settings |= {key: value for key, value in PAPER.items() if key in fields}
        settings |= {"rounding": "nearest", "measure_unit_steps": True}
    return settings


def _value(recipe: Recipe, key: str) -> Any:
    """Of a dotted key; None where it is unset, and where the recipe's method has no such setting."""
    value: Any = recipe.to_dict()
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _from_anywhere(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths: where its commands are started, nobody knows. What is no path here stays as it is."""

    def placed(section: Any, *keys: str) -> Any:
        given = {key: getattr(section, key) for key in keys if getattr(section, key) is not None}
        return section.model_copy(
            update={key: same_place(value, absolute=os.path.abspath) for key, value in given.items()}
        )

    model, data = placed(recipe.model, "checkpoint", "warm_start"), placed(recipe.data, "source", "calib")
    return recipe.model_copy(update={"model": model, "data": data})


def check_images(runs: Sequence[Run]) -> None:
    """UserError for data that the runs would refuse. All have the same."""
    from csqcli.training.opening import open_images  # PyTorch, which recipes do not need

    open_images(runs[0].recipe)


def few_epochs(experiment: Experiment, runs: Sequence[Run]) -> str | None:
    """A line where the schedule is a share of the paper's from which little is learned, None for others."""
    epochs, whole = runs[0].recipe.epochs, resolve(experiment.recipe, {}).epochs
    if epochs >= min(_FEW_EPOCHS, whole):
        return None
    found = "rows may end at chance, or far below their target, which the table marks"
    return f"{counted(epochs, 'epoch')} of the paper's {whole}: too few to learn much; {found}"


def write_recipes(runs: Sequence[Run], output: Path) -> None:
    """The recipe of each run, for its command to read. UserError where the folder cannot be made, and where a recipe of that name
    is another one, which commands that were printed before still read."""
    folder = output / _RECIPES
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot be created ({error.strerror})"
        raise UserError(what, where=str(folder), hint="choose another --output") from None
    written = {_recipe_file(run, output): run.recipe for run in runs}
    for file, recipe in written.items():
        if file.exists() and _of_the_result(resolve(str(file), {})) != _of_the_result(recipe):
            hint = f"choose another --output, or remove {folder}"
            raise UserError("is the recipe of a plan with other settings", where=str(file), hint=hint)
    for file, recipe in written.items():
        write_text(file, to_yaml(recipe))


def _of_the_result(recipe: Recipe) -> dict[str, Any]:
    return without(recipe.to_dict(), Recipe.keys_marked(RESULT_NEUTRAL))


def command(run: Run, output: Path) -> str:
    """The `csq search` that is this run, once its recipe is written, for whoever spreads the runs over machines."""
    recipe, folder = _recipe_file(run, output).absolute(), (output / run.name).absolute()
    return shlex.join(["csq", "search", "--recipe", str(recipe), "-o", str(folder), "--resume"])


def _recipe_file(run: Run, output: Path) -> Path:
    return output / _RECIPES / f"{run.name}.yaml"


def run_all(
    experiment: Experiment,
    output: Path,
    *,
    scale: float,
    seeds: Sequence[int],
    more: Mapping[str, Any],
    display: Display,
) -> list[list[Report]]:
    """Train, resume or read every run; the reports of each row, none of one that is not trained. UserError as
    `pipeline.search`."""
    from csqcli import pipeline  # PyTorch, which recipes do not need

    runs = plan(experiment, scale=scale, seeds=seeds, more=more)
    short = few_epochs(experiment, runs)
    if short is not None:
        display.say(short)
    reports = []
    for number, run in enumerate(runs, 1):
        row = run.row
        display.say(
            f"{experiment.name}, run {number} of {len(runs)}: {row.label}, {row.act_bits}-bit activations, seed {run.seed}"
        )
        try:
            reports.append(pipeline.search(run.recipe, output / run.name, display=display, resume=True))
        except UserError as error:
            if "--force" not in error.hint:  # which `csq search` has, for one run, and a table has not
                raise
            hint = "choose another --output, or remove that folder to run it again"
            raise UserError(error.what, where=error.where, hint=hint) from None
    left = iter(reports)
    return [[next(left) for _ in seeds] if row.trained else [] for row in experiment.rows]


def summary(
    experiment: Experiment, found: Sequence[Sequence[Report]], *, scale: float, seeds: Sequence[int]
) -> dict[str, Any]:
    """What is written beside the paper's numbers; accuracies in percent, gaps in points against the float rows."""
    own_float = [
        report["accuracy"]["hard_top1"]
        for row, reports in zip(experiment.rows, found, strict=True)
        if row.method == "float"
        for report in reports
    ]
    paper_float = next((row.accuracy for row in experiment.rows if row.method == "float"), None)
    first = next(reports[0] for reports in found if reports)
    chance = 100 / len(first["classes"])
    return {
        "name": experiment.name,
        "title": experiment.title,
        "recipe": experiment.recipe,
        "scale": scale,
        "seeds": list(seeds),
        "model": first["model"]["source"],
        "weights_from": first["model"]["weights_from"],
        "data": first["recipe"]["data"]["source"],
        "epochs": first["recipe"]["epochs"],
        "chance": chance,
        "rows": [
            _row(row, reports, own_float, paper_float, chance)
            for row, reports in zip(experiment.rows, found, strict=True)
        ],
    }


def _row(
    row: Row, reports: Sequence[Report], own_float: Sequence[float], paper_float: float | None, chance: float
) -> dict[str, Any]:
    paper_gap = None if None in (row.accuracy, paper_float) else round(row.accuracy - paper_float, 2)  # type: ignore[operator]
    line: dict[str, Any] = {
        "label": row.label,
        "method": row.method,
        "pretrained": row.pretrain,
        "act_bits": row.act_bits,
        "paper": {"bits": row.bits, "compression": row.compression, "top1": row.accuracy, "gap": paper_gap},
        "ours": None,
    }
    if not reports:
        return line
    top1 = [report["accuracy"]["hard_top1"] for report in reports]
    units = [report["accuracy"].get("unit_steps_top1") for report in reports]
    planes = None if row.method == "float" else [report["budget"]["mean_bits"] for report in reports]
    target, sizes = reports[0]["budget"]["target_mean_bits"], [report["sizes"] for report in reports]
    searches = row.method in CARDS and CARDS[row.method].takes != "planes"
    line["ours"] = {
        "top1": top1,
        "mean": statistics.mean(top1),
        "sd": statistics.stdev(top1) if len(top1) > 1 else None,
        "gap": statistics.mean(top1) - statistics.mean(own_float) if own_float else None,
        "unit_steps_mean": statistics.mean(units) if None not in units else None,
        "planes": planes,
        "target": target,
        "bytes": [size["file_bytes"] for size in sizes],
        "compression": [size["float_bytes"] / size["file_bytes"] for size in sizes],
        "at_chance": min(top1) <= near_chance(chance),
        "short_of_target": searches and planes is not None and min(planes) < target - SHORT_OF_TARGET,
        "layer_names": [layer["name"] for layer in reports[0]["layers"]],
        "layers": [[layer["bits"] for layer in report["layers"]] for report in reports],
        "history": [[epoch.get("mean_bits") for epoch in report["history"]] for report in reports],
    }
    return line


def depth_trend(planes: Sequence[int]) -> float:
    """Spearman's rank correlation of planes with depth, −1 to 1; 0 where all layers have as many."""
    from scipy.stats import spearmanr

    if len(set(planes)) < 2:
        return 0.0
    return float(spearmanr(range(len(planes)), planes).statistic)
