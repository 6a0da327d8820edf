"""Soft masks under an exact budget: how many planes each layer gets, decided by importance against a price.

Each layer's weight is a sum of refinement planes under a soft mask,

    W = Σ_b f_β(m_b) (Q_{b+1}(V) − Q_b(V)),   Q_0 = 0,

where Q_k rounds the latent V to k planes at that width's MSE-optimal scale. This is Eq. 5 with digits taken from the
latent instead of from 2n logits per weight. The mask logit of plane b is its importance against a price,

    m_b = log I_b − log λ,   I_b = ρ^b ½ Σ_i F_i ((V − Q_b)² − (V − Q_{b+1})²) / cost,   F = running mean of (dL/dW)²,

the loss that the plane saves per unit of budget (diagonal Fisher). λ is solved so that the soft masks cost what the target
allows at every refresh: Δ_S of Eq. 7 is zero by construction, and nothing swings. β grows as in Algorithm 1, so masks go
from nearly flat to nearly binary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csqcli.quant import equations
from csqcli.quant.budget import Budget, allocate, shared_within
from csqcli.quant.layers import Layer
from csqcli.quant.passes.adam import LatentAdam
from csqcli.quant.passes.rounding import plane_errors, plane_shares, soft_planes

_LOG_PRICE = 100.0  # log λ lies within ± this
_BISECTIONS = 60


class SoftMasks:
    """f_β(m) of every layer and plane, solved on the device: a training step never waits for the host."""

    def __init__(self, budget: Budget, units: Sequence[Tensor], scales: Sequence[Tensor], *, recovery: float) -> None:
        """``units``: per layer [channels, 1] or [1, 1], the weight of a latent of 1. ``scales``: per layer
        [bits, channels or 1, 1], the scale of each width, one plane first. ``recovery`` is ρ."""
        self.budget, self.units, self.scales, self.recovery = budget, list(units), list(scales), recovery
        self.bits, device = len(budget.table[0]) - 1, units[0].device
        self.soft_mask = torch.ones(len(units), self.bits, device=device)  # every plane until gradients say otherwise
        few, most = torch.tensor([budget.limits.min_planes, budget.limits.max_planes]).unsqueeze(2)  # [layers, 1]
        plane = torch.arange(self.bits)
        self.always, self.never = (plane < few).to(device), (plane >= most).to(device)
        self.costs = budget.plane_costs.to(device)

    @torch.no_grad()
    def importance(self, latents: Sequence[Tensor], adam: LatentAdam) -> Tensor:
        """[layers, bits]: ρ^b ½ Σ_i F_i ((V − Q_b)² − (V − Q_{b+1})²), the loss that plane b saves; falling with b.

        F is Adam's bias-corrected second moment of the latent's gradient. ρ discounts finer planes: training
        at few planes wins part of their loss back. Float64, on the latents' device.
        """
        device = latents[0].device
        errors = torch.zeros(len(latents), self.bits + 1, dtype=torch.float64, device=device)
        for index, (latent, unit, scales) in enumerate(zip(latents, self.units, self.scales, strict=True)):
            fisher = adam.second_moment(index)
            if fisher is not None:
                errors[index] = plane_errors(latent, unit=unit, steps=scales, fisher=fisher)
        return savings(errors, self.recovery)

    def refresh(self, latents: Sequence[Tensor], adam: LatentAdam, beta: float) -> None:
        """Look at the importance anew and solve the masks for temperature ``beta``."""
        self.soft_mask = self.solve(self.importance(latents, adam), beta)

    def solve(self, importance: Tensor, beta: float) -> Tensor:
        """Soft masks σ(β(log I − log λ)) with λ such that they cost what the target allows. Float32 [layers, bits]."""
        logits = (shared_within(importance, self.budget) / self.costs.clamp_min(1)).clamp_min(1e-30).log()
        one_plane = self.costs[:, :1].sum()

        def masks(log_price: Tensor) -> Tensor:
            soft = equations.gate(logits - log_price, beta)
            return soft.masked_fill(self.always, 1.0).masked_fill(self.never, 0.0)

        low = torch.full_like(self.costs[0, :1], -_LOG_PRICE)
        high = -low
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            over = (masks(middle) * self.costs).sum() / one_plane > self.budget.target_ratio
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        return masks(high).float()

    def allocate(self, latents: Sequence[Tensor], adam: LatentAdam) -> list[int]:
        """Planes per layer by an exact knapsack on the importance as it is now, within the budget."""
        return allocate(self.importance(latents, adam).cpu(), self.budget)

    def materialise(self, layers: Sequence[Layer], latents: Sequence[Tensor]) -> None:
        """Write every layer's soft weight into the model."""
        shares = plane_shares(self.soft_mask)
        rows = zip(layers, latents, self.units, self.scales, shares, strict=True)
        for layer, latent, unit, scales, share in rows:
            with layer.writing() as flat:
                soft_planes(latent, layer.by_channel(flat), unit=unit, steps=scales, shares=share)

    def mean_planes(self) -> float:
        """Mean of the soft masks over weight elements."""
        per_layer = self.soft_mask.double().sum(dim=1).cpu()
        weights = self.budget.weights
        return float((per_layer * torch.tensor(weights)).sum()) / sum(weights)

    def state_dict(self) -> dict[str, Any]:
        return {"soft_mask": self.soft_mask, "scales": self.scales}

    def load_state_dict(self, state: dict[str, Any], units: Sequence[Tensor]) -> None:
        device = self.soft_mask.device
        self.units = list(units)
        self.soft_mask = state["soft_mask"].to(device)
        self.scales = [scales.to(device) for scales in state["scales"]]


def savings(errors: Tensor, recovery: float) -> Tensor:
    """[layers, bits] from the Fisher-weighted squared errors at 0 … n planes [layers, bits + 1]: what each plane saves.

    Half the difference, by the second-order expansion of the loss; never rising with the plane; discounted by ρ^b.
    """
    saved = torch.cummin((errors[:, :-1] - errors[:, 1:]) / 2, dim=1).values.clamp_min(0)
    return saved * recovery ** torch.arange(saved.shape[1], dtype=errors.dtype, device=errors.device)
