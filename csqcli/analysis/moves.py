"""One plane less, or one more, for a layer as it was delivered: the weights that it would have then.

A plane is taken by the nearest levels of the planes that are left, at steps fitted to the delivered weights. A plane is given
where no finer weights are known any more (a file holds integers, not what they were rounded from): of the weights that could
move to the levels between those delivered, those do whose move promises most, as many as lower the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csqcli.quant.hard_layer import HardLayer, spread
from csqcli.quant.layers import Layer
from csqcli.quant.measuring import Batches, chunks, evaluating, logits_of, unfrozen
from csqcli.quant.passes.rounding import levels_of, nearest_level

_STARTS = (0.75, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0)  # times the delivered step
_ROUNDS = 8  # of nearest level and least-squares step in turns
_PART = 16  # images whose mean gradient is squared


@dataclass(frozen=True)
class Slopes:
    """First and second derivatives of the mean loss at a layer's weights, of the weight's shape."""

    gradient: Tensor
    curvature: Tensor  # diagonal of the Fisher information


def slopes(model: nn.Module, layers: Sequence[Layer], batches: Batches, *, part: int = _PART) -> list[Slopes]:
    """Gradient and diagonal Fisher of the mean cross entropy over all images, in eval mode.

    The Fisher is an image's squared gradient: estimated from parts of n images as n times the mean square of their mean
    gradients, which is exact for ``part`` 1 and in expectation where the whole gradient vanishes.
    """
    sums = [torch.zeros_like(layer.parameter) for layer in layers]
    squares = [torch.zeros_like(layer.parameter) for layer in layers]
    images = 0
    with evaluating(model), unfrozen(layers) as weights, torch.enable_grad():
        for pixels, labels in chunks(batches, part):
            loss = F.cross_entropy(logits_of(model(pixels)), labels, reduction="sum")
            for total, square, gradient in zip(
                sums, squares, torch.autograd.grad(loss, weights, allow_unused=True), strict=True
            ):
                if gradient is not None:
                    total.add_(gradient)
                    square.add_(
                        gradient.square()
                    )  # of the sum over n images: n² times the mean's, and n of them are counted below
            images += len(labels)
    scale = 1 / max(images, 1)
    return [Slopes(total * scale, square * scale) for total, square in zip(sums, squares, strict=True)]


@dataclass(frozen=True)
class Taken:
    """A layer with one plane less."""

    plane: int  # which one is missing, 0 the least significant of those in use
    weight: Tensor  # float32, the weight's shape
    cost: float  # ½ Σ_i F_i (W − W')²: the rise of the loss by its second-order expansion


def take_plane(hard: HardLayer, curvature: Tensor) -> Taken | None:
    """The layer without the plane whose absence costs least under ``curvature``; None for a layer without planes."""
    on = torch.nonzero(hard.mask).flatten()
    weight = hard.weight()
    best: Taken | None = None
    for number, plane in enumerate(on.tolist()):
        mask = hard.mask.clone()
        mask[plane] = False
        levels = levels_of(mask) / 2.0 ** int(on[0])  # integers were shifted down to the lowest plane in use
        moved = _nearest(weight, hard, levels)
        cost = 0.5 * float((curvature.cpu() * (weight - moved).square()).double().sum())
        if best is None or cost < best.cost:
            best = Taken(number, moved, cost)
    return best


def give_plane(hard: HardLayer, found: Slopes, share: float) -> Tensor:
    """The layer with a plane below its lowest: float32, the weight's shape.

    ``share`` of the weights, at least one, move by half a step against their gradient: those that promise most,
    |g|·Δ − ½F·Δ². The others stay on the levels that they have.
    """
    half = spread(hard.scale, hard.integers, hard.channel_dim).abs() / 2
    gradient, curvature = found.gradient.cpu(), found.curvature.cpu()
    promise = (gradient.abs() * half - 0.5 * curvature * half.square()).flatten()
    most = promise.topk(max(1, round(share * promise.numel())))
    moves = torch.zeros_like(promise)
    moves[most.indices] = (most.values > 0).to(moves.dtype)
    return hard.weight() - half * gradient.sign() * moves.view(gradient.shape)


def _nearest(weight: Tensor, hard: HardLayer, levels: Tensor) -> Tensor:
    """The weight on these levels, at the step of each channel (or of the layer) that leaves the least squared error."""
    per_channel = hard.scale.numel() > 1
    rows = weight.movedim(hard.channel_dim, 0).flatten(1) if per_channel else weight.reshape(1, -1)
    if len(levels) == 1:
        return torch.zeros_like(weight)
    best, least = torch.zeros_like(rows), rows.double().square().sum(dim=1)
    for start in _STARTS:
        step = hard.scale.abs().reshape(-1, 1) * start
        for _ in range(_ROUNDS):
            integers = nearest_level(rows / step.clamp_min(torch.finfo(step.dtype).tiny), levels)
            square = integers.square().sum(dim=1, keepdim=True)
            fitted = (rows * integers).sum(dim=1, keepdim=True) / square.clamp_min(1)
            moved = torch.where(square > 0, fitted, step)
            if torch.equal(moved, step):
                break
            step = moved
        candidate = integers * step
        error = (rows - candidate).double().square().sum(dim=1)
        better = error < least
        best, least = torch.where(better.unsqueeze(1), candidate, best), torch.where(better, error, least)
    if not per_channel:
        return best.view(weight.shape)
    shape = weight.movedim(hard.channel_dim, 0).shape
    return best.view(shape).movedim(0, hard.channel_dim).contiguous()
