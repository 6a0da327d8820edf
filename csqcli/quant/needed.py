"""Which layers may lose their last plane, and which only together: found by measurement, before any layer is rounded.

Importance is a second-order estimate of one weight at a time, and sees neither. A network is disconnected where its scores are the
same for every image: a layer whose weights cost little one by one may still be the only way to the scores. And of two layers
in a row on a residual branch none does anything without the other, so planes of one are wasted where the other is gone.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from csqcli.quant.budget import PlaneLimits
from csqcli.quant.layers import Layer
from csqcli.quant.measuring import evaluating, first_tensor, logits_of, unfrozen, weights_as
from csqcli.quant.names import owner_of

_ENDED = 1e-3  # of the spread that the scores had; where nothing leads to them any more, it is rounding noise
NEEDED_IMAGES = 16  # enough to see whether scores differ at all


@torch.no_grad()
def needed_layers(model: nn.Module, layers: Sequence[Layer], limits: PlaneLimits, images: Tensor) -> list[str]:
    """Names of layers that may go by ``limits`` but must not: without them the scores are the same for every image.

    ``images`` [B, C, H, W], B ≥ 2, on the model's device. Layer after layer is set to zero, the largest first, and stays so
    unless that disconnects the network; so all the others may go together, in any selection, and where one of two ways to the
    scores has to stay it is the smaller one. Layers that ``limits`` give no plane are at zero from the start. One forward pass
    per layer; the model is put back. All that may go are needed where the scores do not depend on the images to begin with.
    """
    bounds = list(zip(layers, limits.min_planes, limits.max_planes, strict=True))
    open_to_go = [layer for layer, few, most in bounds if few == 0 < most]
    needed = []
    with evaluating(model), weights_as([(layer, layer.parameter.detach().clone()) for layer in layers]):
        least = _ENDED * _spread(model, images)
        for layer, _, most in bounds:
            if most == 0:
                layer.parameter.data.zero_()
        for layer in sorted(open_to_go, key=lambda layer: -layer.weights):
            weight = layer.parameter.detach().clone()
            layer.parameter.data.zero_()
            if not _spread(model, images) > least:  # NaN counts as disconnected too
                layer.parameter.data.copy_(weight)
                needed.append(layer.name)
    return [layer.name for layer in layers if layer.name in needed]


def layers_together(model: nn.Module, layers: Sequence[Layer], names: Sequence[str], images: Tensor) -> list[list[str]]:
    """Those of ``names`` that do nothing without each other, in groups of two and more, in the order of the layers.

    A layer is idle where its input is the same for every image, or where no gradient of the scores reaches its weight. Two
    layers belong together where each is idle once the other is zero; so do those that a third one joins. A forward and a
    backward pass per name; the model is put back.
    """
    chosen = [layer for layer in layers if layer.name in names]
    if not chosen:
        return []
    with evaluating(model), weights_as([(layer, layer.parameter.detach().clone()) for layer in chosen]):
        usual = _activity(model, chosen, images)
        chosen = [layer for layer in chosen if usual[layer.name] > 0]
        idle = {}
        for layer in chosen:
            weight = layer.parameter.detach().clone()
            layer.parameter.data.zero_()
            now = _activity(model, chosen, images)
            idle[layer.name] = {name for name, found in now.items() if not found > _ENDED * usual[name]}
            layer.parameter.data.copy_(weight)
    groups: list[list[str]] = []
    for name in idle:
        partners = {other for other in idle[name] if other != name and name in idle[other]}
        joined = [group for group in groups if partners & set(group)]
        groups = [group for group in groups if group not in joined] + [[*itertools.chain(*joined), name]]
    order = {layer.name: place for place, layer in enumerate(layers)}
    return sorted(
        (sorted(group, key=order.__getitem__) for group in groups if len(group) > 1), key=lambda g: order[g[0]]
    )


def _activity(model: nn.Module, layers: Sequence[Layer], images: Tensor) -> dict[str, float]:
    """How much each layer does: the spread of its input over the images times the largest gradient of its weight."""
    spreads: dict[str, float] = {}
    with _watching_inputs(model, layers, spreads), unfrozen(layers) as weights, torch.enable_grad():
        scores = logits_of(model(images)).float()
        # a weighted sum, so that the gradients of two scores do not cancel
        weighted = (scores * torch.linspace(1, 2, scores.numel(), device=scores.device).view_as(scores)).sum()
        gradients = (
            torch.autograd.grad(weighted, weights, allow_unused=True)
            if weighted.requires_grad
            else [None] * len(layers)
        )
    return {
        layer.name: spreads.get(layer.name, 1.0) * (0.0 if gradient is None else float(gradient.abs().max()))
        for layer, gradient in zip(layers, gradients, strict=True)
    }


@contextlib.contextmanager
def _watching_inputs(model: nn.Module, layers: Sequence[Layer], spreads: dict[str, float]) -> Iterator[None]:
    """Keep the spread of what each layer's module is given, by the layer's name, while the body runs."""

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[object, ...]) -> None:
            values = first_tensor(inputs)
            if values is not None:
                spreads[name] = max(spreads.get(name, 0.0), _spread_of(values.detach()))

        return hook

    modules = dict(model.named_modules())
    owners = [(layer.name, modules.get(owner_of(layer.name))) for layer in layers]
    handles = [module.register_forward_pre_hook(keep(name)) for name, module in owners if module is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _spread(model: nn.Module, images: Tensor) -> float:
    return _spread_of(logits_of(model(images)))


def _spread_of(values: Tensor) -> float:
    """How far a value is from its mean over the images, at most."""
    values = values.float()
    return float((values - values.mean(dim=0)).abs().max())
