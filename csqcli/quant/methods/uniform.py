"""Quantization-aware training at given planes as it is commonly done: straight-through gradients to a latent weight."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from csqcli.quant.hard_layer import spread
from csqcli.quant.layers import Layer
from csqcli.quant.method_settings import StepSettings
from csqcli.quant.methods.latents import ScaledLatentMethod, channel_means
from csqcli.quant.passes.rounding import quantize, top_integer


class StraightThrough(ScaledLatentMethod):
    """A latent weight per weight, rounded at a fixed scale per layer or channel; gradients pass the rounding unchanged.

    The scale is 2·mean|W|/√(2^k−1). The base optimizer trains the latents; their gradients vanish where a latent
    lies outside ±(2^k−1) scales. 2^(k+1) − 1 levels at k planes.
    """

    name = "ste"
    Settings = StepSettings
    settings: StepSettings
    learned_scale: ClassVar[bool] = False

    def begin(self) -> None:
        self.scales: list[nn.Parameter] = []
        self.least_scales: list[float] = []
        for layer, latent, k in zip(self.layers, self.latents, self.planes, strict=True):
            sizes = latent.detach().abs()
            mean = channel_means(layer, sizes) if self._by_channel(layer) else sizes.mean().reshape(1)
            start = 2 * torch.where(mean > 0, mean, 1e-8) / top_integer(k) ** 0.5
            self.scales.append(nn.Parameter(start, requires_grad=self.learned_scale))
            self.least_scales.append(min(1e-8, float(start.min()) / 1000))

    def _by_channel(self, layer: Layer) -> bool:
        return self.settings.per_channel and layer.allows_channel_scales

    def parameter_groups(self) -> list[dict[str, Any]]:
        scales = [{"params": self.scales, "weight_decay": 0.0}] if self.learned_scale else []
        return [*super().parameter_groups(), *scales]

    def rounded(self, index: int) -> tuple[Tensor, Tensor]:
        return quantize(self.latents[index], self._spread_scale(index), self.planes[index]), self.scales[index]

    def latent_gradient(self, index: int, gradient: Tensor) -> Tensor:
        return gradient * (self._ratio(index).abs() <= top_integer(self.planes[index]))

    def _ratio(self, index: int) -> Tensor:
        return self.latents[index] / self._spread_scale(index)

    def _spread_scale(self, index: int) -> Tensor:
        return spread(self.scales[index], self.latents[index], self.layers[index].channel_dim)

    @torch.no_grad()
    def materialise(self, step: int) -> None:
        for scale, least in zip(self.scales, self.least_scales, strict=True):
            scale.data.clamp_(min=least)
        super().materialise(step)


class LearnedStep(StraightThrough):
    """The same with a scale that learns (Esser et al. 2020, Eq. 3), by the base optimizer and without weight decay."""

    name = "lsq"
    learned_scale = True

    @torch.no_grad()
    def collect(self, step: int, *, lr: float, lr_share: float) -> None:
        super().collect(step, lr=lr, lr_share=lr_share)
        for index, (layer, scale) in enumerate(zip(self.layers, self.scales, strict=True)):
            gradient = layer.parameter.grad
            if gradient is None:
                scale.grad = None
                continue
            top, ratio = top_integer(self.planes[index]), self._ratio(index)
            slope = torch.where(ratio.abs() <= top, ratio.round() - ratio, ratio.sign() * top)
            # Eq. 3 of Esser et al., with its gradient scale 1/√(N·top); N weights share the scale
            share = layer.weights / scale.numel()
            summed = (
                channel_means(layer, gradient * slope) * share if self._by_channel(layer) else (gradient * slope).sum()
            )
            scale.grad = (summed / (share * top) ** 0.5).reshape(-1)
