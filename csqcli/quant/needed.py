"""Which layers may lose their last plane together: found by measurement, on the network as it is before any is rounded.

A network has ended where its scores are the same for every image. Importance cannot see that: it is a second-order estimate
of one weight at a time, and a layer whose weights cost little one by one may still be the only way to the scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from csqcli.quant.budget import PlaneLimits
from csqcli.quant.layers import Layer
from csqcli.quant.measuring import evaluating, logits_of, weights_as

_ENDED = 1e-3  # of the spread that the scores had; where nothing leads to them any more, it is rounding noise
NEEDED_IMAGES = 16  # enough to see whether scores differ at all


@torch.no_grad()
def needed_layers(model: nn.Module, layers: Sequence[Layer], limits: PlaneLimits, images: Tensor) -> list[str]:
    """Names of layers that may go by ``limits`` but must not: without them the scores are the same for every image.

    ``images`` [B, C, H, W], B ≥ 2, on the model's device. Layer after layer is set to zero, the largest first, and stays so
    unless the network ends; so all the others may go together, in any selection, and where one of two ways to the scores has to
    stay it is the smaller one. Layers that ``limits`` give no plane are at zero from the start. One forward pass per
    layer; the model is put back. All that may go are needed where the scores do not depend on the images to begin with.
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
            if not _spread(model, images) > least:  # NaN ends a network too
                layer.parameter.data.copy_(weight)
                needed.append(layer.name)
    return [layer.name for layer in layers if layer.name in needed]


def _spread(model: nn.Module, images: Tensor) -> float:
    """How far a score is from its mean over the images, at most."""
    scores = logits_of(model(images)).float()
    return float((scores - scores.mean(dim=0)).abs().max())
