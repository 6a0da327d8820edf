"""BSQ: bit planes as continuous variables under a group lasso that empties whole planes.

Yang, Duan, Chen and Li, BSQ: Exploring Bit-Level Sparsity for Mixed-Precision Neural Network Quantization, ICLR 2021
(arXiv 2102.10462). csq is its successor: there gates make bits soft, here rounding does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from csqcli.quant.hard_layer import HardLayer, hard_layer
from csqcli.quant.hardening import reduce_to_budget
from csqcli.quant.layers import Layer
from csqcli.quant.method_settings import BSQSettings
from csqcli.quant.methods.base import Plan, WeightMethod
from csqcli.quant.methods.latents import SMALLEST
from csqcli.quant.passes.rounding import mse_step, quantize

_FISHER_DECAY = 0.99
_MOST = 2.0  # that a plane's bit may grow to, so that a weight can move into the next plane


class BSQ(WeightMethod):
    """W = t·Round[Σ_b (p_b − n_b)·2^b] over a layer's planes in use, p_b and n_b in [0, 2] (Eq. 2-3 of the paper).

    Rounding passes gradients: dL/dp_b = t·2^b·dL/dW, with the opposite sign for n_b. The lasso of a layer is
    α·(its share of all weights)·(its planes)·Σ_b ‖(p_b, n_b)‖ (Eq. 4-5). Every so often the rounded integers are written
    back as bits and planes that are zero in all weights leave at either end (section 3.3), which changes no weight.

    The paper ends at the precision that α leads to. Here planes are fixed after a share of the run: those that lose least,
    by a knapsack, where the budget is not met by then. 2^(k+1) − 1 levels at k planes.
    """

    name = "bsq"
    takes = "target"
    Settings = BSQSettings
    settings: BSQSettings

    def __init__(self, layers: Sequence[Layer], plan: Plan, settings: BSQSettings | None = None) -> None:
        super().__init__(layers, plan, settings)
        self.budget = plan.budget
        self.budget.check_feasible()
        self.bits = len(self.budget.table[0]) - 1
        total = self.schedule.total_steps
        self.requantize_every = max(1, round(self.settings.requantize_share * total))
        self.fixing_step = max(1, round(self.settings.search_share * total))
        self.fixed = False
        self.fisher = torch.zeros(len(layers), device=layers[0].parameter.device)  # running mean of dL/dW² per weight
        self.active = torch.ones(
            len(layers), self.bits, dtype=torch.bool
        )  # planes in use, of every layer a run of them
        self.positive: list[nn.Parameter] = []  # p, [bits, *weight]
        self.negative: list[nn.Parameter] = []  # n
        self.steps: list[Tensor] = []  # t, the value of integer 1; []
        top = 2**self.bits - 1
        for index, layer in enumerate(layers):
            weight = layer.parameter.detach().float()
            step = weight.abs().max().clamp_min(SMALLEST * 2**self.bits) / top
            self.steps.append(step)
            for bits in (self.positive, self.negative):
                bits.append(nn.Parameter(torch.empty(self.bits, *weight.shape, device=weight.device)))
            self._set_integers(index, (weight / step).round().to(torch.int32))
        self.materialise(0)

    @classmethod
    def state_bytes(cls, settings: Any, *, max_bits: int, state_dtype: torch.dtype) -> int:
        return 8 * max_bits  # p and n of every plane

    @classmethod
    def trained_values(cls, *, max_bits: int) -> int:
        return 2 * max_bits

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [*self.positive, *self.negative]}]

    def planes_in_use(self) -> list[int]:
        """How many planes each layer uses."""
        return [int(count) for count in self.active.sum(dim=1)]

    @torch.no_grad()
    def collect(self, step: int, *, lr: float, lr_share: float) -> None:
        weights = sum(self.budget.weights)
        for index, layer in enumerate(self.layers):
            gradient, pos, neg = layer.parameter.grad, self.positive[index], self.negative[index]
            if gradient is None:
                pos.grad = neg.grad = None
                continue
            gradient = gradient.float()
            self.fisher[index].lerp_(gradient.square().mean(), 1 - _FISHER_DECAY)
            pos.grad = self._powers(index, gradient) * (gradient * self.steps[index])
            neg.grad = -pos.grad
            if not self.fixed:
                share = self.settings.strength * (layer.weights / weights) * int(self.active[index].sum())
                norms = (pos.square() + neg.square()).flatten(1).sum(dim=1).sqrt()  # [bits]
                pull = (share / norms.where(norms > 0, torch.inf)).view(-1, *[1] * layer.parameter.dim())
                pos.grad.addcmul_(pos, pull)
                neg.grad.addcmul_(neg, pull)

    @torch.no_grad()
    def materialise(self, step: int) -> None:
        for index, pair in enumerate(zip(self.positive, self.negative, strict=True)):
            for bits in pair:
                bits.data.clamp_(0, _MOST)
                bits.data[~self.active[index]] = 0
        if not self.fixed and step >= self.fixing_step:
            self._fix()
        elif not self.fixed and step and step % self.requantize_every == 0:
            self._requantize()
        for index, layer in enumerate(self.layers):
            layer.parameter.data.copy_(self.integers(index) * self.steps[index])

    def integers(self, index: int) -> Tensor:
        """Round[Σ_b (p_b − n_b)·2^b] of a layer (float), on the levels of its lowest plane; within its planes once fixed."""
        lowest, most = self._reach(index)
        return (self._total(index) / lowest).round_().mul_(lowest).clamp_(-most, most)

    @torch.no_grad()
    def unrounded(self) -> list[Tensor]:
        """t·Σ_b (p_b − n_b)·2^b within the reach of its planes: the integers themselves where no step followed a re-quantization."""
        found = []
        for index, step in enumerate(self.steps):
            _, most = self._reach(index)
            found.append(self._total(index).clamp_(-most, most) * step)
        return found

    def _reach(self, index: int) -> tuple[float, float]:
        """The distance of a layer's levels and the largest of them, in integers; 1 and 0 without planes."""
        span = torch.nonzero(self.active[index]).flatten().tolist()
        if not span:
            return 1.0, 0.0
        lowest, highest = 2.0 ** span[0], 2.0 ** ((span[-1] if self.fixed else self.bits - 1) + 1)
        return lowest, highest - lowest

    def _total(self, index: int) -> Tensor:
        """Σ_b (p_b − n_b)·2^b of a layer's planes in use, not rounded."""
        difference = self.positive[index].detach() - self.negative[index].detach()
        return (difference * self._powers(index, difference[0])).sum(dim=0)

    def _powers(self, index: int, like: Tensor) -> Tensor:
        """2^b of planes in use, 0 of the others, [bits, 1, …]."""
        powers = 2.0 ** torch.arange(self.bits) * self.active[index]
        return powers.to(like).view(-1, *[1] * like.dim())

    def _requantize(self) -> None:
        """Integers back into bits, without the planes at either end that no weight uses."""
        for index, few in enumerate(self.budget.limits.min_planes):
            integers = self.integers(index).to(torch.int32)
            magnitude = integers.abs()
            used = [plane for plane in range(self.bits) if bool(((magnitude >> plane) & 1).any())]
            span = torch.nonzero(self.active[index]).flatten().tolist()
            low, high = (used[0], used[-1]) if used else (span[-1] if span else 0, span[-1] - 1 if span else -1)
            while high - low + 1 < few:  # finer planes first
                low, high = (low - 1, high) if low > 0 else (low, high + 1)
            self.active[index] = False
            self.active[index, low : high + 1] = True
            self._set_integers(index, integers)

    def _fix(self) -> None:
        """Planes for good. Where they are too many, those that lose least, with the integers and step nearest to the weight."""
        self._requantize()
        counts = self.planes_in_use()
        weights = [self.integers(index) * step for index, step in enumerate(self.steps)]

        def errors(index: int) -> Tensor:
            return self._errors(weights[index], counts[index])

        for index, k in reduce_to_budget(counts, self.fisher, self.budget, errors=errors).items():
            self._refit(index, weights[index], k)
        self.fixed = True

    def _errors(self, weight: Tensor, count: int) -> Tensor:
        """Squared error of a layer's nearest levels at 0 … ``count`` planes, none from there on; [bits + 1] float64."""
        errors = torch.zeros(self.bits + 1, dtype=torch.float64)
        for k in range(count):
            step = mse_step(weight, k, channel_dim=None) if k else weight.new_ones(1)
            errors[k] = (weight - quantize(weight, step, k) * step).double().square().sum()
        return errors

    def _refit(self, index: int, weight: Tensor, planes: int) -> None:
        """The highest planes of a layer only, with the integers and the step nearest to ``weight``."""
        lowest = int(torch.nonzero(self.active[index])[-1]) - planes + 1
        step = mse_step(weight, max(planes, 1), channel_dim=None)
        self.active[index, :lowest] = False
        self.steps[index] = (step / 2.0**lowest).reshape(())
        self._set_integers(index, quantize(weight, step, planes).to(torch.int32) << lowest)

    def _set_integers(self, index: int, integers: Tensor) -> None:
        """Bits of a layer: those of each magnitude, in the planes of its sign."""
        shifts = torch.arange(self.bits, device=integers.device).view(-1, *[1] * integers.dim())
        bits = (integers.abs() >> shifts) & 1
        self.positive[index].data.copy_(bits * (integers > 0))
        self.negative[index].data.copy_(bits * (integers < 0))

    @torch.no_grad()
    def harden(self, step: int) -> None:
        if not self.fixed:
            self._fix()
        self.materialise(step)

    @torch.no_grad()
    def hard_layers(self) -> list[HardLayer]:
        assert self.fixed, "harden() first"
        return [
            hard_layer(layer, self.integers(index).to(torch.int32), self.steps[index], self.active[index].clone())
            for index, layer in enumerate(self.layers)
        ]

    def monitor(self, step: int) -> dict[str, float]:
        mean = self.budget.mean_planes(self.planes_in_use())
        return {"mean_bits": mean, "budget_gap": mean - self.budget.target}

    def state_dict(self) -> dict[str, Any]:
        return {
            "positive": [bits.data for bits in self.positive],
            "negative": [bits.data for bits in self.negative],
            "steps": self.steps,
            "active": self.active,
            "fisher": self.fisher,
            "fixed": self.fixed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for own, saved in zip([*self.positive, *self.negative], [*state["positive"], *state["negative"]], strict=True):
            own.data.copy_(saved)
        self.steps = [saved.to(own) for own, saved in zip(self.steps, state["steps"], strict=True)]
        self.active = state["active"].cpu().clone()
        self.fisher.copy_(state["fisher"])
        self.fixed = state["fixed"]
