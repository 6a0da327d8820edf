"""From latents to weights: rounding at given planes, soft or hard, and the step sizes to round with.

Latents come as [outer, channels, inner] (`Layer.by_channel`) in units of their layer; units and steps are vectors
[channels, 1], or [1, 1] for one per layer. Each function is one pass over the layer: in parts that stay in cache on a CPU,
one Triton kernel on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from csqcli.quant.passes.sampling import sample_indices
from csqcli.quant.passes.state import kernels_for, of_channels, parts_of

_SAMPLE = 2048  # weights of a row that the grid of steps is tried on
_TAIL = 16  # and its largest magnitudes beside them
_TRIES = 6  # steps of the grid that are then tried on the whole row
_FEW_PLANES = 4  # of which a step far below the largest magnitude may be the best, which leaves outliers at the edge
_REFITS = 3
_CHUNK = 2**17  # weights that `mse_step` passes over at a time on a CPU: half a MiB
_UNSEEN = 1e-4  # a plane whose soft mask is below this is left out


def top_integer(planes: int) -> int:
    """2^k − 1: the largest integer of k planes."""
    return 2**planes - 1


def quantize(latent: Tensor, step: Tensor, planes: int) -> Tensor:
    """Integers (as float) nearest to latent/step within ±(2^k−1); ``step`` broadcasts over the weight."""
    top = top_integer(planes)
    return torch.round(latent / step).clamp_(-top, top)


def mse_step(weight: Tensor, planes: int, *, channel_dim: int | None) -> Tensor:
    """The step that minimises the squared rounding error of ±(2^k−1), [1] or [channels] along ``channel_dim``.

    A grid over fractions of the largest magnitude, then alternating refits (integers for the step, least-squares step
    for the integers). All-zero channels get a step of 0.1, where every integer is zero.
    """
    rows = weight.detach().reshape(1, -1) if channel_dim is None else weight.detach().movedim(channel_dim, 0).flatten(1)
    at_a_time = max(1, _CHUNK // rows.shape[1]) if rows.device.type == "cpu" else len(rows)
    return torch.cat([_row_steps(part, planes) for part in rows.split(at_a_time)])


def _row_steps(rows: Tensor, planes: int) -> Tensor:
    """`mse_step` of few enough rows ([channels, weights]) that the many passes over them stay in cache."""
    top = top_integer(planes)
    largest = rows.abs().amax(dim=1, keepdim=True)
    is_zero = largest == 0
    largest = torch.where(is_zero, torch.ones_like(largest) * top, largest)
    unit = power_of_two(largest)  # exact, and squares of the weights neither vanish nor overflow
    rows, largest = rows / unit, largest / unit
    best = _best_of_grid(rows, largest, planes)
    for _ in range(_REFITS):
        integers = quantize(rows, best, planes)
        square = integers.square().sum(dim=1, keepdim=True)
        fitted = (rows * integers).sum(dim=1, keepdim=True) / square.clamp_min(1e-12)
        best = torch.where(square > 0, fitted, best)
    return torch.where(is_zero, 0.1, (best * unit).clamp_min(torch.finfo(best.dtype).tiny)).flatten()


def _best_of_grid(rows: Tensor, largest: Tensor, planes: int) -> Tensor:
    """[channels, 1]: the fraction of the largest magnitude per level with the least squared error.

    Of long rows the largest magnitudes, which decide where to clip, and a sample that stands for all others say which few
    fractions to try on the whole row.
    """
    top, length = top_integer(planes), rows.shape[1]
    fractions = torch.linspace(0.1, 1.0, 24).tolist()
    if length > _SAMPLE:
        fractions += torch.logspace(-2, -0.4, 17).tolist()
    elif planes <= _FEW_PLANES:
        fractions += torch.logspace(-2, -1.1, 8).tolist()
    spread = sample_indices(length, _SAMPLE, device=rows.device)
    sample = rows[:, spread]
    tail, each = None, torch.ones_like(largest)
    if length > _SAMPLE:
        places = rows.abs().topk(_TAIL, dim=1).indices
        tail, others = rows.gather(1, places), torch.ones_like(rows, dtype=torch.bool).scatter_(1, places, False)
        others = others[:, spread]
        sample, each = sample * others, (length - _TAIL) / others.sum(dim=1, keepdim=True).clamp_min(1)
    steps = torch.cat([largest * (fraction / top) for fraction in fractions], dim=1)  # [channels, fractions]
    errors = []
    for step in steps.split(1, dim=1):
        error = _squared_error(sample, step, top)
        errors.append(error if tail is None else error * each + _squared_error(tail, step, top))
    if tail is None:
        return steps.gather(1, torch.cat(errors, dim=1).argmin(dim=1, keepdim=True))
    tries = steps.gather(1, torch.cat(errors, dim=1).topk(_TRIES, dim=1, largest=False).indices)
    found = [_squared_error(rows, tries[:, at : at + 1], top) for at in range(_TRIES)]
    return tries.gather(1, torch.cat(found, dim=1).argmin(dim=1, keepdim=True))


def _squared_error(rows: Tensor, step: Tensor, top: int) -> Tensor:
    """[channels, 1]: the summed squared error of rounding each row at its step."""
    return (rows / step).round_().clamp_(-top, top).mul_(step).sub_(rows).square_().sum(dim=1, keepdim=True)


def power_of_two(values: Tensor) -> Tensor:
    """The power of two below each positive value, within what divides without loss."""
    exponent = (torch.frexp(values).exponent - 1).clamp(-125, 125)
    return torch.ldexp(torch.ones_like(values), exponent)


def levels_of(mask: Tensor) -> Tensor:
    """Every integer that digits in {−1, 0, 1} on the planes of a bool mask [bits] can form, ascending (float)."""
    levels = torch.zeros(1, device=mask.device)
    for plane in torch.nonzero(mask).flatten().tolist():
        levels = torch.cat([levels - 2.0**plane, levels, levels + 2.0**plane]).unique()
    return levels


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """The nearest entry of ascending ``levels`` for each value; ties go to the lower one."""
    middles = (levels[1:] + levels[:-1]) / 2
    return levels[torch.bucketize(values, middles)]


def proximal_map(ratio: Tensor, top: int, flank: float) -> Tensor:
    """``ratio``, in place, on a staircase between the integers up to ±top whose flanks, half way between two, are of slope 1/flank.

    The proximal map of PARQ's regulariser (Jin et al., ICML 2025): the identity within ±top at a flank of 1, rounding towards 0.
    """
    low = ratio.floor().clamp_(-top, top - 1)
    return ratio.sub_(low).sub_(0.5).div_(flank).add_(0.5).clamp_(0, 1).add_(low)


@dataclass(frozen=True)
class Staircase:
    """The levels of one layer at its fixed planes, and where they lie among its latents."""

    scale: Tensor  # the weight of integer 1
    width: Tensor  # the same in units of the latents
    levels: Tensor  # [levels], float, on the CPU: the integers that the planes form, ascending

    @functools.cached_property
    def top(self) -> int:
        """The largest integer."""
        return int(self.levels[-1])

    @functools.cached_property
    def edge(self) -> Tensor:
        """The largest latent that stands for a level."""
        return self.width * self.top

    @property
    def without_holes(self) -> bool:
        """Whether the levels are all integers between their ends, so that rounding finds the nearest."""
        return len(self.levels) == 2 * self.top + 1

    def integers(self, latent: Tensor) -> Tensor:
        """The nearest level of every latent, as float."""
        return self._nearest(latent / self.width)

    def write(self, latent: Tensor, out: Tensor, *, sharpness: float | None) -> None:
        """The layer's weights into ``out`` (the latents' shape): on the soft staircase, or hard where ``sharpness`` is None.

        A soft staircase has linear flanks of slope 1/(1 − sharpness) half way between neighbouring levels: the identity
        at 0, rounding towards 1.
        """
        flank = None if sharpness is None else max(1 - sharpness, 1e-3)  # its share of the way between two levels
        kernels = kernels_for(latent.device) if self.without_holes else None
        if kernels is not None:
            kernels.staircase(latent, out, self.scale, self.width, top=self.top, flank=flank)
            return
        for part in parts_of(latent):
            ratio = latent[part] / of_channels(self.width, part[1])
            integers = self._nearest(ratio) if flank is None else self._soft(ratio, flank)
            torch.mul(integers, of_channels(self.scale, part[1]), out=out[part])

    def _nearest(self, ratio: Tensor) -> Tensor:
        if self.without_holes:
            return ratio.round_().clamp_(-self.top, self.top)
        return nearest_level(ratio, self.levels.to(ratio))

    def _soft(self, ratio: Tensor, flank: float) -> Tensor:
        if len(self.levels) == 1:
            return ratio.zero_()
        if self.without_holes:
            return proximal_map(ratio, self.top, flank)
        levels = self.levels.to(ratio)
        upper = torch.bucketize(ratio, levels, right=True).clamp_(1, len(levels) - 1)
        low, high = levels[upper - 1], levels[upper]
        share = (ratio - low) / (high - low)
        return low + (0.5 + (share - 0.5) / flank).clamp_(0, 1) * (high - low)


def plane_shares(soft_mask: Tensor) -> Tensor:
    """f_{k−1} − f_k for k = 1 … n planes from soft masks [layers, bits], which fall with the plane; f_n = 0."""
    masks = soft_mask.where(soft_mask >= _UNSEEN, 0)
    return masks - torch.cat([masks[:, 1:], torch.zeros_like(masks[:, :1])], dim=1)


def soft_planes(latent: Tensor, out: Tensor, *, unit: Tensor, steps: Tensor, shares: Tensor) -> None:
    """W = Σ_b f_b (Q_{b+1} − Q_b) of one layer into ``out``, where Q_k rounds to k planes at its own step.

    ``steps``: [bits, channels or 1, 1], 1 plane first. ``shares``: [bits], of :func:`plane_shares`: written as
    Σ_k (f_{k−1} − f_k) Q_k, planes of equal masks cost nothing and all planes in use give Q_n exactly.
    """
    kernels = kernels_for(latent.device)
    if kernels is not None:
        kernels.soft_planes(latent, out, unit, steps, shares)
        return
    used = [(k, step, share) for k, (step, share) in enumerate(zip(steps, shares.tolist(), strict=True), 1) if share]
    for part in parts_of(latent):
        value = latent[part] * of_channels(unit, part[1])
        weight = torch.zeros_like(value)
        for k, step, share in used:
            wide = of_channels(step, part[1])
            weight.add_(quantize(value, wide, k).mul_(wide), alpha=share)
        out[part] = weight


def plane_errors(latent: Tensor, *, unit: Tensor, steps: Tensor, fisher: Tensor) -> Tensor:
    """[bits + 1] float64: Σ_i F_i (V − Q_k(V))² of one layer for k = 0 … n planes, Q_0 = 0, V in units of the latents."""
    errors = torch.zeros(len(steps) + 1, dtype=torch.float64, device=latent.device)
    for part in parts_of(latent):
        unit_here, f = of_channels(unit, part[1]), fisher[part]
        value = latent[part] * unit_here
        errors[0] += (f * latent[part].square()).sum()
        for k, step in enumerate(steps, 1):
            wide = of_channels(step, part[1])
            rounding = latent[part] - quantize(value, wide, k).mul_(wide / unit_here)
            errors[k] += rounding.square_().mul_(f).sum()
    return errors
