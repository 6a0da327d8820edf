"""Allocators decide how many planes each layer gets before training, for any method that is given its planes.

An allocator is one function: the model, its layers and a few batches → the importance of every plane [layers, bits], that is
the loss that the plane saves, planes taken from the most significant one down. One knapsack turns it into planes within the
budget. Name one of your own by ``--allocator package.module:function``.

Those that ship with csq may ask for more by name (`catalog.AllocatorCard.asks`), and `haq` and `manual` say the planes
themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.quant.allocators.manual import written_planes
from csqcli.quant.budget import Budget, allocate
from csqcli.quant.catalog import MANUAL, TRIALS, UNIFORM, find_allocator
from csqcli.quant.layers import Layer
from csqcli.quant.measuring import Batches, Watch, no_progress
from csqcli.system.plugins import import_attribute, import_function


@dataclass(frozen=True)
class Allocation:
    """Planes of every layer, and the importance [layers, bits] that they were chosen by, where that was how."""

    planes: list[int]
    importance: Tensor | None = None


def allocation_by(
    name: str,
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Batches,
    budget: Budget,
    *,
    planes: Mapping[str, int] | None = None,
    trials: int = TRIALS,
    seed: int = 0,
    watch: Watch = no_progress,
) -> Allocation:
    """Planes of every layer by the allocator ``name``, within the budget and the rules.

    ``uniform`` gives every layer the target (:func:`uniform`); ``manual`` takes ``planes`` (name or glob → planes);
    ``haq`` measures ``trials`` networks; what is random is so by ``seed``. ``watch`` shows how far a slow one is. UserError
    for unknown names and for importance that is not [layers, bits] of numbers ≥ 0.
    """
    if name == UNIFORM:
        return Allocation(uniform(budget))
    if name == MANUAL:
        return Allocation(written_planes(layers, budget, planes or {}))
    budget.check_feasible()  # before anything is measured
    card = find_allocator(name)
    known: dict[str, Any] = {"seed": seed, "trials": trials, "watch": watch}
    asked = {key: known[key] for key in card.asks}
    function = function_of(name)
    if card.gives == "planes":
        return Allocation(function(model, layers, batches, budget, **asked))
    bits = len(budget.table[0]) - 1
    importance = function(model, layers, batches, bits, **asked)
    if not isinstance(importance, Tensor):
        raise UserError(f"gave a {type(importance).__name__}, not importance as a tensor", where=f"--allocator {name}")
    if tuple(importance.shape) != (len(layers), bits) or not bool(((importance >= 0) & importance.isfinite()).all()):
        what = f"gave importance of shape {list(importance.shape)}, not {[len(layers), bits]} of finite numbers ≥ 0"
        raise UserError(what, where=f"--allocator {name}", hint="one row per layer, one column per plane")
    return Allocation(allocate(importance, budget), importance)


def function_of(name: str) -> Any:
    """The function that an allocator's name stands for. UserError for one that is unknown or cannot be imported."""
    imported = import_function if ":" in name else import_attribute
    return imported(find_allocator(name).target, where="--allocator")


def uniform(budget: Budget) -> list[int]:
    """The target in every layer, but for the rules of single layers.

    With such rules the target may be a fraction: its whole part is for the layers that they leave, and its mean is what all may
    reach. UserError for a fraction without them, and where the planes are not within the budget.
    """
    target, bits = budget.target, len(budget.table[0]) - 1
    budget.check_feasible()
    planes = budget.limits.alike(int(target))
    ruled = any(count != int(target) for count in planes)
    if not 1 <= target <= bits or (target != int(target) and not ruled):
        hint = f"take a whole number from 1 to {bits}, or a method or --allocator that mixes them"
        raise UserError(f"the same planes in every layer; {target:g} is not possible", hint=hint)
    if budget.fits(planes):
        return planes
    if budget.also or not budget.counts_weights:
        what = f"{int(target)} planes in every layer are not within all of the targets"
        raise UserError(what, hint="raise the other targets, or take an --allocator that mixes planes")
    mean = budget.mean_planes(planes)
    what = f"{int(target)} planes in every layer that the rules leave are {mean:.4f} in the mean, over the target of {target:g}"
    enough = math.ceil(100 * mean) / 100
    hint = "take an --allocator that mixes planes" + (
        f", or --target-bits {enough:g}" if int(enough) == int(target) else ""
    )
    raise UserError(what, hint=hint)
