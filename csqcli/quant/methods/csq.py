"""CSQ as published: gradient steps on bit logits, mask logits and scales (Eq. 2-7, Algorithm 1).

Eq. 5 is the search, Eq. 4 what follows once planes are fixed, and Eq. 3 (:class:`UniformCSQ`) has no masks at all. The
settings' defaults are for checkpoints and short schedules; the paper's own are in its recipes (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csqcli.quant import equations
from csqcli.quant.budget import project
from csqcli.quant.hard_layer import HardLayer, hard_layer, top_planes
from csqcli.quant.hardening import choose_planes, fit_levels, known_curvature
from csqcli.quant.layers import Layer
from csqcli.quant.method_settings import CSQSettings, GateSettings, UniformGateSettings
from csqcli.quant.methods.base import Plan, WeightMethod
from csqcli.quant.passes.bitplanes import BitPlanes
from csqcli.quant.passes.rounding import mse_step

_UNIT_STEP = 1e9  # a temperature at which every gate is one
_STRAIGHT_LIMIT = 2.0  # most |βm| behind a unit step; from 4, gradients would flip it six times as slowly
_MOST_GAIN = 1e4  # of a preconditioned step: beyond it a gate's share of the weight is too small to be steered by


@dataclass
class _Hardened:
    mask: Tensor  # bool [layers, bits]
    integers: list[Tensor]
    scales: Tensor  # [layers]: the value of integer 1, positive


class GateMethod(WeightMethod):
    """What the searching and the uniform form share: gates of Eq. 3-5, their update, and how they turn hard.

    Planes are fixed throughout (given, or those of a delivered model to go on from), from ``fix_masks_at`` on, or at the
    end. When they are fixed earlier, they are chosen within the budget, each scale is refitted, and what is trained from
    there on is what is delivered. From ``straight_through_at`` on gates are unit steps in the forward pass, at a fixed scale.
    """

    finetunes = True
    settings: GateSettings

    def __init__(self, layers: Sequence[Layer], plan: Plan, settings: GateSettings | None = None) -> None:
        """``plan.start``: delivered layers to go on from, mask fixed (Eq. 4); ``plan.planes``: planes already decided,
        mask fixed from the first step; with neither, masks are searched."""
        super().__init__(layers, plan, settings)
        settings, self.budget = self.settings, plan.budget
        device = layers[0].parameter.device
        self.searches = plan.start is None and plan.planes is None
        if self.searches:
            self.budget.check_feasible()
        self.bits = self.planes_of_gates(plan)
        self.logit = settings.logit if settings.logit != "auto" else auto_logit(plan, settings.beta_final)
        signed = settings.digits == "signed"
        self.bit_planes = BitPlanes(
            layers,
            bits=self.bits,
            device=device,
            state_dtype=plan.state_dtype,
            signed=signed,
            ratios=self._ratios(plan.start),
        )
        weights = [layer.weights for layer in layers]
        self.device_weights = torch.tensor(weights, dtype=torch.float64, device=device)
        self.plane_cost = self.budget.plane_costs[:, 0].to(device)  # [layers]; of one plane
        self.fisher = torch.zeros(len(layers), device=device)  # running Σ_i g_i² per layer
        self.hardened: _Hardened | None = None
        self.soft_step = 0  # the last step whose weights were soft; gates stay as they were then
        self.fixing_step = self._fixing_step() if self.searches else 0
        self.bit_planes.mask_logits.fill_(self.mask_logit)
        if plan.start is not None:
            self.bit_planes.fix_mask(torch.stack([delivered.mask for delivered in plan.start]))
        elif plan.planes is not None:
            self.bit_planes.fix_mask(torch.stack([top_planes(k, self.bits) for k in plan.planes]))
        beta = self.beta(0)
        if plan.start is not None and isinstance(plan.searched, GateMethod) and plan.searched.bits == self.bits:
            self._go_on_with(plan.searched, plan.start, beta)
        elif plan.start is not None:
            for index, delivered in enumerate(plan.start):
                self._start_from(index, delivered, beta)
        elif self.fixing_step == 0 and settings.restart_beta is not None:
            for index in range(len(layers)):
                self._restart_bits(index, self._float_weight(index), starts=(), beta=beta)
        else:
            scales = [self._initial_scale(self._float_weight(index)) for index in range(len(layers))]
            self.bit_planes.initialise(logit=self.logit, mask_logit=self.mask_logit, beta=beta, scales=scales)
        self.materialise(0)

    def _ratios(self, start: Sequence[HardLayer] | None) -> list[Tensor] | None:
        """Per layer [channels]: what each output channel's scale is of the layer's; None for one scale per layer."""
        if start is not None and any(delivered.scale.numel() > 1 for delivered in start):
            return [channel_ratios(delivered.scale, layer) for delivered, layer in zip(start, self.layers, strict=True)]
        if start is not None or not self.settings.per_channel:
            return None
        return [channel_ratios(_channel_steps(layer), layer) for layer in self.layers]

    def _float_weight(self, index: int) -> Tensor:
        """[weights]: what stands in the model now, at one scale for the layer."""
        layer = self.layers[index]
        return self.bit_planes.over_ratios(index, layer.flat(layer.parameter.detach()))

    @property
    def mask_logit(self) -> float:
        """m_B at the start."""
        return 1.0

    def _fixing_step(self) -> int | None:
        """The first step with fixed planes; None where they are soft to the end."""
        return None

    @classmethod
    def planes_of_gates(cls, plan: Plan) -> int:
        """n: planes of gates that every weight has."""
        return len(plan.start[0].mask) if plan.start else len(plan.budget.table[0]) - 1

    @classmethod
    def state_bytes(cls, settings: Any, *, max_bits: int, state_dtype: torch.dtype) -> int:
        return 4 * max_bits * state_dtype.itemsize  # two logits a plane, and their momenta

    @classmethod
    def trained_values(cls, *, max_bits: int) -> int:
        return 0

    @property
    def harden_at_step(self) -> int | None:
        share = self.settings.harden_at
        return max(1, round(share * self.schedule.total_steps)) if share < 1 else None

    @torch.no_grad()
    def _go_on_with(self, searched: GateMethod, start: Sequence[HardLayer], beta: float) -> None:
        """Algorithm 1's finetune: m_p and m_n of the search as they are, at a temperature that starts again.

        Gates are softer there, so each scale is refitted to the weights that were delivered.
        """
        bit_planes, found = self.bit_planes, searched.bit_planes
        bit_planes.pos.copy_(found.pos)
        bit_planes.neg.copy_(found.neg)
        bit_planes.scale.copy_(found.scale)
        bit_planes.ratios = found.ratios
        for index, (layer, delivered) in enumerate(zip(self.layers, start, strict=True)):
            weight = layer.flat(delivered.weight()).to(bit_planes.scale)
            bit_planes.fit_scale(index, bit_planes.over_ratios(index, weight), beta)

    def _start_from(self, index: int, layer: HardLayer, beta: float) -> None:
        lowest = int(torch.nonzero(layer.mask).flatten()[0]) if layer.planes else 0
        full_scale = _layer_scale(layer.scale) / 2.0**lowest * (2**self.bits - 1)
        integers = (layer.integers << lowest).to(self.bit_planes.pos.device)
        self.bit_planes.set_integers(index, integers, full_scale, logit=self.logit, beta=beta)

    def beta(self, step: int) -> float:
        """Algorithm 1's temperature; it starts again, from ``restart_beta``, with the first step of fixed planes. Once gates are
        unit steps in the forward pass it is that of their slopes, and grows no more."""
        settings, restarted = self.settings, self.settings.restart_beta
        if self.straight_step is not None:
            step = min(step, self.straight_step)
        if restarted is not None and self.fixing_step is not None and step >= self.fixing_step:
            last = max(settings.harden_at * self.schedule.total_steps, self.fixing_step + 1)
            progress = (step - self.fixing_step) / (last - self.fixing_step)
            return equations.temperature(progress, initial=restarted, final=settings.beta_final)
        progress = self.schedule.progress(step, per_epoch=settings.beta_schedule == "epoch")
        return equations.temperature(progress, initial=settings.beta_initial, final=settings.beta_final)

    @property
    def straight_step(self) -> int | None:
        """The first step whose forward pass has unit steps in the place of gates; None where gates stay soft."""
        share = self.settings.straight_through_at
        if share is None or self.fixing_step is None:
            return None
        return max(round(share * self.schedule.total_steps), self.fixing_step + 1)

    def forward_beta(self, step: int) -> float:
        """The temperature of the weights that a step's forward pass sees."""
        return self.beta(step) if self.straight_step is None or step < self.straight_step else _UNIT_STEP

    def collect(self, step: int, *, lr: float, lr_share: float) -> None:
        if self.hardened is not None:
            return
        beta, bit_planes = self.beta(step), self.bit_planes
        straight = self.straight_step
        if straight is not None and step >= straight:  # flips die out before the rest has settled, as in `staged`
            lr *= lr_share * self.settings.straight_through_rate
        options = {"lr": lr, "momentum": self.plan.momentum, "weight_decay": self.plan.weight_decay}
        gradients = bit_planes.update_gates(beta, **options, gain=self._gain(beta), seed=step)
        self.fisher.mul_(0.99).add_(gradients.squared, alpha=0.01)
        if straight is not None and step >= straight:
            bit_planes.limit_logits(_STRAIGHT_LIMIT / beta)
            return
        sgd_(bit_planes.scale, bit_planes.scale_momentum, gradients.scale, **options)
        if bit_planes.fixed_mask is None:  # Eq. 7: ∂(L + λΔ_S R)/∂m_B = (dL/df + λΔ_S)·f'
            slope = equations.gate_slope(equations.gate(bit_planes.mask_logits, beta), beta)
            mask_gradient = (gradients.mask + self.reg_strength * self._gap(beta)) * slope
            sgd_(bit_planes.mask_logits, bit_planes.mask_momentum, mask_gradient, **options)
        if step + 1 == self.fixing_step:
            self._fix_masks(beta, self.beta(step + 1))
        elif step + 1 == straight:
            bit_planes.refit_scale(beta, _UNIT_STEP)
            bit_planes.pos_momentum.zero_()
            bit_planes.neg_momentum.zero_()
        elif self.settings.refit_scale:
            limit = self.settings.gate_limit if bit_planes.fixed_mask is not None else None
            bit_planes.refit_scale(beta, self.beta(step + 1), limit)

    @property
    def reg_strength(self) -> float:
        """λ of Eq. 7."""
        return 0.0

    def _gain(self, beta: float) -> Tensor | None:
        """[layers, 1]: what gate gradients are multiplied by; None for 1.

        With c = s·2^(n−1)/(2^n−1) of the top plane, an SGD step on a logit moves the weight by (c·β·σ')²·dL/dW: by
        (cβ/4)², at an undecided gate, of what SGD on the weight itself would. The gain takes that factor out.
        """
        if self.settings.gate_steps == "sgd":
            return None
        top = self.bit_planes.scale * self.bit_planes.plane_weights[-1]
        return 1 / (top * beta / 4).square().clamp_min(1 / _MOST_GAIN).unsqueeze(1)

    def _gap(self, beta: float) -> Tensor:
        """Δ_S by what planes cost, on the device and in float64, so that a step never waits for the host."""
        mask = self._counted(beta)
        return (mask.sum(dim=1).double() @ self.plane_cost) / self.plane_cost.sum() - self.budget.target_ratio

    def _counted(self, beta: float) -> Tensor:
        """[layers, bits]: the planes that Δ_S counts."""
        return self.bit_planes.hard_mask()

    @torch.no_grad()
    def _fix_masks(self, beta: float, new_beta: float) -> None:
        """From Eq. 5 to Eq. 4: planes chosen within the budget, scales refitted, bits restarted where that is asked for."""
        bit_planes, count = self.bit_planes, range(len(self.layers))
        chosen = self._choose_planes(beta)
        soft = [bit_planes.soft_weight(index, beta) for index in count]
        starts = [self._likely_scales(index, beta) for index in count]
        bit_planes.fix_mask(chosen)
        for index, weight in enumerate(soft):
            if self.settings.restart_beta is None:
                bit_planes.fit_scale(index, weight, new_beta)
            else:
                self._restart_bits(index, weight, starts=starts[index], beta=new_beta)
        bit_planes.scale_momentum.zero_()

    def _restart_bits(self, index: int, weight: Tensor, *, starts: Sequence[float], beta: float) -> None:
        """Bits of one layer anew, on its fixed planes: the soft weight at ``beta`` is ``weight`` (at the layer's scale, [weights]),
        clipped to what they reach.

        The scale is the one whose levels are nearest to the weight; what lies between two levels stays in the lowest
        plane's digits, so that nothing is rounded before training has decided it.
        """
        bit_planes = self.bit_planes
        assert bit_planes.fixed_mask is not None
        fit = fit_levels(weight, bit_planes.fixed_mask[index], starts=starts)
        full_scale = fit.step * (2**bit_planes.bits - 1)
        values = self.layers[index].unflatten(weight / fit.step)
        bit_planes.set_integers(index, values, full_scale, logit=1.0, beta=beta, signed=True)
        where = bit_planes.slices[index]
        bit_planes.pos_momentum[:, where] = bit_planes.neg_momentum[:, where] = 0

    def materialise(self, step: int) -> None:
        if self.hardened is None:
            self.soft_step = step
            self.bit_planes.materialise(self.forward_beta(step))
            return
        for layer, hard in zip(self.layers, self.hard_layers(), strict=True):
            layer.parameter.data.copy_(hard.weight())

    def harden(self, step: int) -> None:
        if self.hardened is None:
            self.soft_step = step
            self.hardened = self._harden(step)
            self.materialise(step)

    @torch.no_grad()
    def _harden(self, step: int) -> _Hardened:
        beta, bit_planes = self.forward_beta(step), self.bit_planes
        if self.settings.rounding == "threshold":
            return self._threshold(beta)
        mask = bit_planes.fixed_mask if bit_planes.fixed_mask is not None else self._choose_planes(beta)
        fits = [
            fit_levels(bit_planes.soft_weight(index, beta), mask[index], starts=self._likely_scales(index, beta))
            for index in range(len(self.layers))
        ]
        integers = [layer.unflatten(fit.integers.to(torch.int32)) for layer, fit in zip(self.layers, fits, strict=True)]
        return _Hardened(mask, integers, torch.stack([fit.step for fit in fits]))

    def _threshold(self, beta: float) -> _Hardened:
        """The paper's hardening: unit steps of every gate, planes dropped where the budget asks for it, scales as they are."""
        mask = self._project(beta)
        scales = self.bit_planes.scale / (2**self.bits - 1)
        signs = torch.where(scales < 0, -1, 1).to(torch.int32)  # a negative scale goes into the integers
        integers = [part * sign for part, sign in zip(self.bit_planes.threshold_integers(mask), signs, strict=True)]
        return _Hardened(mask, integers, scales.abs())

    def _likely_scales(self, index: int, beta: float) -> list[float]:
        """Scales at which a layer's soft weight lies on levels if its gates are decided and its masks alike."""
        scale = float(self.bit_planes.scale[index].abs()) / (2**self.bits - 1)
        return [scale, *(scale * soft for soft in self.bit_planes.mask(beta)[index].tolist())]

    def _curvature(self) -> Tensor:
        """[layers]: mean squared gradient of a weight, what a squared error there costs."""
        return known_curvature(self.fisher / self.device_weights.to(self.fisher))

    def _choose_planes(self, beta: float) -> Tensor:
        """bool [layers, bits]: the planes that keep the soft model best within the budget (`hardening.choose_planes`)."""
        bit_planes = self.bit_planes
        weights = [bit_planes.soft_weight(index, beta) for index in range(len(self.layers))]
        energy, masks = bit_planes.plane_energy(beta), bit_planes.mask(beta)
        return choose_planes(weights, masks, energy, self._curvature(), self.budget)

    def _project(self, beta: float) -> Tensor:
        """bool [layers, bits]: planes with m_B ≥ 0, the least important ones dropped until the budget is met."""
        mask = self.bit_planes.hard_mask()
        if self.bit_planes.fixed_mask is not None:
            return mask
        importance = self.bit_planes.plane_energy(beta) * self._curvature()[:, None]
        return project(mask, importance, self.budget, spendable=mask)

    @torch.no_grad()
    def unrounded(self) -> list[Tensor]:
        """The soft weights, as they were before they turned hard. Unit steps in the forward pass are on levels already: there it is
        the weights at the temperature of their slopes, scaled so that the levels fit them."""
        bit_planes, beta, forward_beta = self.bit_planes, self.beta(self.soft_step), self.forward_beta(self.soft_step)
        found = []
        for index, layer in enumerate(self.layers):
            soft = bit_planes.soft_weight(index, beta)
            if forward_beta != beta:
                hard = bit_planes.soft_weight(index, forward_beta)
                share = soft @ hard
                soft *= torch.where(share > 0, (hard @ hard) / share.clamp_min(1e-30), 1.0)
            if bit_planes.ratios is not None:
                layer.by_channel(soft).mul_(bit_planes.ratios[index])
            found.append(layer.unflatten(soft))
        return found

    def hard_layers(self) -> list[HardLayer]:
        assert self.hardened is not None, "harden() first"
        return self._deliver(self.hardened)

    @torch.no_grad()
    def unit_steps(self, step: int) -> list[HardLayer] | None:
        return self._deliver(self._threshold(self.beta(step))) if self.settings.measure_unit_steps else None

    def _deliver(self, hard: _Hardened) -> list[HardLayer]:
        scales = list(hard.scales)
        if self.bit_planes.ratios is not None:
            scales = [scale * ratio for scale, ratio in zip(scales, self.bit_planes.ratios, strict=True)]
        columns = zip(self.layers, hard.integers, scales, hard.mask, strict=True)
        return [hard_layer(layer, integers, scale, mask) for layer, integers, scale, mask in columns]

    def fixed_planes(self) -> list[int] | None:
        mask = self.bit_planes.fixed_mask
        return None if mask is None else [int(count) for count in mask.sum(dim=1)]

    def mean_bits(self) -> float:
        """Mean planes over elements if every gate were a unit step now."""
        return self.budget.mean_planes(self._mask_now().sum(dim=1).tolist())

    def _mask_now(self) -> Tensor:
        """bool [layers, bits]: planes in use if every gate were a unit step now."""
        return self.bit_planes.hard_mask() if self.hardened is None else self.hardened.mask

    def budget_gap(self) -> float:
        """Mean planes over weight elements minus the target; 0 where nothing is searched."""
        return self.mean_bits() - self.budget.target if self.searches else 0.0

    def monitor(self, step: int) -> dict[str, Any]:
        beta, penalty = self.beta(step), 0.0
        if self.bit_planes.fixed_mask is None:
            regulariser = float(equations.mask_regulariser(self.bit_planes.mask_logits, beta))
            penalty = self.reg_strength * float(self._gap(beta)) * regulariser
        return {
            "beta": beta,
            "mean_bits": self.mean_bits(),
            "budget_gap": self.budget_gap(),
            "reg_loss": penalty,
            "masks": [equations.mask_string(mask) for mask in self._mask_now().cpu()],
        }

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "planes": self.bit_planes.state_dict(),
            "fisher": self.fisher,
            "soft_step": self.soft_step,
        }
        return state if self.hardened is None else state | {"hardened": vars(self.hardened)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bit_planes.load_state_dict(state["planes"])
        self.fisher.copy_(state["fisher"])
        # states of csq 0.2 do not say it: weights then turned hard where the settings say so
        self.soft_step = state.get("soft_step", self.harden_at_step or self.schedule.total_steps)
        self.hardened = _Hardened(**state["hardened"]) if "hardened" in state else None

    def _initial_scale(self, weight: Tensor) -> Tensor:
        """s of a layer ([1]) before training: a share of its largest magnitude, or what suits the planes it will keep."""
        if self.settings.init_scale != "mse":
            return max_abs_scale(weight) * float(self.settings.init_scale)
        planes = max(1, min(self.bits, round(self.budget.target)))
        scale = mse_step(weight, planes, channel_dim=None).to(weight)  # of the top planes' integers
        return scale * (2**self.bits - 1) / 2 ** (self.bits - planes)


class BitLevelCSQ(GateMethod):
    """Eq. 5 and 7: bits and masks searched together, the budget-aware regulariser steering them."""

    name = "csq"
    takes = "either"
    Settings = CSQSettings
    settings: CSQSettings

    @property
    def mask_logit(self) -> float:
        asked = self.settings.mask_logit
        return asked if asked != "auto" else auto_logit(self.plan, self.settings.beta_final)

    @property
    def reg_strength(self) -> float:
        return self.settings.reg_strength

    def _fixing_step(self) -> int | None:
        share = self.settings.fix_masks_at
        return max(1, round(share * self.schedule.total_steps)) if share < 1 else None

    def _counted(self, beta: float) -> Tensor:
        return self.bit_planes.mask(beta) if self.settings.precision_count == "soft" else self.bit_planes.hard_mask()


class UniformCSQ(GateMethod):
    """Eq. 3: no masks; every layer has as many planes of gates as the plan gives it."""

    name = "csq-uniform"
    takes = "planes"
    Settings = UniformGateSettings

    @classmethod
    def planes_of_gates(cls, plan: Plan) -> int:
        return max(plan.planes) if plan.planes is not None else super().planes_of_gates(plan)


def _channel_steps(layer: Layer) -> Tensor:
    """[channels]: the one-plane step that suits each output channel; the same for all where a channel is one weight."""
    channel_dim = layer.channel_dim if layer.allows_channel_scales else None
    return mse_step(layer.parameter.detach(), 1, channel_dim=channel_dim)


def _layer_scale(scales: Tensor) -> Tensor:
    """[1]: the scale that a layer's channels are measured by, the root of the mean of their squares; one scale is itself."""
    return scales if scales.numel() == 1 else scales.double().square().mean().sqrt().float().reshape(1)


def channel_ratios(scales: Tensor, layer: Layer) -> Tensor:
    """[channels]: each output channel's scale over :func:`_layer_scale`; ones for a layer that has a single scale."""
    channels = layer.parameter.shape[layer.channel_dim]
    return (scales.float() / _layer_scale(scales.float())).expand(channels).clone()


def auto_logit(plan: Plan, beta_final: float) -> float:
    """Where logits start: as far out as the schedule takes them in from scratch; 1 from weights that are to be kept."""
    if not plan.from_scratch:
        return 1.0
    return equations.plastic_logit(
        lr=2 * plan.mean_lr_share * plan.lr,  # the rule is for a cosine, whose mean is half its peak
        weight_decay=plan.weight_decay,
        momentum=plan.momentum,
        steps=plan.schedule.total_steps,
        beta_final=beta_final,
    )


def sgd_(value: Tensor, velocity: Tensor, gradient: Tensor, *, lr: float, momentum: float, weight_decay: float) -> None:
    """PyTorch's SGD update in place: v ← μv + (g + wd·x); x ← x − lr·v."""
    velocity.mul_(momentum).add_(gradient + weight_decay * value)
    value.sub_(velocity, alpha=lr)


def max_abs_scale(weight: Tensor) -> Tensor:
    """s = max |W| of a layer ([1]); 1 for an all-zero layer, whose integers are zero at any scale."""
    largest = weight.detach().abs().amax().reshape(1)
    return torch.where(largest > 0, largest, torch.ones_like(largest))
