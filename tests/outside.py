"""What somebody adds to csq from a package of their own: a weight method, an allocator and a cost."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn

from csqcli.quant.costs import LayerFacts
from csqcli.quant.hard_layer import HardLayer
from csqcli.quant.method_settings import MethodSettings
from csqcli.quant.methods.base import WeightMethod
from csqcli.quant.methods.uniform import StraightThrough


class TernarySettings(MethodSettings):
    """Settings of the outside method."""

    threshold: float = Field(0.7, gt=0, lt=3)
    """Weights below this share of the mean magnitude become 0."""


class Ternary(WeightMethod):
    """Latents are the base optimizer's; the forward pass has −s, 0, s."""

    name = "ternary"
    summary = "one plane per layer by a threshold, straight-through gradients"
    citation = "an example"
    takes = "target"
    Settings = TernarySettings

    def __init__(self, layers: Any, plan: Any, settings: Any = None) -> None:
        super().__init__(layers, plan, settings)
        self.latents = [nn.Parameter(layer.parameter.detach().clone()) for layer in layers]
        self.materialise(0)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": self.latents}]

    def collect(self, step: int, *, lr: float, lr_share: float) -> None:
        for layer, latent in zip(self.layers, self.latents, strict=True):
            latent.grad = layer.parameter.grad

    def _levels(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        magnitude = latent.detach().abs()
        on = magnitude > self.settings.threshold * magnitude.mean()
        scale = (magnitude * on).sum() / on.sum().clamp_min(1)
        return (latent.detach().sign() * on).int(), scale.reshape(1)

    def materialise(self, step: int) -> None:
        for layer, latent in zip(self.layers, self.latents, strict=True):
            integers, scale = self._levels(latent)
            layer.parameter.data.copy_(integers * scale)

    def harden(self, step: int) -> None: ...

    def hard_layers(self) -> list[HardLayer]:
        mask = torch.ones(1, dtype=torch.bool)
        levels = map(self._levels, self.latents)
        return [HardLayer(layer.name, q, s, mask) for layer, (q, s) in zip(self.layers, levels, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"latents": [latent.data for latent in self.latents]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for latent, saved in zip(self.latents, state["latents"], strict=True):
            latent.data.copy_(saved)


class ThreePlanes(StraightThrough):
    """A method of planes that goes no further than three."""

    name = "three"
    max_planes = 3


class Unfinished(WeightMethod):
    """Forgets what reaches the file."""

    name = "unfinished"

    def collect(self, step: int, *, lr: float, lr_share: float) -> None: ...


def last_layers_first(model: nn.Module, layers: Any, batches: Any, bits: int) -> torch.Tensor:
    """An allocator: the closer to the output, the more important."""
    depth = torch.arange(1, len(layers) + 1, dtype=torch.float64).unsqueeze(1)
    return depth**8 * 0.5 ** torch.arange(bits)


def endless(model: nn.Module, layers: Any, batches: Any, bits: int) -> torch.Tensor:
    """An allocator to which one layer is worth everything."""
    importance = last_layers_first(model, layers, batches, bits)
    importance[0] = float("inf")
    return importance


def bytes_of_rows(layer: LayerFacts, planes: int) -> int:
    """A cost: rows of the weight are padded to whole bytes, and a plane costs a header."""
    rows = layer.shape[0]
    return rows * -(-planes * (layer.weights // rows) // 8) + 4 * planes


def half_a_byte(layer: LayerFacts, planes: int) -> float:
    """No whole number."""
    return planes * 0.5
