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
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from csqcli.quant import budget, csq
from csqcli.quant.bitplanes import levels_of, nearest_level
from csqcli.quant.layers import Layer
from csqcli.quant.methods import Clock, HardLayer, WeightMethod, spread

_CHUNK = 2**17  # weights that `mse_step` passes over at a time on a CPU: half a MiB


def top_integer(planes: int) -> int:
    """2^k − 1: the largest integer of k planes."""
    return 2**planes - 1


def quantize(latent: Tensor, step: Tensor, planes: int) -> Tensor:
    """Integers (as float) nearest to latent/step within ±(2^k−1); ``step`` broadcasts over the weight."""
    top = top_integer(planes)
    return torch.round(latent / step).clamp_(-top, top)


def mse_step(weight: Tensor, planes: int, *, channel_dim: int | None, grid: int = 24, refits: int = 3) -> Tensor:
    """The step that minimises the squared rounding error of ±(2^k−1), [1] or [channels] along ``channel_dim``.

    A grid over fractions of the largest magnitude, then alternating refits (integers for the step, least-squares step
    for the integers). All-zero channels get step 1, where every integer is zero.
    """
    rows = weight.detach().reshape(1, -1) if channel_dim is None else weight.detach().movedim(channel_dim, 0).flatten(1)
    at_a_time = max(1, _CHUNK // rows.shape[1]) if rows.device.type == "cpu" else len(rows)
    return torch.cat([_row_steps(part, planes, grid, refits) for part in rows.split(at_a_time)])


def _row_steps(rows: Tensor, planes: int, grid: int, refits: int) -> Tensor:
    """`mse_step` of few enough rows ([channels, weights]) that the many passes over them stay in cache."""
    top = top_integer(planes)
    largest = rows.abs().amax(dim=1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest) * top)
    unit = power_of_two(largest)  # exact, and squares of the weights neither vanish nor overflow
    rows, largest = rows / unit, largest / unit
    sample = rows[:, :: max(1, rows.shape[1] // 2048)].contiguous()  # the grid needs no more than this per channel
    best = largest / top
    least = torch.full_like(best, float("inf"))
    rounded = torch.empty_like(sample)
    for fraction in torch.linspace(0.1, 1.0, grid).tolist():
        step = largest * (fraction / top)
        torch.div(sample, step, out=rounded).round_().clamp_(-top, top).mul_(step)
        error = rounded.sub_(sample).square_().sum(dim=1, keepdim=True)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    for _ in range(refits):
        integers = quantize(rows, best, planes)
        square = integers.square().sum(dim=1, keepdim=True)
        fitted = (rows * integers).sum(dim=1, keepdim=True) / square.clamp_min(1e-12)
        best = torch.where(square > 0, fitted, best)
    return (best * unit).clamp_min(torch.finfo(best.dtype).tiny).flatten()


def power_of_two(values: Tensor) -> Tensor:
    """The power of two below each positive value, within what divides without loss."""
    exponent = (torch.frexp(values).exponent - 1).clamp(-125, 125)
    return torch.ldexp(torch.ones_like(values), exponent)


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
        self.steps: list[Tensor] = []  # value of the lowest plane in use, per layer, once planes are fixed
        values = [layer.parameter.detach().clone() for layer in layers]
        if start is not None:
            self.masks = [hard.mask for hard in start]
            self.steps = [hard.scale.to(value) for hard, value in zip(start, values, strict=True)]
            values = [hard.weight().to(value) for hard, value in zip(start, values, strict=True)]
        # A latent's unit is its one-plane step: about the same number of standard deviations in every layer.
        self.units = [self._mse_step(value, layer, 1) for value, layer in zip(values, layers, strict=True)]
        rows = zip(values, self.units, layers, strict=True)
        self.latents = [nn.Parameter(value / spread(unit, value, layer.channel_dim)) for value, unit, layer in rows]
        betas = (0.9, settings.fisher_decay)
        self.adam = torch.optim.Adam(self.latents, lr=settings.latent_lr, betas=betas, eps=1e-12, foreach=False)
        self.soft_mask = torch.ones(len(layers), settings.max_bits)  # f_β(m): every plane until gradients say otherwise
        self.soft_steps: list[list[Tensor]] = []  # [layer][planes − 1], while the masks are soft
        if start is None:
            budget.check_feasible(settings.target_bits, self.weights, self.limits)
            widths = range(2, settings.max_bits + 1)
            self.soft_steps = [
                [unit, *(self._mse_step(value, layer, k) for k in widths)]
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
        for layer, latent, unit in zip(self.layers, self.latents, self.units, strict=True):
            gradient = layer.parameter.grad
            # in place: the weight's gradient is not needed again, and a copy would cost four bytes a weight
            latent.grad = None if gradient is None else gradient.mul_(spread(unit, gradient, layer.channel_dim))
        self.adam.param_groups[0]["lr"] = self.settings.latent_lr * lr_share**self.settings.latent_lr_power
        self.adam.step()
        for latent in self.latents:
            latent.grad = None
        if self.masks is not None:
            self._clip_latents()
        elif step + 1 >= self.search_steps:
            self._fix_planes()
        elif (step + 1) % self.refresh_every == 0:
            self.soft_mask = self._solve_masks(self.importance(), self.beta(step + 1))

    @torch.no_grad()
    def importance(self) -> Tensor:
        """[layers, bits]: ρ^b ½ Σ_i F_i ((V − Q_b)² − (V − Q_{b+1})²), the loss that plane b saves; falling with b.

        F is Adam's bias-corrected second moment of the latent's gradient. ρ (`recovery`) discounts finer planes: training
        at few planes wins part of their loss back. Float64, on the CPU.
        """
        error = torch.zeros(len(self.layers), self.settings.max_bits + 1, dtype=torch.float64)
        for index, (layer, latent, unit) in enumerate(zip(self.layers, self.latents, self.units, strict=True)):
            state = self.adam.state.get(latent, {})
            if not state:  # no gradient ever reached this layer
                continue
            fisher = state["exp_avg_sq"] / (1 - self.settings.fisher_decay ** float(state["step"]))
            wide = spread(unit, latent, layer.channel_dim)
            error[index, 0] = (fisher * latent.square()).sum()
            for k, step in enumerate(self.soft_steps[index], 1):
                rounding = latent - self._soft_level(index, k, step) / wide
                error[index, k] = (fisher * rounding.square_()).sum()
        saved = torch.cummin((error[:, :-1] - error[:, 1:]) / 2, dim=1).values.clamp_min(0)
        return saved * self.settings.recovery ** torch.arange(self.settings.max_bits, dtype=torch.float64)

    def _solve_masks(self, importance: Tensor, beta: float) -> Tensor:
        """Soft masks σ(β(log I − log λ)) with λ such that their mean over weight elements is the target."""
        weights = torch.tensor(self.weights, dtype=torch.float64).unsqueeze(1)
        logits = (importance / weights).clamp_min(1e-30).log()
        plane = torch.arange(self.settings.max_bits)
        always = plane < torch.tensor(self.limits.fewest).unsqueeze(1)
        never = plane >= torch.tensor(self.limits.most).unsqueeze(1)

        def masks(price: float) -> Tensor:
            return csq.gate(logits - price, beta).masked_fill(always, 1.0).masked_fill(never, 0.0)

        low, high = -100.0, 100.0  # log λ
        for _ in range(60):
            middle = (low + high) / 2
            mean = float((masks(middle) * weights).sum() / weights.sum())
            low, high = (middle, high) if mean > self.settings.target_bits else (low, middle)
        return masks(high).float()

    def _allocate(self) -> list[int]:
        return budget.allocate(self.importance(), self.weights, target=self.settings.target_bits, limits=self.limits)

    def _fix_planes(self) -> None:
        """End of stage 1: an exact knapsack on the importance, and each width's own step for the latents as they are."""
        planes = self._allocate()
        rows = zip(self.layers, self.latents, self.units, planes, strict=True)
        for layer, latent, unit, k in rows:
            value = latent.detach() * spread(unit, latent, layer.channel_dim)
            self.steps.append(self._mse_step(value, layer, max(k, 1)))
        self.masks = [top_planes(k, self.settings.max_bits) for k in planes]
        self.soft_steps = []
        self._clip_latents()

    def _clip_latents(self) -> None:
        """Keep latents inside the representable range, so that none drifts beyond reach of its gradient."""
        for index, latent in enumerate(self.latents):
            dim = self.layers[index].channel_dim
            top = float(self._levels(index)[-1])
            edge = spread(self.steps[index] / self.units[index], latent, dim) * top
            latent.data = torch.minimum(torch.maximum(latent.data, -edge), edge)

    def _levels(self, index: int) -> Tensor:
        """Integers that the layer's fixed mask can form, lowest plane in use = 1; ascending."""
        assert self.masks is not None
        on = torch.nonzero(self.masks[index]).flatten()
        return levels_of(self.masks[index][int(on[0]) :] if len(on) else self.masks[index][:0])

    def _ratio(self, index: int) -> Tensor:
        """A layer's latent in steps: where it stands between the integers."""
        latent = self.latents[index].detach()
        return latent / spread(self.steps[index] / self.units[index], latent, self.layers[index].channel_dim)

    def _staircase(self, index: int, sharpness: float) -> Tensor:
        """The soft integer: linear flanks of slope 1/(1 − sharpness) half way between neighbouring levels."""
        ratio, levels = self._ratio(index), self._levels(index).to(self.latents[index])
        if len(levels) == 1:
            return torch.zeros_like(ratio)
        if _without_holes(levels):
            low = ratio.floor().clamp_(float(levels[0]), float(levels[-2]))
            return low.add_((0.5 + (ratio - low - 0.5) / max(1 - sharpness, 1e-3)).clamp_(0, 1))
        upper = torch.bucketize(ratio, levels, right=True).clamp_(1, len(levels) - 1)
        low, high = levels[upper - 1], levels[upper]
        share = (ratio - low) / (high - low)
        return low + (0.5 + (share - 0.5) / max(1 - sharpness, 1e-3)).clamp_(0, 1) * (high - low)

    def _integers(self, index: int) -> Tensor:
        """Hard integers (as float) of a layer with a fixed mask."""
        ratio = self._ratio(index)
        levels = self._levels(index).to(ratio)
        if _without_holes(levels):
            return ratio.round_().clamp_(float(levels[0]), float(levels[-1]))
        return nearest_level(ratio, levels)

    def _soft_level(self, index: int, planes: int, step: Tensor) -> Tensor:
        """Q_k of the latent, as a weight."""
        latent, layer = self.latents[index].detach(), self.layers[index]
        wide = spread(step, latent, layer.channel_dim)
        return quantize(latent * spread(self.units[index], latent, layer.channel_dim), wide, planes) * wide

    @torch.no_grad()
    def materialise(self, step: int) -> None:
        for index, layer in enumerate(self.layers):
            if self.masks is not None:
                soft = step < self.soft_end
                sharpness = (step - self.search_steps) / max(self.soft_end - self.search_steps, 1)
                integers = self._staircase(index, sharpness) if soft else self._integers(index)
                layer.parameter.data.copy_(integers * spread(self.steps[index], layer.parameter, layer.channel_dim))
                continue
            gates = self.soft_mask[index].tolist()
            weight, before = torch.zeros_like(layer.parameter), torch.zeros_like(layer.parameter)
            for k, width in enumerate(self.soft_steps[index], 1):
                if max(gates[k - 1 :]) < 1e-4:  # finer planes are all off
                    break
                refined = self._soft_level(index, k, width)
                weight.add_(refined - before, alpha=gates[k - 1])
                before = refined
            layer.parameter.data.copy_(weight)

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
        for index, layer in enumerate(self.layers):
            scale = self.steps[index].detach().float().cpu()
            integers = self._integers(index).to(torch.int32).cpu()
            delivered.append(
                HardLayer(layer.name, integers, scale, self.masks[index], layer.channel_dim, layer.aliases)
            )
        return delivered

    def preview(self, step: int) -> list[HardLayer]:
        if self.masks is not None:
            return self.hard_layers()
        future = copy.copy(
            self
        )  # shares latents and Adam's state, which fixing the planes replaces but never writes to
        future.steps, future.latents = [], [nn.Parameter(latent.detach().clone()) for latent in self.latents]
        future.adam = copy.copy(self.adam)
        future.adam.state = defaultdict(dict)
        for new, old in zip(future.latents, self.latents, strict=True):
            future.adam.state[new] = self.adam.state.get(old, {})
        with torch.no_grad():
            future._fix_planes()
        return future.hard_layers()

    def mean_bits(self) -> float:
        if self.masks is not None:
            return budget.mean_planes([int(mask.sum()) for mask in self.masks], self.weights)
        per_layer = self.soft_mask.double().sum(dim=1)
        return float((per_layer * torch.tensor(self.weights)).sum()) / sum(self.weights)

    def monitor(self, step: int) -> dict[str, float]:
        mean = self.mean_bits()
        beta = self.beta(step) if self.masks is None else self.settings.beta_final
        return {"beta": beta, "mean_bits": mean, "budget_gap": mean - self.settings.target_bits, "reg_loss": 0.0}

    def state_dict(self) -> dict[str, Any]:
        return {
            "latents": [latent.data for latent in self.latents],
            "adam": self.adam.state_dict(),
            "units": self.units,
            "masks": self.masks,
            "steps": self.steps,
            "soft_mask": self.soft_mask,
            "soft_steps": self.soft_steps,
            "soft_end": self.soft_end,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.latents[0].device
        for latent, saved in zip(self.latents, state["latents"], strict=True):
            latent.data.copy_(saved)
        self.adam.load_state_dict(state["adam"])
        self.units = [unit.to(device) for unit in state["units"]]
        self.masks, self.soft_mask, self.soft_end = state["masks"], state["soft_mask"], state["soft_end"]
        self.steps = [step.to(device) for step in state["steps"]]
        self.soft_steps = [[step.to(device) for step in widths] for widths in state["soft_steps"]]

    def _mse_step(self, value: Tensor, layer: Layer, planes: int) -> Tensor:
        shared = not self.settings.per_channel or layer.weights == value.shape[layer.channel_dim]
        return mse_step(value, planes, channel_dim=None if shared else layer.channel_dim)  # never a step per weight


def _without_holes(levels: Tensor) -> bool:
    """Whether the levels are all integers between their ends, so that rounding finds the nearest."""
    return len(levels) == 2 * float(levels[-1]) + 1


def top_planes(planes: int, bits: int) -> Tensor:
    """The mask of ``planes`` contiguous planes at the top of ``bits``: "11100000"."""
    return torch.arange(bits) >= bits - planes
