"""CSQ as published: stochastic gradient descent on bit logits, mask logits and scales (Eq. 2-7, Algorithm 1).

Eq. 5 is the search, Eq. 4 the finetune with masks fixed, and Eq. 3 (:class:`UniformCSQ`) has no masks at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csqcli.errors import UserError
from csqcli.quant import equations
from csqcli.quant.budget import project
from csqcli.quant.catalog import CSQSettings, GateSettings, UniformGateSettings
from csqcli.quant.hard_layer import HardLayer, hard_layer, top_planes
from csqcli.quant.layers import Layer
from csqcli.quant.methods.base import Plan, WeightMethod
from csqcli.quant.passes.bitplanes import BitPlanes


@dataclass
class _Hardened:
    mask: Tensor
    integers: list[Tensor]
    steps: Tensor  # [layers]: s/(2^n−1)


class GateMethod(WeightMethod):
    """What the searching and the uniform form share: gates of Eq. 3-5, their update, and how they turn hard."""

    finetunes = True
    settings: GateSettings

    def __init__(self, layers: Sequence[Layer], plan: Plan, settings: GateSettings | None = None) -> None:
        """``plan.start``: delivered layers to go on from, mask fixed (Eq. 4); ``plan.planes``: planes already decided,
        mask fixed from the first step; with neither, masks are searched."""
        super().__init__(layers, plan, settings)
        settings, self.budget = self.settings, plan.budget
        self.weights = [layer.weights for layer in layers]
        device = layers[0].parameter.device
        self.searching = plan.start is None and plan.planes is None
        if self.searching:
            self.budget.check_feasible()
        self.bits = self.planes_of_gates(plan)
        self.planes = BitPlanes(layers, bits=self.bits, device=device, state_dtype=plan.state_dtype)
        self.plane_cost = self.budget.plane_costs[:, 0].to(device)  # [layers]; of one plane
        self.fisher = torch.zeros(len(layers), device=device)  # running Σ_i g_i² per layer
        self.hardened: _Hardened | None = None
        beta = self.beta(0)
        scales = [max_abs_scale(layer.parameter) for layer in layers]
        self.planes.mask_logits.fill_(self.mask_logit)
        if not self.searching:
            self.planes.fixed_mask = torch.ones(len(layers), self.bits, dtype=torch.bool, device=device)
        if plan.planes is not None:
            rows = [top_planes(k, self.bits) for k in plan.planes]
            self.planes.fixed_mask = torch.stack(rows).to(device)
        self.planes.initialise(logit=settings.logit, mask_logit=self.mask_logit, beta=beta, scales=scales)
        for index, layer in enumerate(plan.start or ()):
            self._start_from(index, layer, beta)
        self.materialise(0)

    @property
    def mask_logit(self) -> float:
        """m_B at the start."""
        return 1.0

    @classmethod
    def planes_of_gates(cls, plan: Plan) -> int:
        """n: planes of gates that every weight has."""
        return len(plan.start[0].mask) if plan.start else len(plan.budget.table[0]) - 1

    @classmethod
    def state_bytes(cls, settings: Any, *, max_bits: int, state_dtype: torch.dtype) -> int:
        return 4 * max_bits * state_dtype.itemsize  # two logits a plane, and their momenta

    @property
    def harden_at_step(self) -> int | None:
        share = self.settings.harden_at
        return max(1, round(share * self.schedule.total_steps)) if share < 1 else None

    def _start_from(self, index: int, layer: HardLayer, beta: float) -> None:
        assert self.planes.fixed_mask is not None
        if layer.scale.numel() > 1:
            raise UserError(
                "gates train one scale per layer, the file has one per channel",
                where=layer.name,
                hint="use --method staged",
            )
        lowest = int(torch.nonzero(layer.mask).flatten()[0]) if layer.planes else 0
        full_scale = layer.scale / 2.0**lowest * (2**self.bits - 1)
        integers = (layer.integers << lowest).to(self.planes.pos.device)
        self.planes.fixed_mask[index] = layer.mask.to(self.planes.pos.device)
        self.planes.set_integers(index, integers, full_scale, logit=self.settings.logit, beta=beta)

    def beta(self, step: int) -> float:
        """β of a step: Algorithm 1's exponential growth."""
        progress = self.schedule.progress(step, per_epoch=self.settings.beta_schedule == "epoch")
        return equations.temperature(progress, initial=self.settings.beta_initial, final=self.settings.beta_final)

    def collect(self, step: int, *, lr: float, lr_share: float) -> None:
        if self.hardened is not None:
            return
        beta, planes, settings = self.beta(step), self.planes, self.settings
        options = {"lr": lr, "momentum": self.plan.momentum, "weight_decay": self.plan.weight_decay}
        gap = self._gap()
        gradients = planes.update_gates(beta, **options, seed=step)
        self.fisher.mul_(0.99).add_(gradients.squared, alpha=0.01)
        sgd_(planes.scale, planes.scale_momentum, gradients.scale, **options)
        if self.searching:  # Eq. 7: ∂(L + λΔ_S R)/∂m_B = (dL/df + λΔ_S)·f'
            slope = equations.gate_slope(equations.gate(planes.mask_logits, beta), beta)
            mask_gradient = (gradients.mask + self.reg_strength * gap) * slope
            sgd_(planes.mask_logits, planes.mask_momentum, mask_gradient, **options)
        if settings.refit_scale:
            planes.refit_scale(beta, self.beta(step + 1))

    @property
    def reg_strength(self) -> float:
        """λ of Eq. 7."""
        return 0.0

    def _gap(self) -> Tensor:
        """Δ_S before the step, by the sign of every m_B; on the device and in float64, so that a step never waits."""
        costs = self.plane_cost
        return (self.planes.hard_mask().sum(dim=1).double() @ costs) / costs.sum() - self.budget.target_ratio

    def materialise(self, step: int) -> None:
        if self.hardened is None:
            self.planes.materialise(self.beta(step))
            return
        for layer, hard in zip(self.layers, self.hard_layers(), strict=True):
            layer.parameter.data.copy_(hard.weight())

    def harden(self, step: int) -> None:
        if self.hardened is None:
            self.hardened = self._harden(step)
            self.materialise(step)

    def _harden(self, step: int) -> _Hardened:
        beta, planes = self.beta(step), self.planes
        mask = planes.hard_mask()
        if self.searching:
            importance = planes.plane_energy(beta) * (self.fisher / torch.tensor(self.weights).to(self.fisher))[:, None]
            mask = project(mask, importance, self.budget)
        integers = planes.integers(mask, beta, rounding=self.settings.rounding)
        return _Hardened(mask, integers, planes.scale / (2**self.bits - 1))

    def hard_layers(self) -> list[HardLayer]:
        assert self.hardened is not None, "harden() first"
        return self._deliver(self.hardened)

    def _deliver(self, hardened: _Hardened) -> list[HardLayer]:
        columns = zip(self.layers, hardened.integers, hardened.steps, hardened.mask, strict=True)
        return [hard_layer(layer, integers, step, mask) for layer, integers, step, mask in columns]

    def mean_bits(self) -> float:
        """Mean planes over elements if every gate were a unit step now."""
        mask = self.planes.hard_mask() if self.hardened is None else self.hardened.mask
        return self.budget.mean_planes(mask.sum(dim=1).tolist())

    def budget_gap(self) -> float:
        """Mean planes over weight elements minus the target; 0 where nothing is searched."""
        return self.mean_bits() - self.budget.target if self.searching else 0.0

    def monitor(self, step: int) -> dict[str, float]:
        beta, gap = self.beta(step), self.budget_gap()
        regulariser = float(equations.mask_regulariser(self.planes.mask_logits, beta))
        penalty = self.reg_strength * gap * regulariser if self.searching else 0.0
        return {"beta": beta, "mean_bits": self.mean_bits(), "budget_gap": gap, "reg_loss": penalty}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"planes": self.planes.state_dict(), "fisher": self.fisher}
        return state if self.hardened is None else state | {"hardened": vars(self.hardened)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.planes.load_state_dict(state["planes"])
        self.fisher.copy_(state["fisher"])
        self.hardened = _Hardened(**state["hardened"]) if "hardened" in state else None


class BitLevelCSQ(GateMethod):
    """Eq. 5 and 7: bits and masks searched together, the budget-aware regulariser steering them."""

    name = "csq"
    takes = "either"
    Settings = CSQSettings
    settings: CSQSettings

    @property
    def mask_logit(self) -> float:
        return self.settings.mask_logit

    @property
    def reg_strength(self) -> float:
        return self.settings.reg_strength


class UniformCSQ(GateMethod):
    """Eq. 3: no masks; every layer has as many planes of gates as the plan gives it."""

    name = "csq-uniform"
    takes = "planes"
    Settings = UniformGateSettings

    @classmethod
    def planes_of_gates(cls, plan: Plan) -> int:
        return max(plan.planes) if plan.planes is not None else super().planes_of_gates(plan)


def sgd_(value: Tensor, velocity: Tensor, gradient: Tensor, *, lr: float, momentum: float, weight_decay: float) -> None:
    """PyTorch's SGD update in place: v ← μv + (g + wd·x); x ← x − lr·v."""
    velocity.mul_(momentum).add_(gradient + weight_decay * value)
    value.sub_(velocity, alpha=lr)


def max_abs_scale(weight: Tensor) -> Tensor:
    """s = max |W| of a layer ([1]); 1 for an all-zero layer, whose integers are zero at any scale."""
    largest = weight.detach().abs().amax().reshape(1)
    return torch.where(largest > 0, largest, torch.ones_like(largest))
