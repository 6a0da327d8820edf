"""The budget: mean planes over weight elements, and the projection of masks onto it.

The sign-based steering of Eq. 7 approaches a target; it does not promise it. The projection does: planes that cost the
model least per element are dropped until the mean is at or under the target, then spare budget is given back where it
helps most. What is delivered never exceeds what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from csqcli.errors import UserError
from csqcli.quant.layers import Layer, match


@dataclass(frozen=True)
class PlaneLimits:
    """Fewest and most planes per layer, in the order of the layers."""

    fewest: tuple[int, ...]
    most: tuple[int, ...]


def plane_limits(
    layers: Sequence[Layer],
    *,
    bits: int,
    floor: int = 1,
    keep: Sequence[str] = (),
    min_bits: Mapping[str, int] | None = None,
    max_bits: Mapping[str, int] | None = None,
) -> PlaneLimits:
    """Limits from the recipe's globs: ``keep`` pins a layer at all its planes, ``min_bits``/``max_bits`` bound it."""
    names = [layer.name for layer in layers]
    fewest = dict.fromkeys(names, floor)
    most = dict.fromkeys(names, bits)
    for setting, table, limits in (("layers.min_bits", min_bits, fewest), ("layers.max_bits", max_bits, most)):
        for pattern, value in (table or {}).items():
            if not 0 <= value <= bits:
                raise UserError(f"{value} planes for `{pattern}`", where=setting, hint=f"take 0 to {bits}")
            limits.update(dict.fromkeys(match(pattern, names, where=setting), value))
    for pattern in keep:
        pinned = match(pattern, names, where="layers.keep")
        fewest.update(dict.fromkeys(pinned, bits))
        most.update(dict.fromkeys(pinned, bits))
    for name in names:
        if fewest[name] > most[name]:
            if min_bits and fewest[name] != floor:
                hint = "change layers.min_bits or layers.max_bits"
                raise UserError(f"at least {fewest[name]} and at most {most[name]} planes", where=name, hint=hint)
            fewest[name] = most[name]  # an explicit ceiling beats the general floor
    return PlaneLimits(tuple(fewest[name] for name in names), tuple(most[name] for name in names))


def check_feasible(target: float, weights: Sequence[int], limits: PlaneLimits) -> None:
    """UserError when even the fewest planes allowed exceed the target."""
    least = mean_planes(limits.fewest, weights)
    if least > target + 1e-9:
        raise UserError(
            f"target_bits {target:g} cannot be met: the layer rules alone need {least:.4g}",
            hint="raise the target or relax layers.keep / layers.min_bits / layers.floor",
        )


def mean_planes(planes: Sequence[int], weights: Sequence[int]) -> float:
    """Σ planes·weights / Σ weights, exact in integers before the one division."""
    return sum(p * w for p, w in zip(planes, weights, strict=True)) / sum(weights)


def project(
    masks: Tensor,  # bool [layers, bits]: planes that the search ended with
    importance: Tensor,  # [layers, bits] ≥ 0: expected loss increase if that plane vanished
    weights: Sequence[int],
    *,
    target: float,
    limits: PlaneLimits,
    spendable: Tensor | None = None,  # bool [layers, bits]: planes that spare budget may switch on; None: any
) -> Tensor:
    """Masks with mean planes ≤ target inside the limits, changed as little and as cheaply as possible.

    Greedy by importance per element. Ties go to the lower plane, then the later layer, so the result is a function of
    its inputs alone. Spare budget is spent on the best planes that still fit.
    """
    check_feasible(target, weights, limits)
    chosen = masks.clone().cpu()
    value = importance.detach().to("cpu", torch.float64) / torch.tensor(weights, dtype=torch.float64).unsqueeze(1)
    layers, bits = chosen.shape
    budget = int(target * sum(weights) + 1e-6)  # planes × elements allowed
    cells = [(layer, plane) for layer in range(layers) for plane in range(bits)]
    cheapest_first = sorted(cells, key=lambda cell: (float(value[cell]), cell[1], -cell[0]))
    dearest_first = cheapest_first[::-1]
    count = chosen.sum(dim=1).tolist()

    def spent() -> int:
        return sum(c * w for c, w in zip(count, weights, strict=True))

    def switch(cell: tuple[int, int], on: bool) -> None:
        chosen[cell] = on
        count[cell[0]] += 1 if on else -1

    for cell in cheapest_first:  # ceilings of single layers
        if chosen[cell] and count[cell[0]] > limits.most[cell[0]]:
            switch(cell, False)
    for cell in dearest_first:  # floors of single layers
        if not chosen[cell] and count[cell[0]] < limits.fewest[cell[0]]:
            switch(cell, True)
    for cell in cheapest_first:
        if spent() <= budget:
            break
        if chosen[cell] and count[cell[0]] > limits.fewest[cell[0]]:
            switch(cell, False)
    for cell in dearest_first:
        if spendable is not None and not spendable[cell]:
            continue
        if not chosen[cell] and count[cell[0]] < limits.most[cell[0]] and spent() + weights[cell[0]] <= budget:
            switch(cell, True)
    return chosen.to(masks.device)


def allocate(importance: Tensor, weights: Sequence[int], *, target: float, limits: PlaneLimits) -> list[int]:
    """Planes per layer that keep the most importance within the budget: an exact multiple-choice knapsack.

    ``importance`` [layers, bits] is what each further plane of a layer saves, planes taken in order. The budget is
    divided into at most 50,000 cells and costs are rounded up, so the result is never over the target; what rounding
    left unused is then given to the planes that save most per element.
    """
    check_feasible(target, weights, limits)
    value = importance.detach().to("cpu", torch.float64).cumsum(dim=1).numpy()
    total = int(target * sum(weights) + 1e-6)  # planes × elements allowed
    cell = max(1, -(-total // 50_000))
    spare = total - sum(few * weight for few, weight in zip(limits.fewest, weights, strict=True))
    cells = spare // cell
    best = numpy.zeros(cells + 1)  # most importance within c cells, layers so far
    choices = numpy.zeros((len(weights), cells + 1), dtype=numpy.int8)  # planes beyond the fewest that reach it
    for layer, weight in enumerate(weights):
        few, most = limits.fewest[layer], limits.most[layer]
        base = value[layer, few - 1] if few else 0.0
        reached = best.copy()
        for extra in range(1, most - few + 1):
            cost = -(-extra * weight // cell)
            if cost > cells:
                break
            gained = best[: cells + 1 - cost] + (value[layer, few + extra - 1] - base)
            better = gained > reached[cost:]
            reached[cost:][better] = gained[better]
            choices[layer, cost:][better] = extra
        best = reached
    planes, left = list(limits.fewest), cells
    for layer in reversed(range(len(weights))):
        extra = int(choices[layer, left])
        planes[layer] += extra
        left -= -(-extra * weights[layer] // cell)
    return _spend(planes, importance, weights, total, limits)


def _spend(planes: list[int], importance: Tensor, weights: Sequence[int], total: int, limits: PlaneLimits) -> list[int]:
    """Give unused budget to the planes that save most per element and still fit."""
    while True:
        left = total - sum(p * w for p, w in zip(planes, weights, strict=True))
        fitting = [i for i, w in enumerate(weights) if planes[i] < limits.most[i] and w <= left]
        if not fitting:
            return planes
        planes[max(fitting, key=lambda i: (float(importance[i, planes[i]]) / weights[i], -i))] += 1
