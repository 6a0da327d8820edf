"""From a table's rows to recipes and runs: what is missing is trained or resumed, what is finished is read."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from csqcli.quant.catalog import CARDS, PAPER
from csqcli.recipe.complete import check_complete
from csqcli.recipe.resolve import resolve
from csqcli.recipe.schema import Recipe
from csqcli.reproducing.experiments import Experiment, Row
from csqcli.system.progress import Display

Report = dict[str, Any]


def recipe_of(experiment: Experiment, row: Row, seed: int, *, scale: float, more: Mapping[str, Any]) -> Recipe:
    """The recipe of one run: the experiment's, at ``scale`` times its epochs, with what the row and the user say."""
    settings = _settings(row, seed)
    whole = resolve(experiment.recipe, settings)
    settings["epochs"] = max(1, round(whole.epochs * scale))
    settings["finetune.epochs"] = round(whole.finetune.epochs * scale)
    return resolve(experiment.recipe, settings | dict(more))


def _settings(row: Row, seed: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "quantization.method": row.method,
        "quantization.act_bits": row.act_bits,
        "seed": seed,
        **row.settings,
    }
    if row.method == "csq-uniform":  # the paper's schedule; a recipe's section belongs to one method
        fields = CARDS[row.method].settings.model_fields
        settings |= {key: value for key, value in PAPER.items() if key in fields}
        settings |= {"rounding": "nearest", "measure_unit_steps": True}
    return settings


def plan(
    experiment: Experiment, *, scale: float, seeds: Sequence[int], more: Mapping[str, Any]
) -> list[tuple[Row, int, Recipe]]:
    """Every run of an experiment, rows first. UserError for what does not fit together."""
    rows = [row for row in experiment.rows if row.trained]
    return [(row, seed, recipe_of(experiment, row, seed, scale=scale, more=more)) for row in rows for seed in seeds]


def folder_of(output: Path, row: Row, seed: int) -> Path:
    """Of one run; shared by the tables that need it."""
    return output / f"{row.key}-seed{seed}"


def command(experiment: Experiment, row: Row, seed: int, recipe: Recipe, more: Mapping[str, Any], folder: Path) -> str:
    """The `csq search` that is this run, for whoever spreads the runs over machines."""
    settings = {key: value for key, value in _settings(row, seed).items() if value is not None}
    settings |= {"epochs": recipe.epochs, "finetune.epochs": recipe.finetune.epochs} | dict(more)
    words = ["csq", "search", "--recipe", experiment.recipe, "-o", str(folder), "--resume"]
    for key, value in settings.items():
        words += ["--set", f"{key}={json.dumps(value, ensure_ascii=False)}"]
    return shlex.join(words)


def run_all(
    experiment: Experiment,
    output: Path,
    *,
    scale: float,
    seeds: Sequence[int],
    more: Mapping[str, Any],
    display: Display,
) -> dict[str, list[Report]]:
    """Train, resume or read every run; the reports of each trained row by its key. UserError as `pipeline.search`."""
    from csqcli import pipeline  # PyTorch, which a plan does not need

    found: dict[str, list[Report]] = {}
    runs = plan(experiment, scale=scale, seeds=seeds, more=more)
    for _, _, recipe in runs:
        check_complete(recipe)
    for number, (row, seed, recipe) in enumerate(runs, 1):
        display.say(
            f"{experiment.name}, run {number} of {len(runs)}: {row.label}, {row.act_bits}-bit activations, seed {seed}"
        )
        report = pipeline.search(recipe, folder_of(output, row, seed), display=display, resume=True)
        found.setdefault(row.key, []).append(report)
    return found


def summary(
    experiment: Experiment, found: Mapping[str, Sequence[Report]], *, scale: float, seeds: Sequence[int]
) -> dict[str, Any]:
    """What is written beside the paper's numbers; accuracies in percent, gaps in points against the float rows."""
    own_float = [
        report["accuracy"]["hard_top1"] for row in experiment.rows if row.method == "float" for report in found[row.key]
    ]
    paper_float = next((row.accuracy for row in experiment.rows if row.method == "float"), None)
    first = next(iter(found.values()))[0]
    return {
        "name": experiment.name,
        "title": experiment.title,
        "recipe": experiment.recipe,
        "scale": scale,
        "seeds": list(seeds),
        "model": first["model"]["source"],
        "data": first["recipe"]["data"]["source"],
        "epochs": first["recipe"]["epochs"],
        "rows": [_row(row, found.get(row.key), own_float, paper_float) for row in experiment.rows],
    }


def _row(
    row: Row, reports: Sequence[Report] | None, own_float: Sequence[float], paper_float: float | None
) -> dict[str, Any]:
    paper_gap = None if None in (row.accuracy, paper_float) else round(row.accuracy - paper_float, 2)  # type: ignore[operator]
    line: dict[str, Any] = {
        "label": row.label,
        "method": row.method,
        "act_bits": row.act_bits,
        "paper": {"bits": row.bits, "top1": row.accuracy, "gap": paper_gap},
        "ours": None,
    }
    if not row.trained or reports is None:
        return line
    top1 = [report["accuracy"]["hard_top1"] for report in reports]
    units = [report["accuracy"].get("unit_steps_top1") for report in reports]
    line["ours"] = {
        "top1": top1,
        "mean": statistics.mean(top1),
        "sd": statistics.stdev(top1) if len(top1) > 1 else None,
        "gap": statistics.mean(top1) - statistics.mean(own_float) if own_float else None,
        "unit_steps_mean": statistics.mean(units) if None not in units else None,
        "planes": None if row.method == "float" else [report["budget"]["mean_bits"] for report in reports],
        "target": reports[0]["budget"]["target_mean_bits"],
        "bytes": [report["sizes"]["file_bytes"] for report in reports],
        "layers": [[layer["bits"] for layer in report["layers"]] for report in reports],
        "history": [[epoch.get("mean_bits") for epoch in report["history"]] for report in reports],
    }
    return line


def depth_trend(planes: Sequence[int]) -> float:
    """Spearman's rank correlation of planes with depth, −1 to 1; 0 where all layers have as many."""
    import numpy

    values = numpy.asarray(planes, dtype=float)
    if len(values) < 2 or (values == values[0]).all():
        return 0.0
    ranks = numpy.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])
    return float(numpy.corrcoef(numpy.arange(len(values)), ranks)[0, 1])
