"""TWN: ternary weights by a threshold at a share of the mean magnitude.

Li, Zhang and Liu, Ternary Weight Networks, 2016 (arXiv 1605.04711).
"""

from __future__ import annotations

import torch
from torch import Tensor

from csqcli.quant.method_settings import TWNSettings
from csqcli.quant.methods.latents import SMALLEST, LatentMethod


class TernaryWeights(LatentMethod):
    """W ≈ α·t, t ∈ {−1, 0, 1}: 3 levels, one plane.

    Eq. 5 and 6 of the paper: t = sign(W) where |W| > Δ, else 0; Δ = 0.7·mean|W|; α = the mean of |W| beyond Δ. Both are
    taken anew at every step, gradients pass unchanged.
    """

    name = "twn"
    Settings = TWNSettings
    settings: TWNSettings
    max_planes = 1

    def rounded(self, index: int) -> tuple[Tensor, Tensor]:
        latent = self.latents[index].detach()
        magnitude = latent.abs()
        on = magnitude > self.settings.threshold * magnitude.mean()  # Δ
        scale = (magnitude * on).sum() / on.sum().clamp_min(1)  # α
        return torch.sign(latent) * on, scale.clamp_min(SMALLEST).reshape(1)
