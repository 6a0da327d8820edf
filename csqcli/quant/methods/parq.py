"""PARQ: the proximal map of a piecewise-affine regulariser, annealed to hard rounding.

Jin, Ma, Liu, Gromov, Defazio and Xiao, PARQ: Piecewise-Affine Regularized Quantization, ICML 2025 (arXiv 2503.15748).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from csqcli.quant.hard_layer import spread
from csqcli.quant.method_settings import PARQSettings
from csqcli.quant.methods.latents import LatentMethod
from csqcli.quant.passes.rounding import mse_step, proximal_map, quantize, top_integer


class PARQ(LatentMethod):
    """Aggregate proximal gradient (AProx): latents u take the gradient at w, and w is the proximal map of u.

    With levels q_0 < … < q_m, u between q_j and q_(j+1) maps to the line of slope ρ through their midpoint, cut off at
    both: w = clip(mid + ρ·(u − mid), q_j, q_(j+1)), and beyond the ends to the ends. 1/ρ falls from 1, no rounding, along a
    sigmoid to 0, hard rounding, between two shares of the run. Levels are the integers up to ±(2^k − 1) times a scale,
    ``step_factor`` that of least squares, refitted every few steps: 2^(k+1) − 1 levels at k planes.
    """

    name = "parq"
    Settings = PARQSettings
    settings: PARQSettings

    def begin(self) -> None:
        self.hard = False
        self.scales = [latent.new_ones(1) for latent in self.latents]
        self._refit()

    def inverse_slope(self, step: int) -> float:
        """1/ρ of a step: 1 before annealing starts, 0 once it has ended, between them a sigmoid cut to those ends."""
        total, settings = self.schedule.total_steps, self.settings
        start, end = settings.anneal_start * total, settings.anneal_end * total
        if self.hard or step >= end:
            return 0.0
        if step < start:
            return 1.0

        def sigmoid(share: float) -> float:
            return 1 / (1 + math.exp(settings.steepness * (share - 0.5)))

        share = (step - start) / (end - start)
        return (sigmoid(share) - sigmoid(1)) / (sigmoid(0) - sigmoid(1))

    @torch.no_grad()
    def collect(self, step: int, *, lr: float, lr_share: float) -> None:
        super().collect(step, lr=lr, lr_share=lr_share)
        if step % self.settings.refit_every == 0:
            self._refit()

    @torch.no_grad()
    def materialise(self, step: int) -> None:
        inverse_slope = self.inverse_slope(step)
        if inverse_slope == 0:
            super().materialise(step)
            return
        for layer, latent, scale, k in zip(self.layers, self.latents, self.scales, self.planes, strict=True):
            wide = spread(scale, latent, layer.channel_dim)
            mapped = proximal_map(latent.detach() / wide, top_integer(k), inverse_slope)
            layer.parameter.data.copy_(mapped.mul_(wide))

    def harden(self, step: int) -> None:
        self.hard = True
        self.materialise(step)

    def rounded(self, index: int) -> tuple[Tensor, Tensor]:
        latent, scale = self.latents[index].detach(), self.scales[index]
        return quantize(latent, spread(scale, latent, self.layers[index].channel_dim), self.planes[index]), scale

    def monitor(self, step: int) -> dict[str, float]:
        return super().monitor(step) | {"inverse_slope": self.inverse_slope(step)}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"scales": self.scales, "hard": self.hard}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.hard = state["hard"]
        self.scales = [saved.to(own) for own, saved in zip(self.scales, state["scales"], strict=True)]

    def _refit(self) -> None:
        for index, (layer, latent, k) in enumerate(zip(self.layers, self.latents, self.planes, strict=True)):
            shared = not (self.settings.per_channel and layer.allows_channel_scales)
            least_squares = mse_step(latent, k, channel_dim=None if shared else layer.channel_dim)
            self.scales[index] = self.settings.step_factor * least_squares
