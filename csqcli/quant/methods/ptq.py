"""Post-training quantization: integers that are fitted to what each layer sees, not trained.

The method holds the layers as they stand: at first every weight at its nearest level, then, layer by layer, what
`training.post_training` found with `quant.second_order`. No step of an optimizer changes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csqcli.quant.hard_layer import HardLayer, spread, top_planes
from csqcli.quant.layers import Layer
from csqcli.quant.method_settings import PTQSettings
from csqcli.quant.methods.base import Plan, WeightMethod
from csqcli.quant.passes.rounding import mse_step, quantize


class PostTraining(WeightMethod):
    """Hard layers from the start; ``plan.planes`` gives the planes of each."""

    name = "ptq"
    takes = "either"
    Settings = PTQSettings
    settings: PTQSettings

    def __init__(self, layers: Sequence[Layer], plan: Plan, settings: PTQSettings | None = None) -> None:
        super().__init__(layers, plan, settings)
        assert plan.planes is not None
        self.planes, self.bits = list(plan.planes), len(plan.budget.table[0]) - 1
        self.integers: list[Tensor] = []  # float, the weight's shape
        self.scales: list[Tensor] = []  # [1] or [channels]
        for layer, k in zip(layers, self.planes, strict=True):
            weight = layer.parameter.detach().float()
            scale = start_scale(weight, layer, k)
            self.scales.append(scale)
            self.integers.append(quantize(weight, spread(scale, weight, layer.channel_dim), k))

    def place(self, index: int, integers: Tensor, scale: Tensor) -> None:
        """Take a layer's integers (float, the weight's shape) and scale, and put the weight that they make into the model."""
        self.integers[index], self.scales[index] = integers.contiguous(), scale
        self.write(index)

    @torch.no_grad()
    def write(self, index: int) -> None:
        """Put the weight of one layer into the model."""
        layer, integers = self.layers[index], self.integers[index]
        layer.parameter.data.copy_(integers * spread(self.scales[index], integers, layer.channel_dim))

    def materialise(self, step: int) -> None:
        for index in range(len(self.layers)):
            self.write(index)

    def collect(self, step: int, *, lr: float, lr_share: float) -> None:
        """Gradients change nothing."""

    def harden(self, step: int) -> None:
        self.materialise(step)

    def hard_layers(self) -> list[HardLayer]:
        rows = zip(self.layers, self.integers, self.scales, self.planes, strict=True)
        return [
            HardLayer(
                layer.name,
                integers.to(torch.int32).cpu(),
                scale.float().cpu(),
                top_planes(k, self.bits),
                layer.channel_dim,
                layer.aliases,
            )
            for layer, integers, scale, k in rows
        ]

    def fixed_planes(self) -> list[int]:
        return self.planes

    def monitor(self, step: int) -> dict[str, float]:
        return {"mean_bits": self.plan.budget.mean_planes(self.planes), "budget_gap": 0.0}

    def state_dict(self) -> dict[str, Any]:
        return {"planes": self.planes, "integers": self.integers, "scales": self.scales}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.layers[0].parameter.device
        self.planes = list(state["planes"])
        self.integers = [value.to(device) for value in state["integers"]]
        self.scales = [value.to(device) for value in state["scales"]]


def start_scale(weight: Tensor, layer: Layer, planes: int) -> Tensor:
    """The scale that fits the weights themselves best: one per output channel, [channels], or [1] where each has one weight."""
    channel_dim = layer.channel_dim if layer.allows_channel_scales else None
    return mse_step(weight, max(planes, 1), channel_dim=channel_dim)
