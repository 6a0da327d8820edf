"""Allocators decide how many planes each layer gets before training, for any method that is given its planes.

An allocator is one function: the model, its layers and a few batches → the importance of every plane [layers, bits], that is
the loss that the plane saves, planes taken from the most significant one down. One knapsack turns it into planes within the
budget. Name one of your own by ``--allocator package.module:function``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.quant.budget import Budget, allocate
from csqcli.quant.catalog import UNIFORM, find_allocator
from csqcli.quant.layers import Layer
from csqcli.system.plugins import import_attribute, import_function

Batches = Iterable[tuple[Tensor, Tensor]]  # images [B, C, H, W] and labels [B], on the model's device
Allocator = Callable[[nn.Module, Sequence[Layer], Batches, int], Tensor]


def planes_by(name: str, model: nn.Module, layers: Sequence[Layer], batches: Batches, budget: Budget) -> list[int]:
    """Planes of every layer by the allocator ``name``, within the budget and the rules.

    ``uniform`` gives every layer the target, which must then be whole; all others go through the knapsack. UserError for
    unknown names and for importance that is not [layers, bits] of numbers ≥ 0.
    """
    if name == UNIFORM:
        return uniform(budget)
    bits = len(budget.table[0]) - 1
    imported = import_function if ":" in name else import_attribute
    function: Allocator = imported(find_allocator(name).target, where="--allocator")
    importance = function(model, layers, batches, bits)
    if not isinstance(importance, Tensor):
        raise UserError(f"gave a {type(importance).__name__}, not importance as a tensor", where=f"--allocator {name}")
    if tuple(importance.shape) != (len(layers), bits) or not bool((importance >= 0).all()):
        what = f"gave importance of shape {list(importance.shape)}, not {[len(layers), bits]} of numbers ≥ 0"
        raise UserError(what, where=f"--allocator {name}", hint="one row per layer, one column per plane")
    return allocate(importance, budget)


def uniform(budget: Budget) -> list[int]:
    """The target in every layer, but for the rules of single layers. UserError for a target that is not whole."""
    target, bits = budget.target, len(budget.table[0]) - 1
    if target != int(target) or not 1 <= target <= bits:
        hint = f"take a whole number from 1 to {bits}, or a method or --allocator that mixes them"
        raise UserError(f"the same planes in every layer; {target:g} is not possible", hint=hint)
    rules = zip(budget.limits.min_planes, budget.limits.max_planes, strict=True)
    return [min(max(int(target), few, 1), most) for few, most in rules]
