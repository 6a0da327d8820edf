"""QUANOS (Panda 2020, arXiv 2004.11233): layers whose output an adversarial input moves most get the most planes.

ANS_l = ‖a_l(x + δ) − a_l(x)‖₂ / ‖a_l(x)‖₂ over a layer's output a_l, for the fast gradient sign step δ = ε·sign(dL/dx). The
paper scales each layer's width by its ANS during training and has no size limit. Here ANS_l weighs the share of the layer's
weights that rounding loses, ‖W − Q_k‖²/‖W‖², so that the common knapsack can spend a budget on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csqcli.quant.layers import Layer
from csqcli.quant.masks import savings
from csqcli.quant.measuring import Batches, evaluating, logits_of, outputs_of, squared_errors
from csqcli.quant.names import owner_of

_STRENGTH = 0.12  # ε in standard deviations of the images: about 8/255 of the pixel range of natural images


def noise_importance(model: nn.Module, layers: Sequence[Layer], batches: Batches, bits: int) -> Tensor:
    """[layers, bits] float64: ½ ANS_l (‖W − Q_b‖² − ‖W − Q_{b+1}‖²)/‖W‖²."""
    errors = squared_errors(layers, bits)
    relative = errors / errors[:, :1].clamp_min(torch.finfo(torch.float64).tiny)
    return savings(relative * noise_sensitivity(model, layers, batches).unsqueeze(1), 1.0)


def noise_sensitivity(model: nn.Module, layers: Sequence[Layer], batches: Batches) -> Tensor:
    """[layers] float64: ANS_l over all images of ``batches``, ε in units of their standard deviation.

    A layer whose module is never called (its weight is used functionally) takes the mean of the others.
    """
    names = [owner_of(layer.name) for layer in layers]
    moved, size = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    with evaluating(model):
        for images, labels in batches:
            if not len(labels):
                continue
            seen = images.detach().clone().requires_grad_(True)
            with torch.enable_grad():
                loss = F.cross_entropy(logits_of(model(seen)), labels)
                (gradient,) = torch.autograd.grad(loss, seen)
            attacked = images + _STRENGTH * images.std() * gradient.sign()
            with torch.no_grad():
                clean, noisy = outputs_of(model, images, names), outputs_of(model, attacked, names)
            for name in clean:
                for a, b in zip(clean[name], noisy[name], strict=True):
                    moved[name] += float((b.double() - a.double()).square().sum())
                    size[name] += float(a.double().square().sum())
    found = torch.tensor([(moved[n] / size[n]) ** 0.5 if size[n] else torch.nan for n in names], dtype=torch.float64)
    return torch.nan_to_num(found, nan=float(found.nanmean().nan_to_num(1.0)))
