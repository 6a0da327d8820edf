"""What most published methods share: one latent weight per weight, levels fitted to it, straight-through gradients.

A method says which integers and scale a latent stands for (:meth:`LatentMethod.rounded`) and what of dL/dW reaches it
(:meth:`LatentMethod.latent_gradient`, all of it unless it says otherwise). The base optimizer trains the latents.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.quant.catalog import Takes
from csqcli.quant.hard_layer import HardLayer, spread, top_planes
from csqcli.quant.layers import Layer
from csqcli.quant.methods.base import Plan, WeightMethod

SMALLEST = torch.finfo(torch.float32).tiny  # of a scale: integers can be read back from weights at any that is larger


class LatentMethod(WeightMethod):
    """A latent per weight, as the base optimizer leaves it; ``plan.planes`` gives k of every layer, at least 1."""

    takes: ClassVar[Takes] = "planes"
    min_planes: ClassVar[int] = 1

    def __init__(self, layers: Sequence[Layer], plan: Plan, settings: Any = None) -> None:
        super().__init__(layers, plan, settings)
        self.planes = self.starting_planes()
        self._check_planes()
        self.latents = [nn.Parameter(layer.parameter.detach().clone()) for layer in layers]
        self.begin()
        self.materialise(0)

    def starting_planes(self) -> list[int]:
        """Planes of every layer at the first step."""
        assert self.plan.planes is not None
        return list(self.plan.planes)

    def begin(self) -> None:
        """Make the state that the method keeps beside the latents, before the weights of step 0 are written."""

    @abstractmethod
    def rounded(self, index: int) -> tuple[Tensor, Tensor]:
        """Integers of a layer (float, the weight's shape) and the value of integer 1, > 0 ([1] or [channels])."""

    def latent_gradient(self, index: int, gradient: Tensor) -> Tensor:
        """From dL/dW of a layer to the gradient of its latent."""
        return gradient

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": self.latents}]

    @torch.no_grad()
    def collect(self, step: int, *, lr: float, lr_share: float) -> None:
        for index, (layer, latent) in enumerate(zip(self.layers, self.latents, strict=True)):
            gradient = layer.parameter.grad
            latent.grad = None if gradient is None else self.latent_gradient(index, gradient)

    @torch.no_grad()
    def materialise(self, step: int) -> None:
        for index, layer in enumerate(self.layers):
            integers, scale = self.rounded(index)
            layer.parameter.data.copy_(integers * spread(scale, integers, layer.channel_dim))

    def harden(self, step: int) -> None:
        """Every forward pass has been hard all along."""

    @torch.no_grad()
    def hard_layers(self) -> list[HardLayer]:
        bits = max(self.planes)
        return [
            HardLayer(
                layer.name,
                integers.to(torch.int32).cpu(),
                scale.detach().float().reshape(-1).cpu(),
                top_planes(k, bits),
                layer.channel_dim,
                layer.aliases,
            )
            for (integers, scale), layer, k in zip(self._all_rounded(), self.layers, self.planes, strict=True)
        ]

    def unrounded(self) -> list[Tensor]:
        return [latent.detach() for latent in self.latents]

    def monitor(self, step: int) -> dict[str, float]:
        return {"mean_bits": self.plan.budget.mean_planes(self.planes), "budget_gap": 0.0}

    def state_dict(self) -> dict[str, Any]:
        return {"latents": [latent.data for latent in self.latents]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for own, saved in zip(self.latents, state["latents"], strict=True):
            own.data.copy_(saved)

    def _all_rounded(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.rounded(index) for index in range(len(self.layers)))

    def _check_planes(self) -> None:
        least, most = self.min_planes, self.max_planes
        for layer, k in zip(self.layers, self.planes, strict=True):
            if not least <= k <= most:
                known = "1 plane" if most == 1 else f"{least} to {most} planes"
                hint = f"--target-bits {most if k > most else least}, and no layers.min_bits or layers.keep beyond"
                raise UserError(f"{self.name} is defined for {known}, not for {k}", where=layer.name, hint=hint)


class ScaledLatentMethod(LatentMethod):
    """With scales beside the latents that are parameters too, [1] or [channels] a layer; ``begin`` makes them."""

    scales: list[nn.Parameter]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"scales": [scale.data for scale in self.scales]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for own, saved in zip(self.scales, state["scales"], strict=True):
            own.data.copy_(saved)


def odd_integers(unit: Tensor, bits: int) -> Tensor:
    """2·round((2^b − 1)·x) − (2^b − 1) for x = (unit + 1)/2: the 2^b even steps over [−1, 1], as odd integers (float).

    They are the levels 2/(2^b − 1) apart of DoReFa's quantize_b, in units of half that step, so b planes hold them.
    """
    top = 2**bits - 1
    return (unit * 0.5 + 0.5).mul_(top).round_().clamp_(0, top).mul_(2).sub_(top)


def channel_means(layer: Layer, values: Tensor) -> Tensor:
    """[channels]: the mean of a tensor of the weight's shape over everything but its output channels."""
    return values.movedim(layer.channel_dim, 0).flatten(1).mean(dim=1)


def signs(values: Tensor) -> Tensor:
    """±1, where zero counts as positive."""
    return torch.where(values < 0, -1.0, 1.0).to(values.dtype)
