"""Quantization-aware training at given planes as it is commonly done: straight-through gradients to a latent weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from csqcli.quant.hard_layer import HardLayer, top_planes
from csqcli.quant.layers import Layer
from csqcli.quant.methods.base import Plan, WeightMethod
from csqcli.quant.passes.rounding import quantize, top_integer


class StraightThrough(WeightMethod):
    """A latent weight per weight, rounded at a fixed scale per layer; gradients pass the rounding unchanged.

    The scale of a layer is 2·mean|W|/√(2^k−1). The base optimizer trains the latents; their gradients vanish where a latent
    lies outside ±(2^k−1) scales. ``plan.planes`` gives k of every layer, at least 1.
    """

    name = "ste"
    takes = "planes"
    learned_scale: ClassVar[bool] = False

    def __init__(self, layers: Sequence[Layer], plan: Plan, settings: Any = None) -> None:
        super().__init__(layers, plan, settings)
        assert plan.planes is not None
        self.planes = [max(k, 1) for k in plan.planes]
        self.latents = [nn.Parameter(layer.parameter.detach().clone()) for layer in layers]
        self.scales: list[nn.Parameter] = []
        self.least_scales: list[float] = []
        for latent, k in zip(self.latents, self.planes, strict=True):
            mean = latent.detach().abs().mean()
            start = 2 * torch.where(mean > 0, mean, 1e-8) / top_integer(k) ** 0.5
            self.scales.append(nn.Parameter(start.reshape(1), requires_grad=self.learned_scale))
            self.least_scales.append(min(1e-8, float(start) / 1000))
        self.materialise(0)

    def parameter_groups(self) -> list[dict[str, Any]]:
        scales = [{"params": self.scales, "weight_decay": 0.0}] if self.learned_scale else []
        return [{"params": self.latents}, *scales]

    @torch.no_grad()
    def collect(self, step: int, *, lr: float, lr_share: float) -> None:
        for layer, latent, scale, k in self._rows():
            gradient = layer.parameter.grad
            if gradient is None:
                latent.grad = scale.grad = None
                continue
            top = top_integer(k)
            ratio = latent / scale
            inside = ratio.abs() <= top
            latent.grad = gradient * inside
            if self.learned_scale:  # LSQ Eq. 3, with its gradient scale 1/√(N·top)
                slope = torch.where(inside, ratio.round() - ratio, ratio.sign() * top)
                scale.grad = ((gradient * slope).sum() / (latent.numel() * top) ** 0.5).reshape(1)

    @torch.no_grad()
    def materialise(self, step: int) -> None:
        for (layer, latent, scale, k), least in zip(self._rows(), self.least_scales, strict=True):
            scale.data.clamp_(min=least)
            layer.parameter.data.copy_(quantize(latent, scale, k) * scale)

    def harden(self, step: int) -> None:
        """Every forward pass has been hard all along."""

    @torch.no_grad()
    def hard_layers(self) -> list[HardLayer]:
        bits = max(self.planes)
        return [
            HardLayer(
                layer.name,
                quantize(latent, scale, k).to(torch.int32).cpu(),
                scale.detach().float().cpu(),
                top_planes(k, bits),
                layer.channel_dim,
                layer.aliases,
            )
            for layer, latent, scale, k in self._rows()
        ]

    def monitor(self, step: int) -> dict[str, float]:
        return {
            "mean_bits": self.plan.budget.mean_planes(self.planes),
            "budget_gap": 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"latents": [v.data for v in self.latents], "scales": [s.data for s in self.scales]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for own, saved in zip([*self.latents, *self.scales], [*state["latents"], *state["scales"]], strict=True):
            own.data.copy_(saved)

    def _rows(self) -> Iterator[tuple[Layer, nn.Parameter, nn.Parameter, int]]:
        return zip(self.layers, self.latents, self.scales, self.planes, strict=True)


class LearnedStep(StraightThrough):
    """The same with a scale that learns (Esser et al. 2020, Eq. 3), by the base optimizer and without weight decay."""

    name = "lsq"
    learned_scale = True
