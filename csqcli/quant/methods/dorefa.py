"""DoReFa-Net's weights: tanh-normalised, on 2^k even steps.

Zhou, Wu, Ni, Zhou, Wen and Zou, DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth
Gradients, 2016 (arXiv 1606.06160). Its activations are `act_method: dorefa`; gradients are not quantized here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csqcli.quant.method_settings import DoReFaSettings
from csqcli.quant.methods.latents import SMALLEST, LatentMethod, odd_integers, signs


class DoReFa(LatentMethod):
    """k ≥ 2 (Eq. 9): W = s·(2·quantize_k(x) − 1), x = tanh(V)/(2·max|tanh V|) + ½; k = 1 (Eq. 8): W = sign(V)·mean|V|.

    2^k levels at k planes: the odd integers up to ±(2^k − 1), without zero. In the paper s is 1, which networks with
    BatchNorm absorb when they train from scratch; with ``rescale`` it is a constant of each layer that starts the levels
    nearest to the checkpoint's weights.
    """

    name = "dorefa"
    Settings = DoReFaSettings
    settings: DoReFaSettings

    def begin(self) -> None:
        self.scales = [latent.new_ones(1) for latent in self.latents]  # s
        if self.settings.rescale:
            for index, latent in enumerate(self.latents):
                self.fit_scale(index, latent.detach())

    def fit_scale(self, index: int, weight: Tensor) -> None:
        """s of a layer: the least-squares factor from its levels to ``weight``."""
        k = self.planes[index]
        levels = self.levels(index) / (2**k - 1)
        fitted = (weight * levels).sum() / levels.square().sum().clamp_min(SMALLEST)
        self.scales[index] = fitted.abs().clamp_min(SMALLEST * 2**k).reshape(1)

    def unit(self, latent: Tensor) -> Tensor:
        """tanh(V)/max|tanh V|, within [−1, 1]."""
        squashed = torch.tanh(latent)
        return squashed / squashed.abs().max().clamp_min(SMALLEST)

    def levels(self, index: int) -> Tensor:
        """The odd integers that a layer's latents stand for."""
        return odd_integers(self.unit(self.latents[index].detach()), self.planes[index])

    def before_rounding(self, index: int) -> Tensor:
        """What of a layer is rounded, at the scale that is delivered: s·tanh(V)/max|tanh V|, or V itself at one bit."""
        latent = self.latents[index].detach()
        return latent if self.planes[index] == 1 else self.scales[index] * self.unit(latent)

    def unrounded(self) -> list[Tensor]:
        return [self.before_rounding(index) for index in range(len(self.layers))]

    def rounded(self, index: int) -> tuple[Tensor, Tensor]:
        if self.planes[index] == 1:
            latent = self.latents[index].detach()
            return signs(latent), latent.abs().mean().clamp_min(SMALLEST).reshape(1)
        return self.levels(index), self.scales[index] / (2 ** self.planes[index] - 1)

    def latent_gradient(self, index: int, gradient: Tensor) -> Tensor:
        """quantize_k passes gradients unchanged; tanh and its maximum have theirs."""
        if self.planes[index] == 1:
            return gradient
        return self.through_unit(index, gradient * self.scales[index])

    def through_unit(self, index: int, gradient: Tensor) -> Tensor:
        """From the gradient of :meth:`unit` to that of the latent."""
        with torch.enable_grad():
            latent = self.latents[index].detach().requires_grad_()
            return torch.autograd.grad(self.unit(latent), latent, gradient)[0]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"scales": self.scales}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.scales = [saved.to(own) for own, saved in zip(self.scales, state["scales"], strict=True)]
