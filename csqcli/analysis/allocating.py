"""``csq allocate``: the planes that an allocator gives, without training."""

from __future__ import annotations

from typing import Any

from csqcli.analysis.opening import open_for_search, shares_of
from csqcli.exporting.latency_table import check_source, latencies_of
from csqcli.quant.budget import BIT_OPERATIONS, NANOSECONDS, Budget
from csqcli.recipe.schema import Recipe
from csqcli.system.progress import Display
from csqcli.training.budgets import budget_of
from csqcli.training.latencies import NANOSECONDS_PER_MS
from csqcli.training.preflight import check_named
from csqcli.training.setup import allocation


def allocate(recipe: Recipe, *, display: Display) -> dict[str, Any]:
    """What a training `csq search` with this recipe and its allocator would fix, from the same model, images and budget.

    That of the model as it comes: a search trains ``recipe.adaptation.epochs`` in float first, and post-training quantization
    allocates by other crops of its images. Both are said.

    Returns ``model``, ``allocator``, ``target_bits``, ``cost``, ``mean_bits`` (planes per weight element), ``spent`` and
    ``allowed`` (in the cost's unit; of several budgets those of the tightest), ``budgets`` (each ``budget``, ``asked`` and
    ``reached``), and per layer ``name``, ``shape``, ``weights``, ``macs``, ``planes``, ``share`` (of what is
    spent, 0 to 1) and ``importance`` (a list: what each plane saves by the allocator's measure; null where it gives planes).
    """
    settings = recipe.quantization
    assert settings.allocator is not None
    check_named(recipe)
    check_source(recipe)
    if recipe.adaptation.epochs:
        display.say("planes for the model as it comes: the search would train it in float first (adaptation.epochs)")
    if not recipe.card.trains:
        display.say("planes by the images that training looks at: post-training quantization crops them otherwise")
    opened = open_for_search(recipe, display)
    if settings.target_latency is not None:
        opened.latencies = latencies_of(recipe, opened.model, opened.layers, opened.config, display=display)
    budget = budget_of(opened, recipe, opened.layers)
    with display.step("measuring which layers matter"):
        found = allocation(
            recipe, settings.allocator, opened.model, opened.layers, opened.batches, budget, watch=display.step
        )
    macs = opened.operations.macs if opened.operations is not None else {}
    spent = [row[k] for row, k in zip(budget.table, found.planes, strict=True)]
    rows = zip(opened.layers, found.planes, shares_of(spent), strict=True)
    return {
        "model": opened.source,
        "allocator": settings.allocator,
        "target_bits": budget.target,
        "cost": budget.unit or settings.cost,
        "mean_bits": budget.mean_planes(found.planes),
        "spent": sum(spent),
        "allowed": budget.allowed,
        "budgets": _budgets(recipe, budget, found.planes),
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.parameter.shape),
                "weights": layer.weights,
                "macs": macs.get(layer.name),
                "planes": planes,
                "share": share,
                "importance": found.importance[index].tolist() if found.importance is not None else None,
            }
            for index, (layer, planes, share) in enumerate(rows)
        ],
    }


def _budgets(recipe: Recipe, budget: Budget, planes: list[int]) -> list[dict[str, Any]]:
    """What was asked for in each unit, and what the planes come to."""
    settings, found = recipe.quantization, []
    if settings.target_bits is not None:
        found.append({"budget": "bits", "asked": settings.target_bits, "reached": budget.mean_planes(planes)})
    for ceiling in budget.ceilings:
        reached = ceiling.spent(planes) + ceiling.beside
        if ceiling.unit == BIT_OPERATIONS:
            found.append({"budget": "bops", "asked": settings.target_bops, "reached": reached})
        if ceiling.unit == NANOSECONDS:
            milliseconds = reached / NANOSECONDS_PER_MS
            found.append({"budget": "latency", "asked": settings.target_latency, "reached": milliseconds})
    return found
