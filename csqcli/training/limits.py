"""Fewest and most planes of a run's layers: the recipe's rules, what the method takes, what the network cannot do without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from csqcli.quant.budget import Named, PlaneLimits, plane_limits
from csqcli.quant.layers import Layer
from csqcli.quant.needed import NEEDED_IMAGES, layers_together, needed_layers
from csqcli.recipe.schema import Recipe
from csqcli.system.progress import Display, counted

_MOST_NAMES = 6


class Ways(BaseModel):
    """What was measured of the ways through a network, where its layers may lose their last plane."""

    model_config = ConfigDict(strict=True)

    needed: list[str]  # layers whose removal makes the output constant
    together: list[list[str]]  # of the others, those that do nothing without each other


def limits_of(recipe: Recipe, layers: Sequence[Named], ways: Ways | None = None) -> PlaneLimits:
    """The recipe's limits, and what the ways through the network allow of them; never more planes than the method takes."""
    rules, most = recipe.layers, recipe.card.max_planes
    found = plane_limits(
        layers,
        bits=recipe.quantization.max_bits,
        floor=rules.floor,
        keep=rules.keep,
        min_bits=rules.min_bits,
        max_bits=rules.max_bits,
        needed=ways.needed if ways is not None else (),
        together=ways.together if ways is not None else (),
    )
    return replace(found, max_planes=tuple(min(planes, most) for planes in found.max_planes))


def measure_ways(
    recipe: Recipe, model: nn.Module, layers: Sequence[Layer], images: Callable[[], Tensor], *, display: Display
) -> Ways | None:
    """Layers without which the network would end, and those that may go only together; said in a line. None where every
    layer keeps a plane anyway.

    ``images`` gives a batch to calibrate on, [B, C, H, W] on the model's device.
    """
    limits = limits_of(recipe, layers)
    if min(limits.min_planes, default=1) > 0:
        return None
    with display.step("measuring which layers the network cannot do without"):
        batch = images()[:NEEDED_IMAGES]
        needed = needed_layers(model, layers, limits, batch)
        bounds = zip(layers, limits.min_planes, limits.max_planes, strict=True)
        free = [layer.name for layer, few, most in bounds if few == 0 < most and layer.name not in needed]
        together = layers_together(model, layers, free, batch)
    if needed:
        named = ", ".join(name.removesuffix(".weight") for name in needed[:_MOST_NAMES])
        more = ", …" if len(needed) > _MOST_NAMES else ""
        which = f"{counted(len(needed), 'layer')} of {len(layers)}"
        display.say(f"floor 0: without {which} all images would score the same, so they keep a plane: {named}{more}")
    if together:
        display.say(f"floor 0: {sum(map(len, together))} layers go only together, in {counted(len(together), 'group')}")
    return Ways(needed=needed, together=together)
