"""What planes cost: one function (layer, planes) → whole number; the knapsack, the reports and the check take it from here.

The default counts planes over weight elements, as the paper does. Name one of your own by ``--cost package.module:function``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from csqcli.system.plugins import Registry

WEIGHTS = "weights"


@dataclass(frozen=True)
class LayerFacts:
    """What a cost function may know about a layer."""

    name: str
    shape: tuple[int, ...]
    weights: int
    macs: int = 0  # multiply-accumulates of one image; 0 where the weight is in no operation
    input_bits: int = 32


Cost = Callable[[LayerFacts, int], int]
costs: Registry[Cost] = Registry("cost")


@costs.register(WEIGHTS, "planes over weight elements: the paper's count")
def weight_planes(layer: LayerFacts, planes: int) -> int:
    """Planes × elements."""
    return planes * layer.weights


@costs.register("bops", "bit operations: multiply-accumulates × planes × bits of the layer's input")
def bit_operations(layer: LayerFacts, planes: int) -> int:
    """Planes × multiply-accumulates × input bits."""
    return planes * layer.macs * layer.input_bits
