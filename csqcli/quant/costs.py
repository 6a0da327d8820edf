"""What planes cost: one function (layer, planes) → whole number; the knapsack, the reports and the check take it from here.

The default counts planes over weight elements, as the paper does. Name one of your own by ``--cost package.module:function``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from csqcli.quant.names import FLOAT_BITS
from csqcli.system.plugins import Registry

WEIGHTS = "weights"
FLOAT_FORM = "fp32"
# Narrowest first: a type of n bits holds ±(2^(n−1) − 1), so n − 1 planes.
FORM_PLANES = {"int2": 1, "int4": 3, "int8": 7}


@dataclass(frozen=True)
class LayerFacts:
    """What a cost function may know about a layer."""

    name: str
    shape: tuple[int, ...]
    weights: int
    macs: int = 0  # multiply-accumulates of one image; 0 where the weight is in no operation
    input_bits: int = FLOAT_BITS


Cost = Callable[[LayerFacts, int], int]
costs: Registry[Cost] = Registry("cost")


@costs.register(WEIGHTS, "planes over weight elements: the paper's count")
def weight_planes(layer: LayerFacts, planes: int) -> int:
    """Planes × elements."""
    return planes * layer.weights


@costs.register("bops", "bit operations: multiply-accumulates × planes × bits of the layer's input")
def bit_operations(layer: LayerFacts, planes: int) -> int:
    """Planes × multiply-accumulates × input bits."""
    return operations_of(layer.macs, planes, layer.input_bits)


def operations_of(macs: int, planes: int, input_bits: int) -> int:
    """Bit operations of so many multiply-accumulates."""
    return macs * planes * input_bits


def latency_cost(latencies: Mapping[str, Mapping[str, int]]) -> Cost:
    """Nanoseconds of a layer by the kernel that an export runs it with, from ``latencies``: by layer, and by form there.

    With inputs of 8 bits or fewer that is the narrowest integer type that holds the planes and has a kernel there; with wider ones, and
    beyond 7 planes, float arithmetic. Between two types more planes cost nothing. Where a narrower kernel is the slower one,
    fewer planes are said to cost no more than they do in a budget that may not fall: what is counted is the dearest so far.
    """

    def nanoseconds(layer: LayerFacts, planes: int) -> int:
        known = latencies[layer.name]
        return (
            max(known[_form(known, count, layer.input_bits)] for count in range(min(planes, 1), planes + 1))
            if known
            else 0
        )

    return nanoseconds


def _form(known: Mapping[str, int], planes: int, input_bits: int) -> str:
    fitting = [form for form, most in FORM_PLANES.items() if planes <= most and form in known and input_bits <= 8]
    return fitting[0] if fitting else FLOAT_FORM
