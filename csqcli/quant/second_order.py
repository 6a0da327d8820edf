"""Rounding by what a layer's inputs say: the integers and scales that change the layer's outputs least.

A layer that sees inputs X with second moment H = E[x xᵀ] changes its output by E‖(w − ŝq) x‖² = (w − sq) H (w − sq)ᵀ per
output channel. Rounding each weight to the nearest level ignores that errors of correlated inputs add up or cancel; here

1. columns are rounded one after the other, each error spread over those still float (OBQ's update in GPTQ's order:
   Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, ICLR 2023),
2. single integers are then moved to their best level given all others until none moves (cyclic coordinate descent:
   Behdin et al., QuantEase, 2023; Zhang et al., COMQ, 2024), pairs of them where a filter has few weights, and
3. the scale is refitted in closed form between the sweeps.

Every step of 2 and 3 lowers the error or leaves it. All functions are pure and take weights as [groups, rows, columns], H as
[groups, columns, columns] (a group of a grouped convolution has inputs of its own; a dense layer is one group) and scales as
[groups, rows, 1].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csqcli.quant.passes.rounding import quantize, top_integer

_BLOCK = 64  # columns between two matrix products
_EXHAUSTIVE = 9  # weights of a filter up to which all 2^n roundings to a neighbouring level are tried: a depthwise 3x3
_PAIRS = 32  # weights of a filter up to which pairs of integers are moved together
_PAIR_MOVES = 50
_TRIED = 2**22  # numbers that an exhaustive search holds at a time
_DAMPINGS = 4  # that are tried on held-out images, each ten times the one before
_SCALES = (0.7, 0.8, 0.9, 1.0, 1.1)  # starts, as shares of the scale that fits the weights themselves best


@dataclass
class InputMoments:
    """Sums over input columns of one layer."""

    second: Tensor  # Σ x̂ x̂ᵀ, [groups, columns, columns]
    cross: Tensor  # Σ (x − x̂) x̂ᵀ
    mean: Tensor  # Σ x̂, [groups, columns]
    float_mean: Tensor  # Σ x
    count: int = 0

    @classmethod
    def like(cls, columns: Tensor) -> InputMoments:
        groups, size, _ = columns.shape
        square, line = columns.new_zeros(groups, size, size), columns.new_zeros(groups, size)
        return cls(square, square.clone(), line, line.clone())

    def add(self, columns: Tensor, float_columns: Tensor) -> None:
        transposed = columns.mT
        self.second += columns @ transposed
        self.cross += (float_columns - columns) @ transposed
        self.mean += columns.sum(dim=-1)
        self.float_mean += float_columns.sum(dim=-1)
        self.count += columns.shape[-1]

    def __add__(self, other: InputMoments) -> InputMoments:
        return InputMoments(
            self.second + other.second,
            self.cross + other.cross,
            self.mean + other.mean,
            self.float_mean + other.float_mean,
            self.count + other.count,
        )


def output_error(weight: Tensor, moment: Tensor, integers: Tensor, scale: Tensor) -> Tensor:
    """[groups, rows]: (w − sq) H (w − sq)ᵀ."""
    off = integers * scale - weight
    return ((off @ moment) * off).sum(dim=-1)


def fit(weight: Tensor, moment: Tensor, scale: Tensor, *, planes: int, sweeps: int = 4) -> tuple[Tensor, Tensor]:
    """Integers within ±(2^planes − 1), as float, and the scale [groups, rows, 1] that go with them.

    Never worse in :func:`output_error` than the nearest level at the given ``scale`` (> 0), up to float32 rounding, row by row;
    with at most 9 columns never worse than any rounding to one of the two neighbouring levels at it. ``moment`` must be
    positive definite: damp it first (:func:`damped`).
    """
    top = top_integer(planes)
    best = quantize(weight, scale, planes)
    best_scale, least = scale, output_error(weight, moment, best, scale)
    tries = [scale * share for share in _SCALES]
    wide = torch.cat(tries, dim=1)  # all starts at once: rows of one problem
    many = weight.repeat(1, len(tries), 1)
    found = descend(many, moment, wide, spread_errors(many, moment, wide, top), top=top, sweeps=1)
    starts = list(zip(found.chunk(len(tries), dim=1), tries, strict=True))
    if weight.shape[-1] <= _EXHAUSTIVE:
        starts += [(neighbours(weight, moment, scale, top), scale) for scale in tries]
    starts.append((descend(weight, moment, scale, best, top=top, sweeps=1), scale))
    for integers, at in starts:
        best, best_scale, least = _better(weight, moment, (best, best_scale, least), integers, at)
    for _ in range(sweeps):
        at = refitted(weight, moment, best, best_scale)
        integers = descend(weight, moment, at, best, top=top, sweeps=1)
        if weight.shape[-1] <= _PAIRS:
            integers = descend_pairs(weight, moment, at, integers, top=top)
        best, best_scale, least = _better(weight, moment, (best, best_scale, least), integers, at)
    return best, best_scale


def _better(
    weight: Tensor, moment: Tensor, known: tuple[Tensor, Tensor, Tensor], integers: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    best, best_scale, least = known
    error = output_error(weight, moment, integers, scale)
    wins = (error < least).unsqueeze(-1)
    return torch.where(wins, integers, best), torch.where(wins, scale, best_scale), torch.minimum(error, least)


def spread_errors(weight: Tensor, moment: Tensor, scale: Tensor, top: int) -> Tensor:
    """Integers (float) of GPTQ: column by column, each rounding error taken up by the columns that follow.

    Columns go from the largest moment to the smallest. With U the upper Cholesky factor of H⁻¹, rounding column j by e_j
    adds −e_j U_jk / U_jj to column k > j, which is the least-squares answer of the weights still free.
    """
    order = moment.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)  # [groups, columns]
    sorted_moment = moment.gather(1, order.unsqueeze(2).expand_as(moment))
    sorted_moment = sorted_moment.gather(2, order.unsqueeze(1).expand_as(moment))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(sorted_moment.double()))
    factor = torch.linalg.cholesky(inverse, upper=True).to(weight.dtype)
    places = order.unsqueeze(1).expand_as(weight)
    left = weight.gather(2, places)
    integers, columns = torch.empty_like(left), weight.shape[-1]
    step = scale.squeeze(-1)
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        errors = torch.empty_like(left[..., begin:end])
        for j in range(begin, end):
            column = left[..., j]
            rounded = (column / step).round_().clamp_(-top, top)
            integers[..., j] = rounded
            error = (column - rounded * step) / factor[:, j, j, None]
            errors[..., j - begin] = error
            left[..., j:end] -= error.unsqueeze(-1) * factor[:, j, j:end].unsqueeze(1)
        left[..., end:] -= errors @ factor[:, begin:end, end:]
    return torch.empty_like(integers).scatter_(2, places, integers)


def descend(weight: Tensor, moment: Tensor, scale: Tensor, integers: Tensor, *, top: int, sweeps: int) -> Tensor:
    """Cyclic coordinate descent: every integer in turn takes its best level within ±top given all others.

    The error is a parabola in each of them, so the level nearest to its minimum is the best one, and no move raises the error.
    """
    integers, step = integers.clone(), scale.squeeze(-1)
    diagonal = moment.diagonal(dim1=1, dim2=2)  # [groups, columns]
    for _ in range(sweeps):
        before = integers.clone()
        for begin in range(0, weight.shape[-1], _BLOCK):
            end = min(begin + _BLOCK, weight.shape[-1])
            slope = (integers * scale - weight) @ moment[:, :, begin:end]
            inside = moment[:, begin:end, begin:end]
            for j in range(begin, end):
                old = integers[..., j]
                new = (old - slope[..., j - begin] / (diagonal[:, j, None] * step)).round_().clamp_(-top, top)
                slope += ((new - old) * step).unsqueeze(-1) * inside[:, j - begin].unsqueeze(1)
                integers[..., j] = new
        if torch.equal(before, integers):
            break
    return integers


def descend_pairs(weight: Tensor, moment: Tensor, scale: Tensor, integers: Tensor, *, top: int) -> Tensor:
    """The best move of one or two integers by one level each, again and again until no such move lowers the error."""
    integers, groups, columns = integers.clone(), weight.shape[0], weight.shape[-1]
    diagonal = moment.diagonal(dim1=1, dim2=2).unsqueeze(1)  # [groups, 1, columns]
    signs = torch.tensor([-1.0, 1.0], dtype=weight.dtype, device=weight.device)
    own = torch.eye(columns, dtype=torch.bool, device=weight.device)
    for _ in range(_PAIR_MOVES):
        slope = (integers * scale - weight) @ moment
        # [groups, rows, 2, columns]: the change of the error when an integer falls or rises by one
        single = 2 * signs[:, None] * (slope * scale).unsqueeze(2) + (diagonal * scale.square()).unsqueeze(2)
        out = (integers.unsqueeze(2) + signs[:, None]).abs() > top
        single = single.masked_fill(out, float("inf"))
        least, at = single.flatten(2).min(dim=2)
        move = torch.zeros_like(single.flatten(2)).scatter_(2, at.unsqueeze(-1), 1.0)
        for a, b in itertools.product(range(2), repeat=2):
            both = single[:, :, a, :, None] + single[:, :, b, None, :]
            both = both + (2 * signs[a] * signs[b]) * scale.square().unsqueeze(-1) * moment.unsqueeze(1)
            value, where = both.masked_fill(own, float("inf")).flatten(2).min(dim=2)
            first = where.div(columns, rounding_mode="floor") + a * columns
            second = where % columns + b * columns
            pair = torch.zeros_like(move).scatter_(2, torch.stack([first, second], dim=2), 1.0)
            wins = value < least
            move, least = torch.where(wins.unsqueeze(-1), pair, move), torch.minimum(value, least)
        error = output_error(weight, moment, integers, scale)
        gains = least < -1e-6 * error  # what is less is rounding of the numbers themselves
        if not bool(gains.any()):
            break
        change = (move.view(groups, -1, 2, columns) * signs[:, None]).sum(dim=2)
        integers += change * gains.unsqueeze(-1)
    return integers


def neighbours(weight: Tensor, moment: Tensor, scale: Tensor, top: int) -> Tensor:
    """The best of all 2^n roundings to the level below or above, by trying them; for few columns."""
    groups, rows, columns = weight.shape
    combos = torch.tensor(list(itertools.product((0.0, 1.0), repeat=columns)), dtype=weight.dtype, device=weight.device)
    below = (weight / scale).floor()
    at_a_time = max(1, _TRIED // (rows * combos.numel()))
    best = []
    for part in range(0, groups, at_a_time):
        these = slice(part, part + at_a_time)
        levels = (below[these].unsqueeze(2) + combos).clamp_(-top, top)  # [groups, rows, combos, columns]
        off = levels * scale[these].unsqueeze(-1) - weight[these].unsqueeze(2)
        least = ((off @ moment[these].unsqueeze(1)) * off).sum(dim=-1).argmin(dim=-1)
        best.append(levels.gather(2, least[..., None, None].expand(-1, -1, 1, columns)).squeeze(2))
    return torch.cat(best)


def refitted(weight: Tensor, moment: Tensor, integers: Tensor, scale: Tensor) -> Tensor:
    """The scale with the least error for the integers: q H wᵀ / q H qᵀ; the given one where that is not above 0."""
    along = integers @ moment
    square = (along * integers).sum(dim=-1, keepdim=True)
    best = (along * weight).sum(dim=-1, keepdim=True) / square.clamp_min(torch.finfo(weight.dtype).tiny)
    return torch.where((square > 0) & (best > torch.finfo(weight.dtype).tiny), best, scale)


def damped(moment: Tensor, share: float) -> Tensor:
    """H + share · mean(diagonal of H) · I, and 1 on the diagonal where a group has no input at all: positive definite."""
    mean = moment.diagonal(dim1=1, dim2=2).mean(dim=1)
    added = torch.where(mean > 0, share * mean, torch.ones_like(mean))
    return moment + torch.diag_embed(added.unsqueeze(1).expand(-1, moment.shape[-1]))


def for_moved_inputs(weight: Tensor, moment: Tensor, cross: Tensor) -> Tensor:
    """The weight whose outputs on the inputs x̂ as they are now are nearest to the float layer's on the inputs x it had.

    W + W (E[x x̂ᵀ] − E[x̂ x̂ᵀ]) H⁻¹ for a damped H = ``moment``; ``cross`` is the difference in brackets, [groups, columns,
    columns]. Rounding W itself would leave in place what the layers before have changed.
    """
    return weight + _solved(moment, weight @ cross)


def _solved(moment: Tensor, product: Tensor) -> Tensor:
    """``product`` H⁻¹, in float64."""
    factor = torch.linalg.cholesky(moment.double())
    return torch.cholesky_solve(product.double().mT, factor).mT.to(product.dtype)


def held_out_damping(weight: Tensor, halves: Sequence[tuple[Tensor, Tensor]], share: float) -> float | None:
    """The damping for :func:`for_moved_inputs`, among ``share`` and 10, 100 and 1000 times that, with which it does best on images
    that did not decide its weights; None where ``weight`` itself does better there.

    ``halves`` has (moment, cross) over either half of the images, undamped. A weight V that one half decides is held against the
    other: E‖W x − V x̂‖² = Δ H Δᵀ − 2 W C Δᵀ + what no V changes, with Δ = V − W. A layer that sees few inputs for its weights, as a
    classifier that sees one per image, would else follow these very images.
    """
    best, least, before = None, 0.0, float("inf")  # Δ = 0 has 0
    for candidate in (share * 10**power for power in range(_DAMPINGS)):
        error = 0.0
        for (moment, cross), (held_out, held_out_cross) in itertools.permutations(halves):
            change = for_moved_inputs(weight, damped(moment, candidate), cross) - weight
            error += float(((change @ held_out - 2 * weight @ held_out_cross) * change).sum())
        if error > before:
            break  # more damping only follows less
        before = error
        if error < least:
            best, least = candidate, error
    return best


def held_out_rounding(weight: Tensor, halves: Sequence[Tensor], scale: Tensor, *, planes: int, share: float) -> float:
    """The damping, among ``share`` and 10, 100 and 1000 times that, with which :func:`spread_errors` on one half of the images does best
    on the other. ``halves`` has their moments, undamped.

    With fewer inputs than weights in a filter there are directions that no input has, and rounding errors put there cost
    nothing but on other images.
    """
    top, errors = top_integer(planes), dict[float, float]()
    for candidate in (share * 10**power for power in range(_DAMPINGS)):
        errors[candidate] = sum(
            float(
                output_error(
                    weight, held_out, spread_errors(weight, damped(moment, candidate), scale, top), scale
                ).sum()
            )
            for moment, held_out in itertools.permutations(halves)
        )
    return min(errors, key=lambda candidate: errors[candidate])
