"""From a soft model to a hard one: which planes each layer keeps, and the integers and scale nearest to its soft weight.

Unit steps alone (the paper's hardening) change a layer whenever a gate is undecided: a last plane at f(m_B) = 0.48 either
vanishes or comes back at twice its weight. Here the scale is free: for the planes that a layer keeps, integers and step
are those whose product is nearest to the soft weight that was trained. Planes are chosen by what is lost that way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import gt

import torch
from torch import Tensor

from csqcli.quant.budget import Budget, allocate
from csqcli.quant.passes.rounding import levels_of, nearest_level
from csqcli.quant.passes.sampling import sample_indices

UNSEEN = 0.05  # a plane whose f(m_B) is below this adds nothing to the soft weight, and is not switched on
_SAMPLE, _LARGE_SAMPLE = 2**12, 2**16  # weights that starting points, and numbers of planes, are compared on
_FRACTIONS = (0.1, 1.0, 49)  # of the largest magnitude, as the weight of the largest level: from, to, how many
_FEW_ROUNDS, _MOST_ROUNDS = 5, 50  # of the alternation: for starts that are compared, and for the best of them


@dataclass(frozen=True)
class Fit:
    """Integers on the levels of a mask, the step that makes them nearest to a weight, and what is left."""

    integers: Tensor  # float, [weights]
    step: Tensor  # [], > 0: the value of integer 1
    error: Tensor  # []: Σ_i (W_i − step·integer_i)²


def fit_levels(weight: Tensor, mask: Tensor, *, starts: Sequence[float] = ()) -> Fit:
    """argmin over integers q formed by the planes of ``mask`` (bool [bits]) and step t of Σ_i (W_i − t·q_i)².

    Alternates the nearest level for the step with the least-squares step t = ⟨W, q⟩/⟨q, q⟩ for the levels, until nothing
    moves: each half lowers the error or keeps it. Starts that are compared on a sample of the weights: ``starts`` and
    fractions of the largest magnitude. A weight that is all zero, or a mask without planes, gives zeros at step 1.
    """
    levels = levels_of(mask).to(weight.device)
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if len(levels) == 1 or largest == 0:
        return Fit(torch.zeros_like(weight), weight.new_ones(()), weight.double().square().sum())
    scaled = weight / largest  # squares of tiny and of huge weights would vanish or overflow
    sample = scaled[sample_indices(len(scaled), _SAMPLE, device=scaled.device)]
    steps = [start / largest for start in starts if 0 < start / largest < float("inf")]
    steps += [part / float(levels[-1]) for part in torch.linspace(*_FRACTIONS).tolist()]
    tried = torch.tensor(steps, dtype=torch.float64, device=weight.device)
    _, tried, errors = _alternate(sample, levels, tried, rounds=_FEW_ROUNDS)
    integers, step, error = _alternate(scaled, levels, tried[errors.argmin()].reshape(1), rounds=_MOST_ROUNDS)
    return Fit(integers[0], (step[0] * largest).to(weight.dtype), error[0] * largest**2)


def _alternate(weight: Tensor, levels: Tensor, steps: Tensor, *, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest levels and least-squares steps in turns, from each of ``steps`` (float64 [starts]), until nothing moves.

    Integers [starts, weights], steps and squared errors [starts]; the latter two in float64.
    """
    exact = weight.double()
    spacing = levels[1] - levels[0]
    even = bool((levels.diff() == spacing).all())

    def nearest(steps: Tensor) -> Tensor:
        ratio = (exact / steps.unsqueeze(1)).to(weight.dtype)
        if even:
            return ratio.div_(spacing).round_().mul_(spacing).clamp_(levels[0], levels[-1])
        return nearest_level(ratio, levels)

    integers = nearest(steps)
    for _ in range(rounds):
        wide = integers.double()
        square = wide.square().sum(dim=1)
        # a start that is too coarse for any weight to leave zero stays where it is
        steps = torch.where(square > 0, (wide @ exact) / square.clamp_min(1), steps)
        moved = nearest(steps)
        if torch.equal(moved, integers):
            break
        integers = moved
    errors = (exact - steps.unsqueeze(1) * integers.double()).square().sum(dim=1)
    return integers, steps, errors


def plane_order(energy: Tensor) -> Tensor:
    """Planes of a layer from the most to the least valuable, by energy [bits]; ties go to the higher plane. [bits], int64."""
    return energy.flip(0).argsort(descending=True, stable=True).mul(-1).add(len(energy) - 1)


def choose_planes(
    soft_weights: Sequence[Tensor],  # [weights] per layer: the model that is trained
    soft_masks: Tensor,  # [layers, bits]: f_β(m_B)
    energy: Tensor,  # [layers, bits]: squared share of each plane in the soft weight, f(m_B)² included
    curvature: Tensor,  # [layers]: mean squared gradient of a weight, what an error there costs
    budget: Budget,
) -> Tensor:
    """bool [layers, bits]: the planes whose best integers lose least, within the budget.

    A layer gives up its planes in the order of their energy. What k planes lose is measured, by fitting them
    (:func:`fit_levels`); an exact knapsack over all layers then shares the budget out. Planes with f(m_B) near 0 stay off,
    unless a layer's floor asks for one.
    """
    device, energy, soft_masks = energy.device, energy.cpu(), soft_masks.cpu()  # the choice is made on the host
    layers, bits = energy.shape
    orders = [plane_order(row) for row in energy]
    seen = (soft_masks >= UNSEEN).sum(dim=1).tolist()
    limits = budget.limits
    most = tuple(
        max(few, min(many, n)) for few, many, n in zip(limits.min_planes, limits.max_planes, seen, strict=True)
    )
    errors = torch.zeros(layers, bits + 1, dtype=torch.float64)
    for index, weight in enumerate(soft_weights):
        sample = weight[sample_indices(len(weight), _LARGE_SAMPLE, device=weight.device)]
        for count in range(most[index] + 1):
            error = fit_levels(sample, first_planes(orders[index], count)).error.cpu()
            errors[index, count:] = error * (len(weight) / len(sample))
    counts = allocate_by_error(errors, curvature, replace(budget, limits=replace(limits, max_planes=most)))
    return torch.stack([first_planes(order, count) for order, count in zip(orders, counts, strict=True)]).to(device)


def allocate_by_error(errors: Tensor, curvature: Tensor, budget: Budget) -> list[int]:
    """Planes of every layer within the budget that lose least, from the squared error at 0 … n planes [layers, n + 1] and
    what an error in a layer costs [layers]."""
    errors = torch.cummin(errors, dim=1).values
    saved = (errors[:, :-1] - errors[:, 1:]) * curvature.double().cpu().unsqueeze(1)
    return allocate(saved, budget)


def reduce_to_budget(
    planes: Sequence[int],  # of every layer
    fisher: Tensor,  # [layers]: running mean of the squared gradient of a weight
    budget: Budget,
    *,
    errors: Callable[[int], Tensor],  # of a layer at 0 … n planes, squared, [n + 1]; not asked where all may stay
) -> dict[int, int]:
    """The layers that give up planes so that all are within every budget and the limits, each with the planes that it keeps:
    what loses least, by a knapsack. Empty where they are within them as they are."""
    limits = budget.limits
    if budget.fits(planes) and not any(map(gt, planes, limits.max_planes)):
        return {}
    rows = zip(limits.min_planes, planes, limits.max_planes, strict=True)
    most = tuple(max(few, min(k, many)) for few, k, many in rows)
    within = replace(budget, limits=replace(limits, max_planes=most))
    table = torch.stack([errors(index) for index in range(len(planes))])
    kept = allocate_by_error(table, known_curvature(fisher), within)
    return {index: k for index, (k, before) in enumerate(zip(kept, planes, strict=True)) if k < before}


def known_curvature(fisher: Tensor) -> Tensor:
    """[layers]: running means of squared gradients as what an error in a layer costs; ones before the first gradient."""
    return torch.where((fisher > 0).any(), fisher, torch.ones_like(fisher))


def first_planes(order: Tensor, count: int) -> Tensor:
    """bool [bits]: the first ``count`` planes of an order."""
    mask = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    mask[order[:count]] = True
    return mask
