"""Planes at random: what an allocator has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from csqcli.quant.layers import Layer
from csqcli.quant.measuring import Batches

_SPREAD = 2.0  # of a layer's weight, in powers of e; a plane more is worth a quarter of the one before


def random_importance(
    model: nn.Module, layers: Sequence[Layer], batches: Batches, bits: int, *, seed: int = 0
) -> Tensor:
    """[layers, bits] float64: n_l·e^(2·z_l)·4^(−b), z_l normal by ``seed``; the batches are not looked at.

    Times the layer's weights n_l, so that small layers are not preferred for being cheap.
    """
    rng = torch.Generator().manual_seed(seed)
    own = torch.randn(len(layers), generator=rng, dtype=torch.float64).mul(_SPREAD).exp()
    counts = torch.tensor([layer.weights for layer in layers], dtype=torch.float64)
    return (own * counts).unsqueeze(1) * 0.25 ** torch.arange(bits, dtype=torch.float64)
