"""The two-stage method: how many planes first, which integers after; one latent float per weight.

Stage 1 (the first `search_share` of the steps) is `quant.masks`: each layer's weight is a sum of refinement planes under a
soft mask whose mean is the target. Then the planes are fixed by an exact knapsack on the same importance.

Stage 2 (the rest). The integers are trained at one scale per output channel, which begins at its MSE-optimal value. Until
`soft_share` of all steps, a weight stands on a soft staircase whose flanks steepen from slope 1 (no rounding) to vertical (the
proximal map of PARQ, Jin et al. 2025); from then on every forward weight is hard, so soft = hard at the end. Gradients go straight
through the staircase to the latent; Adam moves latents in units of the layer's one-plane scale, so that every weight moves by a
comparable part of its layer's spread. A scale learns what its levels weigh, not where among the latents they lie, so that it
moves no weight to another level. No bit has a gate of its own here: that is the paper's method, `csq`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from csqcli.quant import equations
from csqcli.quant.hard_layer import HardLayer, top_planes
from csqcli.quant.layers import Layer
from csqcli.quant.masks import SoftMasks
from csqcli.quant.method_settings import StagedSettings
from csqcli.quant.methods.base import Plan, WeightMethod
from csqcli.quant.passes.adam import LatentAdam
from csqcli.quant.passes.rounding import Staircase, levels_of, mse_step, quantize
from csqcli.quant.passes.state import parts_of

_EXP_AVG_DECAY = 0.9  # Adam's β1


class Staged(WeightMethod):
    """Soft masks under an exact budget first, then hard integers at the planes found. For short schedules."""

    name = "staged"
    takes = "either"
    Settings = StagedSettings
    finetunes = True
    settings: StagedSettings

    def __init__(self, layers: Sequence[Layer], plan: Plan, settings: StagedSettings | None = None) -> None:
        """``plan.start``: delivered layers whose integers are trained on; ``plan.planes``: planes already decided; with
        neither, planes are searched from the model's weights."""
        super().__init__(layers, plan, settings)
        settings, self.budget = self.settings, plan.budget
        total = self.schedule.total_steps
        self.bits = len(self.budget.table[0]) - 1
        self.soft_end = round(settings.soft_share * total)
        searching = plan.start is None and plan.planes is None and self.budget.has_choice()
        self.search_steps = max(1, round(settings.search_share * total)) if searching else 0
        self.refresh_every = max(1, min(settings.refresh_every, self.search_steps // 10))
        self.search: SoftMasks | None = None  # stage 1; None once the planes are fixed
        self.masks: list[Tensor] = []  # bool [bits] per layer, once planes are fixed
        self.stairs: list[Staircase] = []  # once planes are fixed
        # float32 whatever the model's weights are
        values = [layer.by_channel(layer.flat(layer.parameter.detach())).float() for layer in layers]
        if plan.start is not None:
            delivered = zip(layers, plan.start, values, strict=True)
            values = [layer.by_channel(layer.flat(hard.weight().to(value))) for layer, hard, value in delivered]
        # A latent's unit is its one-plane scale: about the same number of standard deviations in every layer.
        self.units = [self._mse_scale(value, layer, 1) for value, layer in zip(values, layers, strict=True)]
        self.latents = [value / unit for value, unit in zip(values, self.units, strict=True)]
        if plan.start is not None and isinstance(plan.searched, Staged):
            # as the search left them: where they stand between two levels is in no file
            self.units = list(plan.searched.units)
            self.latents = [latent.clone() for latent in plan.searched.latents]
        self.adam = LatentAdam(
            self.latents, beta1=_EXP_AVG_DECAY, beta2=settings.fisher_decay, state_dtype=plan.state_dtype
        )
        device = self.latents[0].device
        self.scale_adam: LatentAdam | None = None
        if settings.scale_lr:
            # one after the other, as many as the layers will have scales: one update for all
            own = self.units if plan.start is None else [hard.scale.view(-1, 1).to(device) for hard in plan.start]
            every = torch.cat(own).float().view(1, -1, 1)
            self.scale_adam = LatentAdam([every], beta1=_EXP_AVG_DECAY, beta2=0.99, state_dtype=torch.float32)
        if plan.start is not None:
            scales = [hard.scale.view(-1, 1).to(device) for hard in plan.start]
            widths = [stairs.width for stairs in plan.searched.stairs] if isinstance(plan.searched, Staged) else None
            self._set_planes([hard.mask for hard in plan.start], scales, widths)
        elif plan.planes is not None:
            self._fix_planes(plan.planes)
        else:
            self.budget.check_feasible()
            wider = range(2, self.bits + 1)
            scales = [
                torch.stack([unit, *(self._mse_scale(value, layer, k) for k in wider)])
                for value, layer, unit in zip(values, layers, self.units, strict=True)
            ]
            self.search = SoftMasks(self.budget, self.units, scales, recovery=settings.recovery)
            if not searching:
                self._fix_planes(self.search.allocate(self.latents, self.adam))
        self.materialise(0)

    @classmethod
    def state_bytes(cls, settings: Any, *, max_bits: int, state_dtype: torch.dtype) -> int:
        return 4 + 2 * state_dtype.itemsize  # a latent and Adam's two moments

    @classmethod
    def trained_values(cls, *, max_bits: int) -> int:
        return 0

    def beta(self, step: int) -> float:
        """Temperature of the soft masks; its final value once the planes are fixed."""
        settings = self.settings
        if self.search is None:
            return settings.beta_final
        progress = step / max(self.search_steps, 1)
        return equations.temperature(progress, initial=settings.beta_initial, final=settings.beta_final)

    @torch.no_grad()
    def collect(self, step: int, *, lr: float, lr_share: float) -> None:
        gradients = [
            None if (gradient := layer.parameter.grad) is None else layer.by_channel(layer.flat(gradient))
            for layer in self.layers
        ]
        # latents stay inside the representable range, so that none drifts beyond reach of its gradient
        edges = [stairs.edge for stairs in self.stairs] if self.search is None else None
        rate = self.settings.latent_lr * self.plan.rate_share * lr_share**self.settings.latent_lr_power
        self.adam.step(self.latents, gradients, units=self.units, edges=edges, lr=rate, seed=step)
        if self.search is None:
            self._learn_scales(gradients, lr_share)
            return
        if step + 1 >= self.search_steps:
            self._fix_planes(self.search.allocate(self.latents, self.adam))
        elif (step + 1) % self.refresh_every == 0:
            self.search.refresh(self.latents, self.adam, self.beta(step + 1))

    def _learn_scales(self, gradients: Sequence[Tensor | None], lr_share: float) -> None:
        """A step on the logarithms of scales, by dL/d log s = Σ W dL/dW over what has the scale. Latents keep their levels."""
        if self.scale_adam is None:
            return
        slopes = []
        counts = [len(stairs.scale) for stairs in self.stairs]
        for layer, gradient, count in zip(self.layers, gradients, counts, strict=True):
            slope = torch.zeros(layer.parameter.shape[layer.channel_dim], device=layer.parameter.device)
            if gradient is not None:
                weight = layer.by_channel(layer.flat(layer.parameter.detach()))
                for part in parts_of(weight):  # products stay in cache
                    slope[part[1]] += (weight[part].float() * gradient[part]).sum(dim=(0, 2))
            slopes.append(slope if count > 1 else slope.sum().view(1))
        slope = torch.cat(slopes).view(1, -1, 1)
        moves, ones = torch.zeros_like(slope), torch.ones_like(slope).view(-1, 1)
        rate = self.settings.scale_lr * self.plan.rate_share * lr_share
        self.scale_adam.step([moves], [slope], units=[ones], edges=None, lr=rate, seed=0)
        factors = moves.exp().view(-1, 1).split(counts)
        self.units = [unit * factor for unit, factor in zip(self.units, factors, strict=True)]
        self.stairs = [
            replace(stairs, scale=stairs.scale * factor) for stairs, factor in zip(self.stairs, factors, strict=True)
        ]

    def _fix_planes(self, planes: Sequence[int]) -> None:
        """End of stage 1: each width's own scale for the latents as they are."""
        rows = zip(self.layers, self.latents, self.units, planes, strict=True)
        scales = [self._level_scale(latent * unit, layer, k) for layer, latent, unit, k in rows]
        self._set_planes([top_planes(k, self.bits) for k in planes], scales)
        self.search = None
        for latent, stairs in zip(self.latents, self.stairs, strict=True):
            latent.clamp_(-stairs.edge, stairs.edge)

    def _set_planes(
        self, masks: Sequence[Tensor], scales: Sequence[Tensor], widths: Sequence[Tensor] | None = None
    ) -> None:
        """``masks``: bool [bits] per layer; ``scales``: [channels, 1] or [1, 1], the weight of the lowest plane in use;
        ``widths``: the same in units of the latents, scale / unit if unset."""
        if widths is None:
            widths = [scale / unit for scale, unit in zip(scales, self.units, strict=True)]
        self.masks = list(masks)
        self.stairs = [
            Staircase(scale, width, levels_of(mask[int(mask.int().argmax()) :]))
            for mask, scale, width in zip(masks, scales, widths, strict=True)
        ]

    @torch.no_grad()
    def materialise(self, step: int) -> None:
        if self.search is not None:
            self.search.materialise(self.layers, self.latents)
            return
        soft = step < self.soft_end
        sharpness = (step - self.search_steps) / max(self.soft_end - self.search_steps, 1) if soft else None
        for layer, latent, stairs in zip(self.layers, self.latents, self.stairs, strict=True):
            with layer.writing() as flat:
                stairs.write(latent, layer.by_channel(flat), sharpness=sharpness)

    @torch.no_grad()
    def harden(self, step: int) -> None:
        if self.search is not None:
            self._fix_planes(self.search.allocate(self.latents, self.adam))
        self.soft_end = 0
        self.materialise(step)

    @torch.no_grad()
    def hard_layers(self) -> list[HardLayer]:
        assert self.search is None, "harden() first"
        delivered = []
        for layer, latent, stairs, mask in zip(self.layers, self.latents, self.stairs, self.masks, strict=True):
            integers = layer.unflatten(stairs.integers(latent).to(torch.int32).flatten()).cpu()
            scale = stairs.scale.flatten().cpu()
            delivered.append(HardLayer(layer.name, integers, scale, mask, layer.channel_dim, layer.aliases))
        return delivered

    @torch.no_grad()
    def savings_now(self) -> Tensor:
        """[layers, bits] float64, on the CPU: what each plane of the latents as they are saves; see `quant.masks`."""
        rows = zip(self.layers, self.latents, self.units, strict=True)
        widths = range(1, self.bits + 1)
        scales = [
            torch.stack([self._mse_scale(latent * unit, layer, k) for k in widths]) for layer, latent, unit in rows
        ]
        masks = SoftMasks(self.budget, self.units, scales, recovery=self.settings.recovery)
        return masks.importance(self.latents, self.adam).cpu()

    @torch.no_grad()
    def integers_at(self, index: int, planes: int) -> Tensor:
        """Integers of a layer's latents at so many planes: at the scale in use, or for another number of planes at its own."""
        if planes == int(self.masks[index].sum()):
            return self.stairs[index].integers(self.latents[index])
        value = self.latents[index] * self.units[index]
        return quantize(value, self._level_scale(value, self.layers[index], planes), planes)

    @torch.no_grad()
    def change_planes(self, planes: Sequence[int], step: int) -> None:
        """Other planes for latents that train on; a layer that keeps its number keeps its scale."""
        scales, widths = [], []
        for index, count in enumerate(planes):
            stairs, unit = self.stairs[index], self.units[index]
            kept = count == int(self.masks[index].sum())
            scale = stairs.scale if kept else self._level_scale(self.latents[index] * unit, self.layers[index], count)
            scales.append(scale)
            widths.append(stairs.width if kept else scale / unit)
        self._set_planes([top_planes(count, self.bits) for count in planes], scales, widths)
        for latent, stairs in zip(self.latents, self.stairs, strict=True):
            latent.clamp_(-stairs.edge, stairs.edge)
        self.materialise(step)

    @torch.no_grad()
    def shrink(self, latents: Sequence[Tensor], share: float, step: int) -> None:
        """Put ``latents`` in, each nearer to 0 by ``share`` of a level: those just above a level's edge fall below it."""
        for own, latent, stairs in zip(self.latents, latents, self.stairs, strict=True):
            own.copy_(latent.sign() * (latent.abs() - share * stairs.width).clamp_min(0))
        self.materialise(step)

    def unrounded(self) -> list[Tensor]:
        rows = zip(self.layers, self.latents, self.units, strict=True)
        return [layer.unflatten((latent * unit).flatten()) for layer, latent, unit in rows]

    def fixed_planes(self) -> list[int] | None:
        return [int(mask.sum()) for mask in self.masks] if self.search is None else None

    def mean_bits(self) -> float:
        """Mean planes over elements: of the soft masks in stage 1, of the fixed ones after."""
        if self.search is not None:
            return self.search.mean_planes()
        return self.budget.mean_planes([int(mask.sum()) for mask in self.masks])

    def monitor(self, step: int) -> dict[str, Any]:
        mean = self.mean_bits()
        gap = mean - self.budget.target
        numbers = {"beta": self.beta(step), "mean_bits": mean, "budget_gap": gap, "reg_loss": 0.0}
        fixed = [] if self.search is not None else [equations.mask_string(mask) for mask in self.masks]
        return numbers | {"masks": fixed} if fixed else numbers

    def state_dict(self) -> dict[str, Any]:
        return {
            "orders": [list(layer.memory_order) for layer in self.layers],
            "latents": self.latents,
            "adam": self.adam.state_dict(),
            "scale_adam": None if self.scale_adam is None else self.scale_adam.state_dict(),
            "units": self.units,
            "search": None if self.search is None else self.search.state_dict(),
            "masks": self.masks,
            "scales": [stairs.scale for stairs in self.stairs],
            "widths": [stairs.width for stairs in self.stairs],
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
        self.adam.load_state_dict(adam | {name: own(adam[name]) for name in ("exp_avg", "exp_avg_sq")})
        if self.scale_adam is not None:
            self.scale_adam.load_state_dict(state["scale_adam"])
        self.units = [unit.to(device) for unit in state["units"]]
        self.soft_end = state["soft_end"]
        if state["search"] is None:
            self.search = None
            widths = state.get("widths")  # states of csq 0.2, whose scales stood still, have none
            self._set_planes(
                state["masks"],
                [scale.to(device) for scale in state["scales"]],
                None if widths is None else [width.to(device) for width in widths],
            )
        else:
            # planes may have been fixed since, where a run goes back to an earlier state
            self.search = SoftMasks(self.budget, self.units, state["search"]["scales"], recovery=self.settings.recovery)
            self.search.load_state_dict(state["search"], self.units)
            self.masks, self.stairs = [], []

    def _level_scale(self, value: Tensor, layer: Layer, planes: int) -> Tensor:
        """The distance of levels that are trained, shaped as :meth:`_mse_scale`'s."""
        return self.settings.step_factor * self._mse_scale(value, layer, max(planes, 1))

    def _mse_scale(self, value: Tensor, layer: Layer, planes: int) -> Tensor:
        """[channels, 1] or [1, 1] for a value of shape [outer, channels, inner]."""
        by_channel = self.settings.per_channel and layer.allows_channel_scales
        return mse_step(value, planes, channel_dim=1 if by_channel else None).view(-1, 1)
