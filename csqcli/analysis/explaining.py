"""``csq explain``: why each layer of a delivered model has the planes that it has, and what other choices would do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from csqcli.analysis.moves import Slopes, Taken, give_plane, slopes, take_plane
from csqcli.analysis.opening import OpenedFile, open_quantized, shares_of
from csqcli.data.specs import WORKERS, ValSplit
from csqcli.errors import UserError
from csqcli.file.manifest import Manifest
from csqcli.quant.budget import Budget, PlaneLimits, make_budget, plane_limits
from csqcli.quant.catalog import CARDS
from csqcli.quant.costs import WEIGHTS, costs
from csqcli.quant.hard_layer import HardLayer
from csqcli.quant.layers import Layer
from csqcli.quant.measuring import Score, score, squared_errors, weights_as
from csqcli.quant.names import FLOAT_BITS, MOST_PLANES, owner_of
from csqcli.recipe.schema import RESOURCE_TARGETS, LayerRules
from csqcli.system.progress import Display
from csqcli.training.budgets import within_operations

SWAPS = 3  # that are reported
_SHARES = tuple(4.0**-power for power in range(6, -1, -1))  # of a layer's weights, tried until one is too many


@dataclass(frozen=True)
class _Held:
    """What swaps are held to."""

    budget: Budget
    cost: str  # that the budget's table counts
    targets: list[dict[str, Any]]  # `budget`, `asked`, and whether it is `kept`


@dataclass(frozen=True)
class _Options:
    """What a layer would be with one plane less and with one more, and what the network scores then."""

    taken: Taken | None  # None where it has no plane, or may have none less
    without: Score | None
    given: Tensor | None  # its weights with a plane more; None where it may have none more
    with_it: Score | None


def explain(
    path: Path,
    data: str,
    *,
    images: int | None,
    measured_swaps: int = 12,
    device: str = "auto",
    batch_size: int = 256,
    workers: int = WORKERS,
    val_split: ValSplit = None,
    trust_code: bool = False,
    display: Display,
) -> dict[str, Any]:
    """Why the layers of a quantized file have their planes, on so many validation images.

    Every other image tells gradients and curvature, and how many weights a further plane had best move; the others measure: a
    change is never measured on images that it was fitted to. BatchNorm is as in the file. Swaps of one plane within the budget
    are ranked by the sum of their two measured halves; the best ``measured_swaps`` of them are measured together, and the three
    with the lowest loss are given.

    Returns ``file``, ``images`` (that measure), ``loss`` (nats) and ``top1`` (percent) as delivered, ``mean_bits``, ``target_bits``,
    ``cost``, ``budgets`` (each ``budget``, ``asked``, and ``kept``: whether swaps are held to it, which they are not to bytes and
    milliseconds, since the file does not say what a plane takes of these); per layer
    ``name``, ``weights``, ``planes``, ``share`` (of the budget spent), ``importance`` (a list: the loss that each
    plane saves by its second-order expansion), ``take`` (``plane``, 0 the lowest in use; ``rise`` of the loss, ``per_bit`` that
    by the cost that it frees, ``top1``; or null) and ``give`` (``gain`` in loss, ``per_bit``, ``top1``; or null); ``swaps`` (``give``
    and ``take``, names of layers, take null where the budget has room; ``expected`` and ``measured`` change of the loss,
    ``top1``).
    """
    opened = open_quantized(
        path,
        data,
        images=images,
        device=device,
        batch_size=batch_size,
        workers=workers,
        val_split=val_split,
        trust_code=trust_code,
        display=display,
    )
    file, layers = opened.file, opened.layers
    if not layers:
        raise UserError("holds no quantized layer", where=str(path))
    if any(layer.basis is not None for layer in file.layers):
        what = "its levels are sums of a learned basis, of which no plane can be taken away alone"
        raise UserError(what, where=str(path), hint="csq sensitivity measures its layers before training")
    fitting, measuring = _halves(opened.batches, where=data)
    held = _held_to(file.manifest, layers)
    budget = held.budget
    planes = [layer.planes for layer in file.layers]
    with display.step("gradients and curvature"):
        found = slopes(opened.model, layers, fitting)
        saved = _importance(layers, file.layers, [one.curvature for one in found])
    start, before = score(opened.model, fitting), score(opened.model, measuring)
    options = []
    with display.step("a plane less and a plane more, layer by layer", len(layers)) as tell:
        for index, (layer, hard, slope) in enumerate(zip(layers, file.layers, found, strict=True)):
            few, most = budget.limits.min_planes[index], budget.limits.max_planes[index]
            taken = take_plane(hard, slope.curvature) if hard.planes > few else None
            given = _given(opened, fitting, layer, hard, slope, start.loss) if 0 < hard.planes < most else None
            options.append(
                _Options(
                    taken,
                    _with(opened, measuring, [(layer, taken.weight)]) if taken is not None else None,
                    given,
                    _with(opened, measuring, [(layer, given)]) if given is not None else None,
                )
            )
            tell(index + 1)
    swaps = _swaps(opened, measuring, options, planes, budget, before, most=measured_swaps, display=display)
    spent = [row[k] for row, k in zip(budget.table, planes, strict=True)]
    return {
        "file": str(path),
        "images": before.images,
        "loss": before.loss,
        "top1": before.top1,
        "mean_bits": file.manifest.budget.mean_bits,
        "target_bits": file.manifest.budget.target_mean_bits,
        "cost": held.cost,
        "budgets": held.targets,
        "layers": [
            {
                "name": layer.name,
                "weights": layer.weights,
                "planes": k,
                "share": share,
                "importance": row,
                "take": _take(option, before, budget.table[index][k] - budget.table[index][max(k - 1, 0)]),
                "give": _give(option, before, budget.table[index][min(k + 1, MOST_PLANES)] - budget.table[index][k]),
            }
            for index, (layer, k, share, row, option) in enumerate(
                zip(layers, planes, shares_of(spent), saved, options, strict=True)
            )
        ],
        "swaps": swaps,
    }


def _halves(batches: Sequence[tuple[Tensor, Tensor]], *, where: str) -> tuple[list[Any], list[Any]]:
    """Every other image, and the rest: both halves have all classes, also where images come sorted by class."""
    pixels, labels = torch.cat([images for images, _ in batches]), torch.cat([found for _, found in batches])
    if len(labels) < 2:
        raise UserError("one image cannot both fit and measure", where=where, hint="give two or more")
    size = max(len(found) for _, found in batches)
    return tuple(  # type: ignore[return-value]
        list(zip(pixels[start::2].split(size), labels[start::2].split(size), strict=True)) for start in (0, 1)
    )


def _held_to(manifest: Manifest, layers: Sequence[Layer]) -> _Held:
    """The budgets that the file was made under, as far as the file says: targets, rules of layers, cost, what the method takes.

    What is not a part of csq is not imported from what a file says: with a cost from outside planes count by weights, and a method from
    outside takes any. A file without a target, or over it, is held to the planes that it has.
    """
    section = manifest.recipe.get("quantization")
    settings: dict[str, Any] = section if isinstance(section, dict) else {}
    asked = {key: settings[key] for key in RESOURCE_TARGETS if _is_amount(settings.get(key))}
    counted = manifest.compute if manifest.compute is not None and manifest.compute.macs else None
    limits = _limits(manifest, settings, layers)
    inputs = {entry.module: entry.bits for entry in manifest.activations}
    planes = [layer.bits for layer in manifest.layers]

    def at_target(cost: str) -> Budget:
        return make_budget(
            layers,
            manifest.budget.target_mean_bits or manifest.budget.mean_bits,
            bits=MOST_PLANES,
            limits=limits,
            cost=costs.find(cost),
            macs={layer.name: layer.macs for layer in manifest.layers},
            input_bits={layer.name: inputs.get(owner_of(layer.name), FLOAT_BITS) for layer in layers},
        )

    kept: dict[str, Budget] = {}
    if counted is not None and "target_bops" in asked:
        others = max(counted.macs - counted.quantized_macs, 0)
        kept["bops"] = within_operations(at_target("bops"), int(asked["target_bops"]), other_macs=others)
    named = settings.get("cost")
    cost = named if named in costs.names() else WEIGHTS
    if manifest.budget.target_mean_bits is not None or set(asked) != {"target_bops"} or not kept:
        kept = {"bits": at_target(cost), **kept}
    first, *others_kept = (_reached(budget, planes) for budget in kept.values())
    budget = replace(first, also=tuple(ceiling for other in others_kept for ceiling in other.ceilings))
    targets = [{"budget": "bits", "asked": manifest.budget.target_mean_bits, "kept": True}] if "bits" in kept else []
    targets += [
        {"budget": (name := key.removeprefix("target_")), "asked": value, "kept": name in kept}
        for key, value in asked.items()
    ]
    return _Held(budget, cost if "bits" in kept else "bops", targets)


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _reached(budget: Budget, planes: Sequence[int]) -> Budget:
    """The budget, of at least what is spent."""
    return budget if budget.fits(planes) else replace(budget, allowance=budget.spent(planes))


def _limits(manifest: Manifest, settings: Mapping[str, Any], layers: Sequence[Layer]) -> PlaneLimits:
    """Fewest and most planes by the file's rules and its method, as far as they can be read."""
    most, method, rules = settings.get("max_bits"), settings.get("method"), manifest.recipe.get("layers")
    bits = most if isinstance(most, int) and 1 <= most <= MOST_PLANES else MOST_PLANES
    try:
        own = LayerRules.model_validate(rules if isinstance(rules, dict) else {})
        limits = plane_limits(
            layers, bits=bits, floor=own.floor, keep=own.keep, min_bits=own.min_bits, max_bits=own.max_bits
        )
    except (ValidationError, UserError):
        limits = plane_limits(layers, bits=bits)
    takes = CARDS[method].max_planes if isinstance(method, str) and method in CARDS else MOST_PLANES
    return replace(limits, max_planes=tuple(min(planes, takes) for planes in limits.max_planes))


def _importance(
    layers: Sequence[Layer], delivered: Sequence[HardLayer], curvatures: Sequence[Tensor]
) -> list[list[float]]:
    """½ Σ_i F_i ((W − Q_b)² − (W − Q_{b+1})²) for the planes b = 0 … k − 1 of each layer, Q_k the delivered weights W."""
    errors = squared_errors(layers, MOST_PLANES, curvatures)
    rows = []
    for hard, row in zip(delivered, errors.tolist(), strict=True):
        reached = [*row[: hard.planes], 0.0]
        rows.append([(a - b) / 2 for a, b in itertools.pairwise(reached)])
    return rows


def _given(opened: OpenedFile, fitting: Any, layer: Layer, hard: HardLayer, slope: Slopes, loss: float) -> Tensor:
    """The layer's weights with a plane more, as many of them moved as lower the loss of the fitting images most: none, perhaps."""
    best, least = hard.weight(), loss
    for share in _SHARES:
        weight = give_plane(hard, slope, share)
        reached = _with(opened, fitting, [(layer, weight)]).loss
        if reached >= least:
            break
        best, least = weight, reached
    return best


def _with(opened: OpenedFile, batches: Any, pairs: Sequence[tuple[Layer, Tensor]]) -> Score:
    with weights_as(pairs):
        return score(opened.model, batches)


def _take(option: _Options, before: Score, freed: int) -> dict[str, Any] | None:
    if option.taken is None or option.without is None:
        return None
    rise = option.without.loss - before.loss
    return {"plane": option.taken.plane, "rise": rise, "per_bit": rise / max(freed, 1), "top1": option.without.top1}


def _give(option: _Options, before: Score, spent: int) -> dict[str, Any] | None:
    if option.with_it is None:
        return None
    gain = before.loss - option.with_it.loss
    return {"gain": gain, "per_bit": gain / max(spent, 1), "top1": option.with_it.top1}


def _swaps(
    opened: OpenedFile,
    batches: Any,
    options: Sequence[_Options],
    planes: Sequence[int],
    budget: Budget,
    before: Score,
    *,
    most: int,
    display: Display,
) -> list[dict[str, Any]]:
    """The swaps of one plane within the budget that leave the lowest loss, of the ``most`` that promise most."""

    def fits(give: int, take: int | None) -> bool:
        return budget.fits([k + (at == give) - (at == take) for at, k in enumerate(planes)])

    expected: list[tuple[float, int, int | None]] = []
    for give, receiver in enumerate(options):
        if receiver.with_it is None:
            continue
        change = receiver.with_it.loss - before.loss
        if fits(give, None):
            expected.append((change, give, None))
            continue  # nothing need be taken for it
        for take, giver in enumerate(options):
            if take != give and giver.without is not None and fits(give, take):
                expected.append((change + giver.without.loss - before.loss, give, take))
    expected.sort(key=lambda swap: (swap[0], swap[1], -1 if swap[2] is None else swap[2]))
    found: list[dict[str, Any]] = []
    with display.step("measuring swaps", min(most, len(expected))) as tell:
        for change, receiver_at, giver_at in expected[:most]:
            given = options[receiver_at].given
            assert given is not None
            pairs = [(opened.layers[receiver_at], given)]
            taken = options[giver_at].taken if giver_at is not None else None
            if giver_at is not None and taken is not None:
                pairs.append((opened.layers[giver_at], taken.weight))
            reached = _with(opened, batches, pairs)
            found.append(
                {
                    "give": opened.layers[receiver_at].name,
                    "take": opened.layers[giver_at].name if giver_at is not None else None,
                    "expected": change,
                    "measured": reached.loss - before.loss,
                    "top1": reached.top1,
                }
            )
            tell(len(found))
    return sorted(found, key=lambda swap: swap["measured"])[:SWAPS]
