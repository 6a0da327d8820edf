"""Importance by the diagonal Fisher: what `staged` looks at while it trains, measured once on the model as it comes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csqcli.quant.allocators.base import Batches
from csqcli.quant.layers import Layer
from csqcli.quant.masks import savings
from csqcli.quant.passes.rounding import mse_step, plane_errors

_RECOVERY = 0.25  # as `staged` discounts finer planes


def fisher_importance(
    model: nn.Module, layers: Sequence[Layer], batches: Batches, bits: int, *, recovery: float = _RECOVERY
) -> Tensor:
    """[layers, bits] float64: ρ^b ½ Σ_i F_i ((W − Q_b)² − (W − Q_{b+1})²), F the mean squared gradient over ``batches``
    and ρ = ``recovery``.

    The model runs in eval mode, with the labels' cross entropy, and comes back as it was.
    """
    squares = [torch.zeros_like(layer.parameter, dtype=torch.float32) for layer in layers]
    was_training, count = model.training, 0
    model.eval()
    parameters = [layer.parameter for layer in layers]
    for images, labels in batches:
        scores = model(images)
        gradients = torch.autograd.grad(F.cross_entropy(scores, labels), parameters, allow_unused=True)
        for square, gradient in zip(squares, gradients, strict=True):
            if gradient is not None:
                square.add_(gradient.float().square())
        count += 1
    model.train(was_training)
    errors = torch.zeros(len(layers), bits + 1, dtype=torch.float64)
    for index, (layer, square) in enumerate(zip(layers, squares, strict=True)):
        weight = layer.by_channel(layer.flat(layer.parameter.detach())).float()
        fisher = layer.by_channel(layer.flat(square)) / max(count, 1)
        shared = layer.weights == weight.shape[1]  # never a scale per weight
        widths = [mse_step(weight, k, channel_dim=None if shared else 1).view(-1, 1) for k in range(1, bits + 1)]
        unit = torch.ones_like(widths[0])
        errors[index] = plane_errors(weight, unit=unit, steps=torch.stack(widths), fisher=fisher).cpu()
    return savings(errors, recovery)
