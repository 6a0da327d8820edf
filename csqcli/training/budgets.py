"""A recipe's targets as one budget of a run's layers, what they leave no room for, and what was reached of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from csqcli.file.io import QuantizedFile
from csqcli.models.coverage import Operations
from csqcli.quant.activations import ActivationQuantizers
from csqcli.quant.allocators.manual import written_planes
from csqcli.quant.budget import (
    BIT_OPERATIONS,
    BYTES,
    NANOSECONDS,
    Budget,
    all_of,
    latency_rows,
    make_budget,
    uniform_target,
)
from csqcli.quant.costs import WEIGHTS, Cost, costs, latency_cost, operations_of
from csqcli.quant.layers import Layer
from csqcli.quant.names import FLOAT_BITS, owner_of
from csqcli.recipe.schema import Recipe
from csqcli.training.latencies import NANOSECONDS_PER_MS, Latencies
from csqcli.training.limits import Ways, limits_of
from csqcli.training.run import Run, ShippedSize

Table = tuple[tuple[int, ...], ...]  # [layers][planes]: costs


class Counted(Protocol):
    """What budgets may ask of a model: its multiply-accumulates, the widths of its layers' inputs, the ways through it,
    bytes and latencies where one is in these."""

    operations: Operations | None
    activations: ActivationQuantizers | None
    ships: ShippedSize | None

    @property
    def ways(self) -> Ways | None: ...

    @property
    def latencies(self) -> Latencies | None: ...


def budget_of(run: Counted, recipe: Recipe, layers: Sequence[Layer]) -> Budget:
    """Targets, rules and costs of a run's layers."""
    settings, limits = recipe.quantization, limits_of(recipe, layers, run.ways)
    inputs = {entry.module: entry.bits for entry in run.activations.records()} if run.activations is not None else {}
    weights, found = tuple(layer.weights for layer in layers), []

    def counted_by(cost: Cost) -> Budget:
        return make_budget(
            layers,
            settings.target_bits or 0.0,
            bits=settings.max_bits,
            limits=limits,
            cost=cost,
            macs=run.operations.macs if run.operations is not None else None,
            input_bits={layer.name: inputs.get(owner_of(layer.name), FLOAT_BITS) for layer in layers},
        )

    def within(table: Table, allowance: int, unit: str, beside: int) -> Budget:
        return Budget(uniform_target(table, allowance), weights, limits, table, allowance, unit, beside)

    if run.ships is not None:
        found.append(within(tuple(map(tuple, run.ships.table)), run.ships.allowed, BYTES, run.ships.others))
    if settings.target_bops is not None:
        assert run.operations is not None
        of_layers = sum(run.operations.macs[layer.name] or 0 for layer in layers)
        operations = counted_by(costs.find("bops", where="quantization.cost"))
        others = max(run.operations.total - of_layers, 0)
        found.append(within_operations(operations, int(settings.target_bops), other_macs=others))
    if settings.target_latency is not None:
        assert run.latencies is not None
        table = latency_rows(counted_by(latency_cost(run.latencies.by_layer)).table, limits)
        allowance = int(settings.target_latency * NANOSECONDS_PER_MS) - run.latencies.beside
        found.append(within(table, allowance, NANOSECONDS, run.latencies.beside))
    if settings.target_bits is not None or not found:
        found.append(counted_by(costs.find(settings.cost, where="quantization.cost")))
    return all_of(found)


def within_operations(counted: Budget, asked: int, *, other_macs: int) -> Budget:
    """The budget of ``asked`` bit operations for one image, from that of a target whose cost is `bops`; ``other_macs`` are the
    multiply-accumulates of which no layer is a part."""
    beside = operations_of(other_macs, FLOAT_BITS, FLOAT_BITS)  # as `file.sizes.compute` counts them
    target = uniform_target(counted.table, asked - beside)
    return replace(counted, target=target, allowance=asked - beside, unit=BIT_OPERATIONS, beside=beside)


def check_targets(run: Run, recipe: Recipe, layers: Sequence[Layer]) -> None:
    """UserError for rules that match nothing, and for mean bits and bit operations that they leave no room for: before anything
    is measured. What else is counted (bytes, milliseconds, the widths of activations) is not known yet."""
    if not layers:
        return
    limits_of(recipe, layers)
    settings = recipe.quantization
    asked_in_bits = settings.target_bits is not None and settings.cost == WEIGHTS and not settings.has_resource_target
    only_bops = settings.target_bops is not None and not settings.in_bytes and settings.target_latency is None
    if asked_in_bits or (only_bops and settings.act_bits == FLOAT_BITS):
        budget_of(run, recipe, layers).check_feasible()


def check_written_planes(run: Run, recipe: Recipe, layers: Sequence[Layer]) -> None:
    """UserError for planes that do not fit the model or the budget: before a float phase spends time on it."""
    if recipe.quantization.planes and not recipe.quantization.has_resource_target:  # whose costs are not known yet
        written_planes(layers, budget_of(run, recipe, layers), recipe.quantization.planes)


def budgets_reached(run: Run, file: QuantizedFile, layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """What was asked for in each unit and what the file of a search comes to: the report's ``budgets``."""
    settings, manifest = run.recipe.quantization, file.manifest
    found: list[dict[str, Any]] = []
    if settings.target_bits is not None and manifest.layers:
        found.append({"budget": "bits", "asked": settings.target_bits, "reached": manifest.budget.mean_bits})
    shipped = run.folder.shipped_file(settings.ship_as)
    if run.ships is not None and shipped.exists():
        size = shipped.stat().st_size
        if settings.target_size is not None:
            found.append({"budget": "size", "asked": settings.target_size, "reached": size})
        else:
            reached = manifest.sizes.float_bytes / size
            found.append({"budget": "compression", "asked": settings.target_compression, "reached": reached})
        found[-1]["file"] = shipped.name
    if settings.target_bops is not None and manifest.compute is not None:
        found.append({"budget": "bops", "asked": settings.target_bops, "reached": manifest.compute.bops})
    if run.latencies is not None:
        [counted] = [each for each in budget_of(run, run.recipe, layers).ceilings if each.unit == NANOSECONDS]
        reached = (counted.spent([layer.planes for layer in file.layers]) + counted.beside) / NANOSECONDS_PER_MS
        found.append({"budget": "latency", "asked": settings.target_latency, "reached": reached})
        found[-1]["engine"] = run.latencies.engine_version
    if settings.target_act_bits is not None and run.record.mean_act_bits is not None:
        found.append({"budget": "act_bits", "asked": settings.target_act_bits, "reached": run.record.mean_act_bits})
    return found
