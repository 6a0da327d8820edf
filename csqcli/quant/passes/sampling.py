"""A few values of a tensor that stand for all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = (math.sqrt(5) - 1) / 2  # the share of the way round that leaves no gaps, whenever one stops


def sample_indices(count: int, most: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Positions of at most ``most`` of ``count`` values, int64, each once: all of them in order where that many are allowed.

    Steps of one size round the tensor, about the golden section of it (an additive recurrence), and without a divisor in common with
    ``count``. Every n-th value would be in step with a dimension: the same column of each feature map, the same tap of each filter.
    """
    if count <= most:
        return torch.arange(count, device=device)
    step = max(1, round(_GOLDEN * count))
    while math.gcd(step, count) != 1:
        step += 1
    return torch.arange(most, device=device).mul_(step).remainder_(count)
