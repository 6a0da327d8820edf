"""XNOR-Net's weights: signs with one scale per filter.

Rastegari, Ordonez, Redmon and Farhadi, XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks,
ECCV 2016 (arXiv 1603.05279). This is its Binary-Weight-Network; with one bit for activations (`act_bits: 1`) the binary
inputs are added (`quant.activations`), at one learned scale per layer in the place of K.
"""

from __future__ import annotations

from torch import Tensor

from csqcli.quant.hard_layer import spread
from csqcli.quant.layers import Layer
from csqcli.quant.method_settings import XNORSettings
from csqcli.quant.methods.latents import SMALLEST, LatentMethod, channel_means, signs


class BinaryWeights(LatentMethod):
    """W ≈ α·sign(W) with α = mean|W| of every filter (Eq. 6 of the paper): 2 levels, one plane."""

    name = "xnor"
    Settings = XNORSettings
    settings: XNORSettings
    max_planes = 1

    def rounded(self, index: int) -> tuple[Tensor, Tensor]:
        latent = self.latents[index].detach()
        return signs(latent), self._alpha(self.layers[index], latent).clamp_min(SMALLEST)

    def latent_gradient(self, index: int, gradient: Tensor) -> Tensor:
        """Section 3.1: ∂C/∂W_i = ∂C/∂W̃_i·(1/n + ∂sign/∂W_i·α), ∂sign/∂W_i = 1 for |W_i| ≤ 1 and n the filter's weights."""
        latent, layer = self.latents[index].detach(), self.layers[index]
        inside = (latent.abs() <= 1).to(gradient.dtype)
        if self.settings.gradient == "straight-through":
            return gradient * inside
        alpha = self._alpha(layer, latent)
        weights = layer.weights // alpha.numel()
        return gradient * (1 / weights + inside * spread(alpha, latent, layer.channel_dim))

    def _alpha(self, layer: Layer, latent: Tensor) -> Tensor:
        magnitude = latent.abs()
        return channel_means(layer, magnitude) if layer.allows_channel_scales else magnitude.mean().reshape(1)
