"""Importance by the diagonal Fisher: what `staged` looks at while it trains, measured once on the model as it comes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csqcli.quant.layers import Layer
from csqcli.quant.masks import savings
from csqcli.quant.measuring import Batches, evaluating, logits_of, squared_errors, unfrozen

_RECOVERY = 0.25  # as `staged` discounts finer planes


def fisher_importance(
    model: nn.Module, layers: Sequence[Layer], batches: Batches, bits: int, *, recovery: float = _RECOVERY
) -> Tensor:
    """[layers, bits] float64: ρ^b ½ Σ_i F_i ((W − Q_b)² − (W − Q_{b+1})²), F the mean squared gradient over ``batches``
    and ρ = ``recovery``.

    The model runs in eval mode, with the labels' cross entropy, and comes back as it was.
    """
    squares = [torch.zeros_like(layer.parameter, dtype=torch.float32) for layer in layers]
    count = 0
    with evaluating(model), unfrozen(layers) as parameters:
        for images, labels in batches:
            if not len(labels):  # none of it could be decoded
                continue
            loss = F.cross_entropy(logits_of(model(images)), labels)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for square, gradient in zip(squares, gradients, strict=True):
                if gradient is not None:
                    square.add_(gradient.float().square())
            count += 1
    return savings(squared_errors(layers, bits, [square / max(count, 1) for square in squares]), recovery)
