"""Fewest and most planes of a run's layers: the recipe's rules, and what the network cannot do without."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from csqcli.quant.budget import PlaneLimits, plane_limits
from csqcli.quant.layers import Layer
from csqcli.quant.needed import NEEDED_IMAGES, needed_layers
from csqcli.recipe.schema import Recipe
from csqcli.system.progress import Display, counted

_MOST_NAMES = 6


def limits_of(recipe: Recipe, layers: Sequence[Layer], needed: Sequence[str] = ()) -> PlaneLimits:
    """The recipe's limits; layers that are ``needed`` keep at least one plane."""
    rules = recipe.layers
    return plane_limits(
        layers,
        bits=recipe.quantization.max_bits,
        floor=rules.floor,
        keep=rules.keep,
        min_bits=rules.min_bits,
        max_bits=rules.max_bits,
        needed=needed,
    )


def measure_needed(
    recipe: Recipe, model: nn.Module, layers: Sequence[Layer], images: Callable[[], Tensor], *, display: Display
) -> list[str] | None:
    """Names of layers without which the network would end, said in a line; None where every layer keeps a plane anyway.

    ``images`` gives a batch to calibrate on, [B, C, H, W] on the model's device.
    """
    limits = limits_of(recipe, layers)
    if min(limits.min_planes, default=1) > 0:
        return None
    with display.step("measuring which layers the network cannot do without"):
        needed = needed_layers(model, layers, limits, images()[:NEEDED_IMAGES])
    if needed:
        named = ", ".join(name.removesuffix(".weight") for name in needed[:_MOST_NAMES])
        more = ", …" if len(needed) > _MOST_NAMES else ""
        which = f"{counted(len(needed), 'layer')} of {len(layers)}"
        display.say(f"floor 0: without {which} all images would score the same, so they keep a plane: {named}{more}")
    return needed
