"""A layer as delivered: integers, a scale, and the planes that the integers may use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from csqcli.quant import basis as bases
from csqcli.quant.layers import Layer


@dataclass(frozen=True)
class HardLayer:
    """A layer as delivered: integers × scale is its weight, bit for bit.

    Trailing zero planes are shifted out of the integers and into the scale, which is exact. ``scale`` has shape [1], or
    [channels] along ``channel_dim`` of the weight.

    With a ``basis`` the levels are no multiples of a scale: the integers are the odd ones up to ±(2^k − 1) whose digits ±1
    the basis values are summed with (see :mod:`csqcli.quant.basis`), and ``scale`` is 1 and means nothing.
    """

    name: str
    integers: Tensor  # int32, the weight's shape
    scale: Tensor  # float32, [1] or [channels]
    mask: Tensor  # bool [bits], index 0 the least significant plane
    channel_dim: int = 0
    aliases: tuple[str, ...] = ()
    basis: Tensor | None = None  # float32 [planes, channels or 1]

    @property
    def planes(self) -> int:
        """Planes in use: the paper's precision."""
        return int(self.mask.sum())

    @property
    def stored_bits(self) -> int:
        """Bits per weight of a dense layout: the span of the mask's planes plus a sign, 0 if empty; with a basis a bit per
        plane, whose digits are ±1."""
        if self.basis is not None:
            return self.planes
        on = torch.nonzero(self.mask).flatten()
        return int(on[-1] - on[0]) + 2 if len(on) else 0

    def weight(self) -> Tensor:
        """Hard weight, float32."""
        if self.basis is not None:
            return bases.values_of(self.integers, self.basis, self.channel_dim)
        return self.integers.to(torch.float32) * spread(self.scale, self.integers, self.channel_dim)


def spread(scale: Tensor, like: Tensor, channel_dim: int) -> Tensor:
    """A [1] or [channels] scale, shaped to broadcast over a weight."""
    if scale.numel() == 1:
        return scale.view(1)
    shape = [1] * like.dim()
    shape[channel_dim] = -1
    return scale.view(shape)


def hard_layer(layer: Layer, integers: Tensor, scale: Tensor, mask: Tensor) -> HardLayer:
    """Shift trailing zero planes out of ``integers`` (over 2^0 … 2^(n−1)) and into ``scale`` (the value of integer 1)."""
    on = torch.nonzero(mask).flatten()
    lowest = int(on[0]) if len(on) else 0
    shifted = (integers.abs() >> lowest) * integers.sign()
    value = (scale.detach().float() * 2.0**lowest).reshape(-1).cpu()
    return HardLayer(layer.name, shifted.to(torch.int32).cpu(), value, mask.cpu(), layer.channel_dim, layer.aliases)


def top_planes(planes: int, bits: int) -> Tensor:
    """The mask of ``planes`` contiguous planes at the top of ``bits``: "11100000"."""
    return torch.arange(bits) >= bits - planes
