"""MSQ: the lowest bits of a latent under an L1 norm, dropped where they have become sparse.

Han, Yoon, Kim, Wang, Jeon, Yang and Ko, MSQ: Memory-Efficient Bit Sparsification Quantization, ICCV 2025
(arXiv 2507.22349), by the group that wrote BSQ and CSQ: one latent per weight instead of a variable per bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csqcli.quant.hardening import reduce_to_budget
from csqcli.quant.method_settings import MSQSettings
from csqcli.quant.methods.dorefa import DoReFa

_FISHER_DECAY = 0.99
_FAST, _SLOW = 2, 1  # bits that a layer drops at a time, as its sensitivity is below the mean or not


class MSQ(DoReFa):
    """n bits of u = |tanh V|/max|tanh V| by RoundClamp: q_n = min(Round[2^n·u], 2^n − 1), W = s·sign(V)·q_n/(2^n − 1).

    The scaling by 2^n puts the bounds of n − k bits on midpoints of n bits, so that a weight's lowest k bits are the
    distance B = u − q_(n−k)/2^(n−k), which can be lowered from either side: the loss gains λ·Σ|B|. Every so often a layer
    gives up its k lowest bits when the share of weights that have one of them is below a threshold. k is 2 where the
    sensitivity Ω = Tr(H)·‖W − W_n‖² is below the mean of the layers, else 1. That ends with the budget met.

    Bits are those of magnitudes, with a sign beside them as in BSQ and CSQ. Signed weights mapped onto [0, 1] as DoReFa
    does would nearly all reach the upper level of one bit, where RoundClamp puts the bound at a quarter.

    Where the paper estimates Tr(H) by Hutchinson's method, csq takes the mean squared gradient per weight, which it has.
    Planes that are still too many when they are fixed are those that lose least, by a knapsack. 2^(k+1) − 1 levels at
    k planes.
    """

    name = "msq"
    takes = "target"
    Settings = MSQSettings
    settings: MSQSettings  # type: ignore[assignment]

    def starting_planes(self) -> list[int]:
        self.budget = self.plan.budget
        self.budget.check_feasible()
        return list(self.budget.limits.max_planes)

    def begin(self) -> None:
        super().begin()
        total = self.schedule.total_steps
        self.prune_every = max(1, round(self.settings.prune_share * total))
        self.fixing_step = max(1, round(self.settings.search_share * total))
        self.fixed = False
        self.fisher = torch.zeros(len(self.layers), device=self.latents[0].device)  # running mean of dL/dW² per weight
        self.widths = [_SLOW] * len(self.layers)  # k

    @property
    def searching(self) -> bool:
        """Whether planes are still to be dropped."""
        return not self.fixed and not self.budget.fits(self.planes)

    def levels(self, index: int) -> Tensor:
        unit = self.unit(self.latents[index].detach())
        return round_clamp(unit.abs(), self.planes[index]) * torch.sign(unit)

    def before_rounding(self, index: int) -> Tensor:
        """s·2^n·tanh(V)/max|tanh V|/(2^n − 1): as RoundClamp takes it, and not clamped."""
        numbers = 2 ** self.planes[index]
        return self._soft_weight(index) * (numbers / (numbers - 1))

    def rounded(self, index: int) -> tuple[Tensor, Tensor]:
        return self.levels(index), self.scales[index] / (2 ** self.planes[index] - 1)

    def latent_gradient(self, index: int, gradient: Tensor) -> Tensor:
        self.fisher[index].lerp_(gradient.float().square().mean(), 1 - _FISHER_DECAY)
        scaled = gradient * self.scales[index]
        if self.searching:
            side = torch.sign(self.latents[index].detach())  # du/d(unit)
            scaled = scaled + self.settings.strength * torch.sign(self.lowest_bits(index)) * side
        return self.through_unit(index, scaled)

    def lowest_bits(self, index: int) -> Tensor:
        """B of a layer: how far u lies from the nearest number whose k lowest bits are zero."""
        share, kept = self._share(index), self._kept(index)
        return share - round_clamp(share, kept) / 2**kept

    @torch.no_grad()
    def collect(self, step: int, *, lr: float, lr_share: float) -> None:
        super().collect(step, lr=lr, lr_share=lr_share)
        if step + 1 == self.fixing_step:
            self._fix()
        elif (step + 1) % self.prune_every == 0 and self.searching:
            self._prune()

    def harden(self, step: int) -> None:
        with torch.no_grad():
            self._fix()
        self.materialise(step)

    def monitor(self, step: int) -> dict[str, float]:
        mean = self.budget.mean_planes(self.planes)
        return {"mean_bits": mean, "budget_gap": mean - self.budget.target}

    def state_dict(self) -> dict[str, Any]:
        own = {"planes": list(self.planes), "widths": list(self.widths), "fisher": self.fisher, "fixed": self.fixed}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.planes, self.widths, self.fixed = list(state["planes"]), list(state["widths"]), state["fixed"]
        self.fisher.copy_(state["fisher"])

    def _share(self, index: int) -> Tensor:
        """u of a layer, within [0, 1]."""
        return self.unit(self.latents[index].detach()).abs()

    def _kept(self, index: int) -> int:
        """n − k: bits that are left when a layer gives up its k lowest, never fewer than its rules allow."""
        return max(self.planes[index] - self.widths[index], self.budget.limits.min_planes[index])

    def _prune(self) -> None:
        """One look at the layers, the least sensitive first, until the budget is met."""
        sensitivity = self._sensitivity()
        for index in sorted(range(len(self.layers)), key=sensitivity.__getitem__):
            n, kept = self.planes[index], self._kept(index)
            number = round_clamp(self._share(index), n)
            sparse = float((number.remainder(2.0 ** (n - kept)) != 0).float().mean()) < self.settings.threshold
            if kept < n and sparse and self.searching:
                self._set_planes(index, kept)
        mean = sum(sensitivity) / len(sensitivity)
        self.widths = [_FAST if value < mean else _SLOW for value in sensitivity]

    def _sensitivity(self) -> list[float]:
        """Ω of every layer."""
        errors = torch.stack([self._error(index).to(self.fisher) for index in range(len(self.layers))])
        return [float(value) for value in self.fisher * errors]

    def _error(self, index: int) -> Tensor:
        """‖W − W_n‖² of a layer, []."""
        integers, scale = self.rounded(index)
        return (self._soft_weight(index) - integers * scale).double().square().sum()

    def _soft_weight(self, index: int) -> Tensor:
        return self.scales[index] * self.unit(self.latents[index].detach())

    def _set_planes(self, index: int, planes: int) -> None:
        """Fewer planes, with the scale at which their levels are nearest to the weight as it is."""
        weight = self._soft_weight(index)
        self.planes[index] = planes
        if self.settings.rescale:
            self.fit_scale(index, weight)

    def _errors(self, index: int) -> Tensor:
        """‖W − W_n‖² of a layer for n = 0 … planes, and no more than that for further ones; [bits + 1] float64."""
        planes, scale, weight = self.planes[index], self.scales[index], self._soft_weight(index)
        errors = [weight.double().square().sum()]
        for fewer in range(1, planes + 1):
            self.planes[index] = fewer
            if self.settings.rescale:
                self.fit_scale(index, weight)
            integers, step = self.rounded(index)
            errors.append((weight - integers * step).double().square().sum())
        self.planes[index], self.scales[index] = planes, scale
        return torch.stack([*errors, *[errors[-1]] * (len(self.budget.table[0]) - len(errors))]).cpu()

    def _fix(self) -> None:
        """Planes for good, within the budget."""
        if not self.fixed:
            for index, planes in reduce_to_budget(self.planes, self.fisher, self.budget, errors=self._errors).items():
                self._set_planes(index, planes)
        self.fixed = True


def round_clamp(share: Tensor, bits: int) -> Tensor:
    """min(Round[2^n·u], 2^n − 1) for u in [0, 1]."""
    return (share * 2**bits).round_().clamp_(0, 2**bits - 1)
