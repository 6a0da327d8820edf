"""What a recipe names and nobody has looked at: imported or built before images are opened and anything is trained."""

from __future__ import annotations

import torch
from torch import nn

from csqcli.quant.allocators.base import function_of
from csqcli.quant.catalog import MANUAL, UNIFORM
from csqcli.quant.costs import costs
from csqcli.recipe.schema import Recipe
from csqcli.training.setup import optimizer_of


def check_named(recipe: Recipe) -> None:
    """UserError for an allocator or a cost that cannot be imported, and an optimizer that does not exist."""
    settings = recipe.quantization
    if settings.allocator not in (None, UNIFORM, MANUAL):
        function_of(settings.allocator)
    costs.find(settings.cost, where="quantization.cost")
    if recipe.card.trains or recipe.adaptation.epochs or recipe.finetune.epochs:
        check_optimizer(recipe)


def check_optimizer(recipe: Recipe) -> None:
    """UserError for an optimizer that timm does not have, and for one that csq's steps are not enough for."""
    with torch.random.fork_rng([]):
        optimizer_of([{"params": [nn.Parameter(torch.zeros(2, 2))]}], recipe.optimizer.chosen(adamw=False))
