"""The budget: what all layers' planes may cost together, and the exact allocation and projection onto it.

The budget of a target T is what the network would cost (`costs`) with T planes in every layer, so a target means the same
whatever the cost. What is delivered never costs more.

One budget is shared out by a knapsack (`allocate`); several at once by an integer program (`program`). While masks are soft only
one of several steers them, the tightest: the one that leaves the fewest planes if every layer had as many (`all_of`). A price per
budget would keep them all in the mean, but the planes that are fixed then come from the integer program anyway, which
keeps each of them exactly.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from csqcli.errors import UserError
from csqcli.quant.costs import Cost, LayerFacts, weight_planes
from csqcli.quant.layers import Layer, match
from csqcli.quant.names import FLOAT_BITS, MOST_PLANES
from csqcli.quant.program import best_within

_CELLS = 50_000  # the knapsack's resolution of the budget
BYTES, BIT_OPERATIONS, NANOSECONDS = "bytes", "bit operations", "nanoseconds"  # units of allowances
_MILLION = 10**6


@dataclass(frozen=True)
class PlaneLimits:
    """Fewest and most planes per layer, in the order of the layers."""

    min_planes: tuple[int, ...]
    max_planes: tuple[int, ...]
    needed: tuple[str, ...] = ()  # layers that keep a plane: the output is constant without them (`quant.needed`)
    together: tuple[tuple[int, ...], ...] = ()  # layers that have a plane each or none at all

    def alike(self, planes: int) -> list[int]:
        """So many planes, one at least, in every layer, but for the rules of single layers."""
        return [min(max(planes, few, 1), most) for few, most in zip(self.min_planes, self.max_planes, strict=True)]


@dataclass(frozen=True)
class Ceiling:
    """A budget beside another one, which an allocation keeps as well."""

    table: tuple[tuple[int, ...], ...]  # as a Budget's
    allowed: int  # the most that all layers may cost together
    unit: str = ""
    beside: int = 0
    target: float = 0.0  # how many planes in every layer would cost so much

    def spent(self, planes: Sequence[int]) -> int:
        """Cost of an allocation."""
        return sum(row[k] for row, k in zip(self.table, planes, strict=True))


@dataclass(frozen=True)
class Budget:
    """A target of mean planes, the rules of single layers, and what planes cost."""

    target: float  # mean planes; with the cost `weights` their mean over elements
    weights: tuple[int, ...]  # elements of every layer
    limits: PlaneLimits
    table: tuple[tuple[int, ...], ...]  # [layers][planes 0 … n]: cost of a layer at so many planes
    allowance: int | None = None  # the most that all layers may cost, where that and no target was asked for
    unit: str = ""  # of the allowance, for messages: bytes
    beside: int = 0  # what the network costs beyond its layers, in that unit; the allowance is without it
    also: tuple[Ceiling, ...] = ()  # further budgets that are kept

    @functools.cached_property
    def ceilings(self) -> tuple[Ceiling, ...]:
        """All budgets alike, this one first."""
        return (Ceiling(self.table, self.allowed, self.unit, self.beside, self.target), *self.also)

    def left(self, planes: Sequence[int]) -> list[int]:
        """What an allocation leaves of every budget; below 0 where it exceeds one."""
        return [ceiling.allowed - ceiling.spent(planes) for ceiling in self.ceilings]

    def fits(self, planes: Sequence[int]) -> bool:
        """Whether an allocation is within every budget."""
        return min(self.left(planes)) >= 0

    def has_room(self, layer: int, planes: Sequence[int], left: Sequence[int]) -> bool:
        """Whether one plane more in a layer is within what an allocation has ``left``."""
        rows, k = (ceiling.table[layer] for ceiling in self.ceilings), planes[layer]
        return all(row[k + 1] - row[k] <= free for row, free in zip(rows, left, strict=True))

    @functools.cached_property
    def counts_weights(self) -> bool:
        """Whether a layer's cost is its planes × elements."""
        rows = zip(self.table, self.weights, strict=True)
        return all(row == tuple(k * weight for k in range(len(row))) for row, weight in rows)

    @functools.cached_property
    def allowed(self) -> int:
        """The most that all layers may cost together: the allowance, or what ``target`` planes everywhere do."""
        if self.allowance is not None:
            return self.allowance
        if self.counts_weights:
            return int(self.target * sum(self.weights) + 1e-6)
        below = min(math.floor(self.target), len(self.table[0]) - 1)
        above, share = min(below + 1, len(self.table[0]) - 1), self.target - below
        return int(sum((1 - share) * row[below] + share * row[above] for row in self.table) + 1e-6)

    @functools.cached_property
    def target_ratio(self) -> float:
        """The budget in units of what one plane everywhere costs: the target itself for the cost `weights`."""
        return (
            self.target
            if self.counts_weights and self.allowance is None
            else self.allowed / max(sum(row[1] for row in self.table), 1)
        )

    @functools.cached_property
    def plane_costs(self) -> Tensor:
        """[layers, bits] float64: what plane number b costs a layer that has b planes already."""
        table = torch.tensor(self.table, dtype=torch.float64)
        return table[:, 1:] - table[:, :-1]

    def spent(self, planes: Sequence[int]) -> int:
        """Cost of an allocation, in the first of the budgets."""
        return self.ceilings[0].spent(planes)

    def mean_planes(self, planes: Sequence[float]) -> float:
        """Mean of so many planes per layer over weight elements, whatever the cost."""
        return mean_planes(planes, self.weights)

    def has_choice(self) -> bool:
        """Whether the budget and the rules leave anything to search: room for one plane beyond the fewest allowed."""
        few, most = self.limits.min_planes, self.limits.max_planes
        left = self.left(few)
        return any(
            a < b and self.has_room(layer, few, left) for layer, (a, b) in enumerate(zip(few, most, strict=True))
        )

    def check_feasible(self) -> None:
        """UserError when even the fewest planes allowed cost more than a budget."""
        few = self.limits.min_planes
        for ceiling in self.ceilings:
            if ceiling.spent(few) <= ceiling.allowed:
                continue
            # bytes may have been asked for as a compression, of which less is more
            more = "allow more bytes" if ceiling.unit == BYTES else "raise the target"
            hint = f"{more} or relax layers.keep / layers.min_bits / layers.floor"
            if self.limits.needed:
                kept = f"{len(self.limits.needed)} of {len(self.weights)} layers"
                hint = f"{more}: {kept} keep a plane, because without them all images would score the same"
            if ceiling.unit:
                asked = _said(ceiling.allowed + ceiling.beside, ceiling.unit)
                needed = _said(ceiling.spent(few) + ceiling.beside, ceiling.unit, bare=True)
                what = f"a target of {asked} cannot be met: at the fewest planes it takes about {needed}"
                if ceiling.unit == NANOSECONDS:
                    hint = "raise the target: no narrower kernels are in the table of latencies"
                raise UserError(what, hint=hint)
            least = self.mean_planes(few)
            what = f"target_bits {ceiling.target:g} cannot be met: the layer rules alone need {least:.4g}"
            raise UserError(what, hint=hint)


def _said(amount: int, unit: str, *, bare: bool = False) -> str:
    """``1,000 bytes``, ``12.34 ms``; ``bare`` leaves a unit of whole numbers out."""
    if unit == NANOSECONDS:
        return f"{amount / _MILLION:.4g} ms"
    return f"{amount:,}" if bare else f"{amount:,} {unit}"


def latency_rows(table: Sequence[Sequence[int]], limits: PlaneLimits) -> tuple[tuple[int, ...], ...]:
    """A table of nanoseconds in which a layer that must have a plane costs nothing before it has one, and one that need not have any
    costs as much without: an engine runs it all the same."""
    few = limits.min_planes
    return tuple((0 if least else row[0], *row[1:]) for row, least in zip(table, few, strict=True))


def all_of(budgets: Sequence[Budget]) -> Budget:
    """One budget that keeps all of ``budgets``, which are of the same layers and rules; the tightest comes first.

    Tightest is the one that so many planes in every layer would exhaust first. The target that is said is that of mean planes,
    where one was asked for. Of one budget, itself.
    """
    first = min(budgets, key=lambda budget: budget.target)
    rest = [ceiling for budget in budgets if budget is not first for ceiling in budget.ceilings]
    if not rest:
        return first
    said = next((budget.target for budget in budgets if budget.allowance is None), first.target)
    return replace(first, target=said, also=(*first.also, *rest))


def make_budget(
    layers: Sequence[Layer],
    target: float,
    *,
    bits: int = MOST_PLANES,
    limits: PlaneLimits | None = None,
    cost: Cost = weight_planes,
    macs: Mapping[str, int | None] | None = None,
    input_bits: Mapping[str, int] | None = None,
) -> Budget:
    """The budget of ``layers`` at a target of mean planes.

    ``macs`` and ``input_bits`` are per layer name, for costs that ask for them. UserError for a cost function that does
    not give whole numbers that start at 0 or more and never fall with further planes.
    """
    table = []
    for layer in layers:
        name = layer.name
        facts = LayerFacts(
            name=name,
            shape=tuple(layer.parameter.shape),
            weights=layer.weights,
            macs=(macs or {}).get(name) or 0,
            input_bits=(input_bits or {}).get(name, FLOAT_BITS),
        )
        row: list[Any] = [cost(facts, planes) for planes in range(bits + 1)]
        whole = all(isinstance(value, int) and value >= 0 for value in row)
        if not whole or any(after < before for before, after in itertools.pairwise(row)):
            hint = "give whole numbers ≥ 0 that do not fall with further planes: bytes, nanoseconds, …"
            raise UserError(f"the cost function gave {row} for 0 to {bits} planes", where=name, hint=hint)
        table.append(tuple(row))
    weights = tuple(layer.weights for layer in layers)
    limits = limits or PlaneLimits((1,) * len(weights), (bits,) * len(weights))
    return Budget(target, weights, limits, tuple(table))


def uniform_target(table: Sequence[Sequence[int]], allowance: int) -> float:
    """How many planes in every layer would cost ``allowance``, between whole ones by the share of the way; at most all."""
    totals = [sum(column) for column in zip(*table, strict=True)]
    for planes, (low, high) in enumerate(itertools.pairwise(totals)):
        if allowance < high:
            return planes + max(allowance - low, 0) / max(high - low, 1)
    return float(len(totals) - 1)


class Named(Protocol):
    """A layer, or what is known of one."""

    @property
    def name(self) -> str: ...


def plane_limits(
    layers: Sequence[Named],
    *,
    bits: int,
    floor: int = 1,
    keep: Sequence[str] = (),
    min_bits: Mapping[str, int] | None = None,
    max_bits: Mapping[str, int] | None = None,
    needed: Sequence[str] = (),
    together: Sequence[Sequence[str]] = (),
) -> PlaneLimits:
    """Limits from the recipe's globs: ``keep`` pins a layer at all its planes, ``min_bits``/``max_bits`` bound it.

    Layers named in ``needed`` keep one plane, whatever the floor, unless their ceiling is 0. Those of a group of ``together``
    lose their last plane together, unless a rule keeps one of them or takes it away.
    """
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
    for name in needed:
        fewest[name] = max(fewest[name], min(most[name], 1))
    few, many = tuple(fewest[name] for name in names), tuple(most[name] for name in names)
    groups = [tuple(map(names.index, group)) for group in together]
    free = [group for group in groups if all(few[layer] == 0 < many[layer] for layer in group)]
    return PlaneLimits(few, many, tuple(needed), tuple(free))


def mean_planes(planes: Sequence[float], weights: Sequence[int]) -> float:
    """Σ planes·weights / Σ weights, exact in integers before the one division; 0 for no weights."""
    return sum(p * w for p, w in zip(planes, weights, strict=True)) / max(sum(weights), 1)


def project(
    masks: Tensor,  # bool [layers, bits]: planes that the search ended with
    importance: Tensor,  # [layers, bits] ≥ 0: expected loss increase if that plane vanished
    budget: Budget,
    *,
    spendable: Tensor,  # bool [layers, bits]: planes that what is left may switch on
) -> Tensor:
    """Masks within the budget and the limits, changed as little and as cheaply as possible; bool [layers, bits].

    Greedy by importance per cost. Ties go to the lower plane, then the later layer, so the result is a function of
    its inputs alone. What is left is spent on the best of the ``spendable`` planes that still fit.
    """
    budget.check_feasible()
    few, most = budget.limits.min_planes, budget.limits.max_planes
    chosen = masks.clone().cpu()
    first_cost = budget.plane_costs[:, :1].clamp_min(1)  # of one plane
    value = importance.detach().to("cpu", torch.float64) / first_cost
    layers, bits = chosen.shape
    cells = [(layer, plane) for layer in range(layers) for plane in range(bits)]
    cheapest_first = sorted(cells, key=lambda cell: (float(value[cell]), cell[1], -cell[0]))
    dearest_first = cheapest_first[::-1]
    count = chosen.sum(dim=1).tolist()

    def switch(cell: tuple[int, int], on: bool) -> None:
        chosen[cell] = on
        count[cell[0]] += 1 if on else -1

    for cell in cheapest_first:  # ceilings of single layers
        if chosen[cell] and count[cell[0]] > most[cell[0]]:
            switch(cell, False)
    for cell in dearest_first:  # floors of single layers
        if not chosen[cell] and count[cell[0]] < few[cell[0]]:
            switch(cell, True)
    for cell in cheapest_first:
        if budget.fits(count):
            break
        if chosen[cell] and count[cell[0]] > few[cell[0]]:
            switch(cell, False)
    for layer in itertools.chain(*_parts(count, budget)):  # a part of a group is of no use
        for plane in range(bits):
            if chosen[layer, plane]:
                switch((layer, plane), False)
    alone = {layer for group in budget.limits.together for layer in group if not count[layer]}
    for cell in dearest_first:
        if not spendable[cell] or cell[0] in alone:
            continue
        free = not chosen[cell] and count[cell[0]] < most[cell[0]]
        if free and budget.has_room(cell[0], count, budget.left(count)):
            switch(cell, True)
    return chosen.to(masks.device)


def allocate(importance: Tensor, budget: Budget) -> list[int]:
    """Planes per layer that keep the most importance within the budget: an exact multiple-choice knapsack.

    ``importance`` [layers, bits] is what each further plane of a layer saves, planes taken in order. The budget is
    divided into at most 50,000 cells and costs are rounded up, so the result is never over it; what rounding
    left unused is then given to the planes that save most per cost. Several budgets are shared out by `program`.
    Of layers that are of use only together (`limits.together`) it may leave a part. Of such a group, the one that saves least per
    cost, all planes go or all its layers get one, whichever keeps more, and the budget is shared out again.
    """
    importance = shared_within(importance, budget)
    planes = _allocate(importance, budget)
    while parts := _parts(planes, budget):
        first_costs = budget.plane_costs[:, 0].clamp_min(1)
        least = min(parts, key=lambda group: float(importance[group[0], 0]) / float(first_costs[group[0]]))
        without, whole = _without(budget, least), _whole(budget, least)
        ways = [(way, _allocate(importance, way)) for way in (without, whole) if way.fits(way.limits.min_planes)]
        budget, planes = max(ways, key=lambda way: _kept(way[1], importance, way[0]))
    return planes


def _without(budget: Budget, group: Sequence[int]) -> Budget:
    most = tuple(0 if layer in group else high for layer, high in enumerate(budget.limits.max_planes))
    return replace(budget, limits=replace(budget.limits, max_planes=most))


def _whole(budget: Budget, group: Sequence[int]) -> Budget:
    few = tuple(max(low, int(layer in group)) for layer, low in enumerate(budget.limits.min_planes))
    return replace(budget, limits=replace(budget.limits, min_planes=few))


def _parts(planes: Sequence[int], budget: Budget) -> list[tuple[int, ...]]:
    """Groups of which some layers have planes and others none."""
    return [group for group in budget.limits.together if len({planes[layer] > 0 for layer in group}) == 2]


def _kept(planes: Sequence[int], importance: Tensor, budget: Budget) -> float:
    """The importance that planes keep; those of a part of a group keep none."""
    idle = {layer for group in _parts(planes, budget) for layer in group}
    return sum(float(importance[layer, :k].sum()) for layer, k in enumerate(planes) if layer not in idle)


def shared_within(importance: Tensor, budget: Budget) -> Tensor:
    """Importance [layers, bits] with the first planes of layers that are of use only together at what they save together per cost."""
    shared = importance.clone()
    for group in map(list, budget.limits.together):
        costs = budget.plane_costs[group, 0].clamp_min(1).to(importance)
        shared[group, 0] = importance[group, 0].sum() / costs.sum() * costs
    return shared


def _allocate(importance: Tensor, budget: Budget) -> list[int]:
    budget.check_feasible()
    if budget.also:
        value = importance.detach().to("cpu", torch.float64).cumsum(dim=1).numpy()
        planes = best_within(value, budget.limits.min_planes, budget.limits.max_planes, budget.ceilings)
        return _spend(planes, importance, budget)
    few_of, most_of = budget.limits.min_planes, budget.limits.max_planes
    value = importance.detach().to("cpu", torch.float64).cumsum(dim=1).numpy()
    cell = max(1, -(-budget.allowed // _CELLS))
    cells = (budget.allowed - budget.spent(few_of)) // cell

    def cells_of(layer: int, extra: int) -> int:
        few = few_of[layer]
        return -(-(budget.table[layer][few + extra] - budget.table[layer][few]) // cell)

    best = numpy.zeros(cells + 1)  # most importance within c cells, layers so far
    choices = numpy.zeros((len(few_of), cells + 1), dtype=numpy.int8)  # planes beyond the fewest that reach it
    for layer, (few, most) in enumerate(zip(few_of, most_of, strict=True)):
        base = value[layer, few - 1] if few else 0.0
        reached = best.copy()
        for extra in range(1, most - few + 1):
            cost = cells_of(layer, extra)
            if cost > cells:
                break
            gained = best[: cells + 1 - cost] + (value[layer, few + extra - 1] - base)
            better = gained > reached[cost:]
            reached[cost:][better] = gained[better]
            choices[layer, cost:][better] = extra
        best = reached
    planes, left = list(few_of), cells
    for layer in reversed(range(len(planes))):
        extra = int(choices[layer, left])
        planes[layer] += extra
        left -= cells_of(layer, extra)
    return _spend(planes, importance, budget)


def _spend(planes: list[int], importance: Tensor, budget: Budget) -> list[int]:
    """Give what is left of the budget to the planes that save most per cost and still fit."""

    def cost_of_next(layer: int) -> int:
        return budget.table[layer][planes[layer] + 1] - budget.table[layer][planes[layer]]

    while True:
        left = budget.left(planes)
        growable = [layer for layer, most in enumerate(budget.limits.max_planes) if planes[layer] < most]
        fitting = [layer for layer in growable if budget.has_room(layer, planes, left)]
        if not fitting:
            return planes
        gain = {layer: float(importance[layer, planes[layer]]) / max(cost_of_next(layer), 1) for layer in fitting}
        planes[max(fitting, key=lambda layer: (gain[layer], -layer))] += 1
