"""Levels that are sums of ± basis values: what LQ-Nets learns, and what no integer times a scale can be.

A basis of k values v_0 … v_(k−1) has the 2^k levels Σ_j b_j·v_j with b_j ∈ {−1, 1} (Zhang et al. 2018, Eq. 3). A weight's
digits are kept as the odd integer Q = Σ_j b_j·2^j, so b_j = 1 where bit j of (Q + 2^k − 1)/2 is set. Level values are
float32 sums from j = 0 upwards, rounded at each term, so that every reader gets the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TABLE = 2**22  # levels in a table at a time


def digits(planes: int, *, like: Tensor) -> Tensor:
    """[2^k, k], ±1: the digits b_j of each level, in the order of Q = −(2^k − 1), …, −1, 1, …, 2^k − 1."""
    numbers = torch.arange(2**planes, device=like.device)[:, None]
    return ((numbers >> torch.arange(planes, device=like.device)) & 1).to(like.dtype) * 2 - 1


def level_values(basis: Tensor) -> Tensor:
    """[2^k, channels or 1]: the values of a basis [k, channels or 1], in the order of :func:`digits`."""
    codes = digits(len(basis), like=basis)
    total = codes[:, :1] * basis[0]
    for plane in range(1, len(basis)):  # one rounding per term, in this order
        total = total + codes[:, plane : plane + 1] * basis[plane]
    return total


def values_of(integers: Tensor, basis: Tensor, channel_dim: int) -> Tensor:
    """The weights that odd ``integers`` (the weight's shape) stand for, in the basis' type."""
    numbers = (_rows(integers, channel_dim).long() + 2 ** len(basis) - 1) // 2
    total = torch.zeros((), dtype=basis.dtype, device=basis.device)
    for plane, value in enumerate(basis):  # as `level_values`, without a table that few weights would use
        signed = torch.where((numbers >> plane) & 1 != 0, value[:, None], -value[:, None])
        total = signed if plane == 0 else total + signed
    return _unrows(total, integers, channel_dim)


def nearest(weight: Tensor, basis: Tensor, channel_dim: int) -> Tensor:
    """The odd integers (int32, the weight's shape) of the levels nearest to ``weight``; ties go to the lower level.

    Of several integers with one level, the least is taken, so that a weight on a level has one integer.
    """
    rows = _rows(weight, channel_dim)
    bases = basis.expand(-1, len(rows))
    at_a_time = max(1, _TABLE >> len(basis))
    parts = zip(rows.split(at_a_time), bases.split(at_a_time, dim=1), strict=True)
    numbers = torch.cat([_nearest_numbers(part, own) for part, own in parts])
    return _unrows((2 * numbers - (2 ** len(basis) - 1)).to(torch.int32), weight, channel_dim)


def are_finite(basis: Tensor) -> bool:
    """Whether all levels are: the largest is the sum of all magnitudes, in whose order rounding is monotone."""
    total = basis[0].abs()
    for value in basis[1:]:
        total = total + value.abs()
    return bool(total.isfinite().all())


def _nearest_numbers(rows: Tensor, basis: Tensor) -> Tensor:
    """[channels, weights]: numbers of the nearest levels, for a basis [k, channels]."""
    levels, order = level_values(basis).t().sort(dim=1, stable=True)  # [channels, 2^k]
    levels = levels.contiguous()
    middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
    place = torch.searchsorted(middles, rows.to(middles.dtype).contiguous())
    first = torch.searchsorted(levels, levels)  # of equal levels, which come in the order of their integers
    return order.gather(1, first.gather(1, place))


def _rows(values: Tensor, channel_dim: int) -> Tensor:
    """[channels, weights of one]."""
    return values.movedim(channel_dim, 0).flatten(1)


def _unrows(rows: Tensor, like: Tensor, channel_dim: int) -> Tensor:
    shape = like.movedim(channel_dim, 0).shape
    return rows.reshape(shape).movedim(0, channel_dim).contiguous()
