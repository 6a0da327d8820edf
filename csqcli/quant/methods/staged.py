"""Methods that keep one latent float per weight: the uniform yardsticks, and the two-stage CSQ that is the default.

`LatentUniform` is quantization-aware training as everybody does it (straight-through gradients, every layer the same
planes). `StagedCSQ` searches with soft masks first and trains integers after:

Stage 1 (the first `search_share` of the steps). Each layer's weight is a sum of refinement planes under a soft mask,

    W = Σ_b f_β(m_b) (Q_{b+1}(V) − Q_b(V)),   Q_0 = 0,

where Q_k rounds the latent V to k planes at that width's MSE-optimal step. This is Eq. 5 with digits taken from the
latent instead of from 2n logits per weight. The mask logit of plane b is its importance against a price,

    m_b = log I_b − log λ,   I_b = ρ^b ½ Σ_i F_i ((V − Q_b)² − (V − Q_{b+1})²) / weights,   F = running mean of (dL/dW)²,

the loss that the plane saves per bit of budget (diagonal Fisher). λ is solved so that the mean of the soft masks over
weight elements is the target at every refresh: Δ_S of Eq. 7 is zero by construction, and nothing swings. β grows from
`beta_initial` to `beta_final` as in Algorithm 1, so masks go from nearly flat to nearly binary.

Stage 2 (the rest). The planes are fixed by an exact knapsack on the same importance, at or under the budget, and the
integers are trained at one step per output channel, fixed at its MSE-optimal value. Until `soft_share` of all steps, a
weight stands on a soft staircase whose flanks steepen from slope 1 (no rounding) to vertical; from then on every forward
weight is hard, so soft = hard at the end. Gradients go straight through the staircase to the latent; Adam moves latents in
units of the layer's one-plane step, so that every weight moves by a comparable part of its layer's spread.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from csqcli.quant import budget
from csqcli.quant import equations as csq
from csqcli.quant.layers import Layer
from csqcli.quant.methods.base import Clock, HardLayer, WeightMethod
from csqcli.quant.passes.adam import LatentAdam
from csqcli.quant.passes.rounding import (
    Staircase,
    levels_of,
    mse_step,
    plane_errors,
    plane_shares,
    quantize,
    soft_planes,
    top_integer,
)


class LatentUniform(WeightMethod):
    """Quantization-aware training at given planes: ``ste`` (fixed step) or ``lsq`` (Esser et al. 2020, learned step).

    The step of a layer starts at 2·mean|W|/√(2^k−1). The base optimizer trains the latents (and LSQ's steps);
    straight-through gradients vanish where a latent lies outside ±(2^k−1) steps.
    """

    def __init__(self, layers: Sequence[Layer], clock: Clock, *, planes: Sequence[int], learned_step: bool) -> None:
        """``planes``: k of every layer, in order; at least 1."""
        super().__init__(layers, clock)
        self.planes, self.learned_step = list(planes), learned_step
        self.latents = [nn.Parameter(layer.parameter.detach().clone()) for layer in layers]
        self.steps, self.least_steps = [], []
        for latent, k in zip(self.latents, planes, strict=True):
            mean = latent.detach().abs().mean()
            start = 2 * torch.where(mean > 0, mean, 1e-8) / top_integer(k) ** 0.5
            self.steps.append(nn.Parameter(start.reshape(1), requires_grad=learned_step))
            self.least_steps.append(min(1e-8, float(start) / 1000))
        self.materialise(0)

    def parameter_groups(self) -> list[dict[str, Any]]:
        steps = [{"params": self.steps, "weight_decay": 0.0}] if self.learned_step else []
        return [{"params": self.latents}, *steps]

    @torch.no_grad()
    def collect(self, step: int, *, lr: float, lr_share: float) -> None:
        for layer, latent, size, k in self._rows():
            gradient = layer.parameter.grad
            if gradient is None:
                latent.grad = size.grad = None
                continue
            top = top_integer(k)
            ratio = latent / size
            inside = ratio.abs() <= top
            latent.grad = gradient * inside
            if self.learned_step:  # LSQ Eq. 3, with its gradient scale 1/√(N·top)
                slope = torch.where(inside, ratio.round() - ratio, ratio.sign() * top)
                size.grad = ((gradient * slope).sum() / (latent.numel() * top) ** 0.5).reshape(1)

    @torch.no_grad()
    def materialise(self, step: int) -> None:
        for (layer, latent, size, k), least in zip(self._rows(), self.least_steps, strict=True):
            size.data.clamp_(min=least)
            layer.parameter.data.copy_(quantize(latent, size, k) * size)

    @torch.no_grad()
    def hard_layers(self) -> list[HardLayer]:
        bits = max(self.planes)
        return [
            HardLayer(
                layer.name,
                quantize(latent, size, k).to(torch.int32).cpu(),
                size.detach().float().cpu(),
                top_planes(k, bits),
                layer.channel_dim,
                layer.aliases,
            )
            for layer, latent, size, k in self._rows()
        ]

    def preview(self, step: int) -> list[HardLayer]:
        return self.hard_layers()

    def monitor(self, step: int) -> dict[str, float]:
        return {
            "mean_bits": budget.mean_planes(self.planes, [layer.weights for layer in self.layers]),
            "budget_gap": 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"latents": [v.data for v in self.latents], "steps": [s.data for s in self.steps]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for own, saved in zip([*self.latents, *self.steps], [*state["latents"], *state["steps"]], strict=True):
            own.data.copy_(saved)

    def _rows(self) -> Iterator[tuple[Layer, nn.Parameter, nn.Parameter, int]]:
        return zip(self.layers, self.latents, self.steps, self.planes, strict=True)


@dataclass(frozen=True)
class StagedSettings:
    """Knobs of the two-stage CSQ. See the module's page for what they do and docs/method.md for how they were chosen."""

    target_bits: float
    max_bits: int = 8
    search_share: float = 0.1
    soft_share: float = 0.5
    beta_initial: float = 1.0
    beta_final: float = 20.0
    latent_lr: float = 0.01  # Adam's step, in units of the layer's one-plane step, at the peak of the schedule
    latent_lr_power: float = 2.0  # the latents' rate is latent_lr · (share of the peak rate)^power
    fisher_decay: float = 0.99  # Adam's β2: the memory of F
    refresh_every: int = 10  # steps between two looks at the importance
    recovery: float = 0.25  # share of a plane's importance that training does not win back by itself, per plane below
    per_channel: bool = True
    limits: budget.PlaneLimits | None = None
    state_dtype: torch.dtype = torch.float32  # of Adam's moments; bfloat16 takes half the memory


class StagedCSQ(WeightMethod):
    """CSQ for short schedules: soft masks under an exact budget first, then hard integers at the planes found."""

    def __init__(
        self,
        layers: Sequence[Layer],
        clock: Clock,
        settings: StagedSettings,
        *,
        start: Sequence[HardLayer] | None = None,
    ) -> None:
        """``start``: delivered layers whose integers are trained on, masks fixed; None searches from the model's weights."""
        super().__init__(layers, clock)
        self.settings, self.target_bits = settings, settings.target_bits
        self.weights = [layer.weights for layer in layers]
        self.limits = settings.limits or budget.plane_limits(layers, bits=settings.max_bits)
        self.soft_end = round(settings.soft_share * clock.total_steps)
        searching = start is None and self._has_choice()
        self.search_steps = max(1, round(settings.search_share * clock.total_steps)) if searching else 0
        self.refresh_every = max(1, min(settings.refresh_every, self.search_steps // 10))
        self.masks: list[Tensor] | None = None  # bool [bits] per layer, once planes are fixed
        self.stairs: list[Staircase] = []  # once planes are fixed
        # float32 whatever the model's weights are
        values = [layer.by_channel(layer.flat(layer.parameter.detach())).float() for layer in layers]
        if start is not None:
            delivered = zip(layers, start, values, strict=True)
            values = [layer.by_channel(layer.flat(hard.weight().to(value))) for layer, hard, value in delivered]
        # A latent's unit is its one-plane step: about the same number of standard deviations in every layer.
        self.units = [self._mse_step(value, layer, 1) for value, layer in zip(values, layers, strict=True)]
        self.latents = [value / unit for value, unit in zip(values, self.units, strict=True)]
        beta1, beta2 = 0.9, settings.fisher_decay
        self.adam = LatentAdam(self.latents, beta1=beta1, beta2=beta2, state_dtype=settings.state_dtype)
        device = self.latents[0].device
        # f_β(m) [layers, bits]: every plane until gradients say otherwise
        self.soft_mask = torch.ones(len(layers), settings.max_bits, device=device)
        self.soft_steps: list[Tensor] = []  # [bits, channels or 1, 1] per layer, while the masks are soft
        fewest, most = torch.tensor([self.limits.fewest, self.limits.most]).unsqueeze(2)  # [layers, 1]
        plane = torch.arange(settings.max_bits)
        weights = torch.tensor(self.weights, dtype=torch.float64).unsqueeze(1)
        rules = weights, plane < fewest, plane >= most  # planes that are always, and never, in use
        self.rules = [part.to(device) for part in rules]
        if start is not None:
            self._set_planes([hard.mask for hard in start], [hard.scale.view(-1, 1).to(device) for hard in start])
        else:
            budget.check_feasible(settings.target_bits, self.weights, self.limits)
            widths = range(2, settings.max_bits + 1)
            self.soft_steps = [
                torch.stack([unit, *(self._mse_step(value, layer, k) for k in widths)])
                for value, layer, unit in zip(values, layers, self.units, strict=True)
            ]
            if not searching:
                self._fix_planes()
        self.materialise(0)

    def _has_choice(self) -> bool:
        """Whether the budget and the rules leave anything to search: room for one plane beyond the fewest allowed."""
        least = sum(few * w for few, w in zip(self.limits.fewest, self.weights, strict=True))
        rows = zip(self.limits.fewest, self.limits.most, self.weights, strict=True)
        growable = [weight for few, most, weight in rows if few < most]
        return bool(growable) and least + min(growable) <= self.settings.target_bits * sum(self.weights) + 1e-6

    def beta(self, step: int) -> float:
        settings = self.settings
        return csq.temperature(
            step / max(self.search_steps, 1), initial=settings.beta_initial, final=settings.beta_final
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        return []

    @torch.no_grad()
    def collect(self, step: int, *, lr: float, lr_share: float) -> None:
        gradients = [
            None if (gradient := layer.parameter.grad) is None else layer.by_channel(layer.flat(gradient))
            for layer in self.layers
        ]
        # latents stay inside the representable range, so that none drifts beyond reach of its gradient
        edges = [stairs.edge for stairs in self.stairs] if self.masks is not None else None
        rate = self.settings.latent_lr * lr_share**self.settings.latent_lr_power
        self.adam.step(self.latents, gradients, units=self.units, edges=edges, lr=rate, seed=step)
        if self.masks is not None:
            return
        if step + 1 >= self.search_steps:
            self._fix_planes()
        elif (step + 1) % self.refresh_every == 0:
            self.soft_mask = self._solve_masks(self.importance(), self.beta(step + 1))

    @torch.no_grad()
    def importance(self) -> Tensor:
        """[layers, bits]: ρ^b ½ Σ_i F_i ((V − Q_b)² − (V − Q_{b+1})²), the loss that plane b saves; falling with b.

        F is Adam's bias-corrected second moment of the latent's gradient. ρ (`recovery`) discounts finer planes: training
        at few planes wins part of their loss back. Float64, on the latents' device.
        """
        bits, device = self.settings.max_bits, self.latents[0].device
        errors = torch.zeros(len(self.layers), bits + 1, dtype=torch.float64, device=device)
        rows = zip(self.latents, self.units, self.soft_steps, strict=True)
        for index, (latent, unit, steps) in enumerate(rows):
            fisher = self.adam.second_moment(index)
            if fisher is not None:
                errors[index] = plane_errors(latent, unit=unit, steps=steps, fisher=fisher)
        saved = torch.cummin((errors[:, :-1] - errors[:, 1:]) / 2, dim=1).values.clamp_min(0)
        return saved * self.settings.recovery ** torch.arange(bits, dtype=torch.float64, device=device)

    def _solve_masks(self, importance: Tensor, beta: float) -> Tensor:
        """Soft masks σ(β(log I − log λ)) with λ such that their mean over weight elements is the target."""
        weights, always, never = self.rules
        logits = (importance / weights).clamp_min(1e-30).log()

        def masks(price: Tensor) -> Tensor:
            return csq.gate(logits - price, beta).masked_fill(always, 1.0).masked_fill(never, 0.0)

        low = torch.full_like(weights[0], -100.0)  # log λ; all on the device: a training step never waits for the host
        high = -low
        for _ in range(60):
            middle = (low + high) / 2
            over = (masks(middle) * weights).sum() / weights.sum() > self.settings.target_bits
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        return masks(high).float()

    def _allocate(self) -> list[int]:
        importance = self.importance().cpu()
        return budget.allocate(importance, self.weights, target=self.settings.target_bits, limits=self.limits)

    def _fix_planes(self) -> None:
        """End of stage 1: an exact knapsack on the importance, and each width's own step for the latents as they are."""
        planes = self._allocate()
        rows = zip(self.layers, self.latents, self.units, planes, strict=True)
        steps = [self._mse_step(latent * unit, layer, max(k, 1)) for layer, latent, unit, k in rows]
        self._set_planes([top_planes(k, self.settings.max_bits) for k in planes], steps)
        self.soft_steps = []
        for latent, stairs in zip(self.latents, self.stairs, strict=True):
            latent.clamp_(-stairs.edge, stairs.edge)

    def _set_planes(self, masks: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
        """``masks``: bool [bits] per layer; ``steps``: [channels, 1] or [1, 1], the weight of the lowest plane in use."""
        self.masks = list(masks)
        self.stairs = [
            Staircase(step, step / unit, levels_of(mask[int(mask.int().argmax()) :]))
            for mask, step, unit in zip(masks, steps, self.units, strict=True)
        ]

    @torch.no_grad()
    def materialise(self, step: int) -> None:
        soft = step < self.soft_end
        sharpness = (step - self.search_steps) / max(self.soft_end - self.search_steps, 1) if soft else None
        shares = plane_shares(self.soft_mask) if self.masks is None else self.soft_mask
        for index, (layer, latent) in enumerate(zip(self.layers, self.latents, strict=True)):
            with layer.writing() as flat:
                weight = layer.by_channel(flat)
                if self.masks is not None:
                    self.stairs[index].write(latent, weight, sharpness=sharpness)
                else:
                    unit, steps = self.units[index], self.soft_steps[index]
                    soft_planes(latent, weight, unit=unit, steps=steps, shares=shares[index])

    @torch.no_grad()
    def harden(self, step: int) -> None:
        if self.masks is None:
            self._fix_planes()
        self.soft_end = 0
        self.materialise(step)

    @torch.no_grad()
    def hard_layers(self) -> list[HardLayer]:
        assert self.masks is not None, "harden() first"
        delivered = []
        for layer, latent, stairs, mask in zip(self.layers, self.latents, self.stairs, self.masks, strict=True):
            integers = layer.unflatten(stairs.integers(latent).to(torch.int32).flatten()).cpu()
            scale = stairs.step.flatten().cpu()
            delivered.append(HardLayer(layer.name, integers, scale, mask, layer.channel_dim, layer.aliases))
        return delivered

    def preview(self, step: int) -> list[HardLayer]:
        if self.masks is not None:
            return self.hard_layers()
        future = copy.copy(self)  # shares Adam's state, which fixing the planes only reads
        future.latents = [latent.clone() for latent in self.latents]
        with torch.no_grad():
            future._fix_planes()
        return future.hard_layers()

    def mean_bits(self) -> float:
        if self.masks is not None:
            return budget.mean_planes([int(mask.sum()) for mask in self.masks], self.weights)
        per_layer = self.soft_mask.double().sum(dim=1).cpu()
        return float((per_layer * torch.tensor(self.weights)).sum()) / sum(self.weights)

    def monitor(self, step: int) -> dict[str, float]:
        mean = self.mean_bits()
        beta = self.beta(step) if self.masks is None else self.settings.beta_final
        return {"beta": beta, "mean_bits": mean, "budget_gap": mean - self.settings.target_bits, "reg_loss": 0.0}

    def state_dict(self) -> dict[str, Any]:
        return {
            "orders": [list(layer.memory_order) for layer in self.layers],
            "latents": self.latents,
            "adam": self.adam.state_dict(),
            "units": self.units,
            "masks": self.masks,
            "steps": [stairs.step for stairs in self.stairs],
            "soft_mask": self.soft_mask,
            "soft_steps": self.soft_steps,
            "soft_end": self.soft_end,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.latents[0].device

        def own(saved: list[Tensor]) -> list[Tensor]:  # the model may lie in another memory format than then
            rows = zip(self.layers, saved, state["orders"], strict=True)
            return [layer.by_channel(layer.reordered(value.flatten(), order)) for layer, value, order in rows]

        for latent, saved in zip(self.latents, own(state["latents"]), strict=True):
            latent.copy_(saved)
        adam = state["adam"]
        self.adam.load_state_dict(adam | {name: own(adam[name]) for name in ("first", "second")})
        self.units = [unit.to(device) for unit in state["units"]]
        self.soft_mask, self.soft_end = state["soft_mask"].to(device), state["soft_end"]
        self.soft_steps = [steps.to(device) for steps in state["soft_steps"]]
        self.masks, self.stairs = None, []
        if state["masks"] is not None:
            self._set_planes(state["masks"], [step.to(device) for step in state["steps"]])

    def _mse_step(self, value: Tensor, layer: Layer, planes: int) -> Tensor:
        """[channels, 1] or [1, 1] for a value of shape [outer, channels, inner]."""
        shared = not self.settings.per_channel or layer.weights == value.shape[1]  # never a step per weight
        return mse_step(value, planes, channel_dim=None if shared else 1).view(-1, 1)


def top_planes(planes: int, bits: int) -> Tensor:
    """The mask of ``planes`` contiguous planes at the top of ``bits``: "11100000"."""
    return torch.arange(bits) >= bits - planes
