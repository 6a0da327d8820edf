"""Curvature of the loss in each layer's weights: products with the Hessian, its trace, its top eigenvalue.

H_l is the block of the Hessian of the mean cross entropy that belongs to the weights of layer l, in eval mode.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csqcli.quant.layers import Layer
from csqcli.quant.measuring import Batches, Watch, chunks, differentiating, logits_of, no_progress

PART = 32  # images per product: a graph of gradients takes several times a step's memory


def hessian_traces(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Batches,
    *,
    probes: int,
    seed: int = 0,
    part: int = PART,
    watch: Watch = no_progress,
) -> Tensor:
    """[layers] float64: Tr(H_l) by Hutchinson's estimator, E[vᵀHv] over vectors v of independent ±1.

    One product serves all layers: off-diagonal blocks vanish in the mean, since their signs are independent. ``probes``
    vectors are spread over the batches in parts of ``part`` images, in turns, so that every image counts alike; there are
    at least as many vectors as parts. The variance of one is 2·Σ_{i≠j} H_ij² over the whole Hessian's row of the block.
    """
    parts = list(chunks(batches, part))
    rng = torch.Generator().manual_seed(seed)
    turns = max(1, -(-probes // max(len(parts), 1)))
    total, images_seen = torch.zeros(len(layers), dtype=torch.float64), 0
    with (
        differentiating(model, layers) as weights,
        watch("products with the Hessian", turns * len(parts)) as tell,
    ):
        for done, (images, labels) in enumerate(itertools.chain.from_iterable([parts] * turns), 1):
            vectors = [_signs(weight, rng) for weight in weights]
            products = hessian_products(model, weights, images, labels, vectors)
            dots = [float((v.double() * hv.double()).sum()) for v, hv in zip(vectors, products, strict=True)]
            total += len(labels) * torch.tensor(dots, dtype=torch.float64)
            images_seen += len(labels)
            tell(done)
    return total / max(images_seen, 1)


def hessian_products(
    model: nn.Module, weights: Sequence[Tensor], images: Tensor, labels: Tensor, vectors: Sequence[Tensor]
) -> list[Tensor]:
    """H·v over all of ``weights`` at once, split as they are: Σ_m H_lm v_m for each layer l. Zeros where nothing depends."""
    gradients = _gradients(model, weights, images, labels)
    used = [(g, v) for g, v in zip(gradients, vectors, strict=True) if g is not None and g.requires_grad]
    if not used:
        return [torch.zeros_like(weight) for weight in weights]
    dot = torch.stack([(g * v).sum() for g, v in used]).sum()
    products = torch.autograd.grad(dot, list(weights), allow_unused=True)
    return [torch.zeros_like(w) if hv is None else hv for w, hv in zip(weights, products, strict=True)]


def top_eigenvalues(
    model: nn.Module,
    layers: Sequence[Layer],
    images: Tensor,
    labels: Tensor,
    *,
    rounds: int,
    tolerance: float,
    seed: int = 0,
    watch: Watch = no_progress,
) -> Tensor:
    """[layers] float64: the largest eigenvalue of each H_l, by power iteration from a random vector.

    At most ``rounds`` products, until the value moves by less than ``tolerance`` of itself. Where the iteration ends on a
    negative eigenvalue −a (the one of largest magnitude), it goes on with H_l + a, whose largest is the one looked for.
    """
    rng = torch.Generator().manual_seed(seed)
    values = torch.zeros(len(layers), dtype=torch.float64)
    with differentiating(model, layers) as weights, watch("eigenvalues, layer by layer", len(layers)) as tell:
        gradients = _gradients(model, weights, images, labels)  # one graph for all layers and rounds
        for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            if gradient is not None and gradient.requires_grad:
                found = _largest(gradient, weight, rng, rounds, tolerance, shift=0.0)
                if found < 0:
                    found += _largest(gradient, weight, rng, rounds, tolerance, shift=-found)
                    # of H + a, minus the shift: found is −a, so that the sum is the eigenvalue of H
                values[index] = found
            tell(index + 1)
    return values


def _largest(
    gradient: Tensor, weight: Tensor, rng: torch.Generator, rounds: int, tolerance: float, *, shift: float
) -> float:
    """The eigenvalue of largest magnitude of H_l + shift: vᵀ(H + shift)v at the v that the iteration reached."""
    vector = torch.randn(weight.shape, generator=rng).to(weight)
    vector /= vector.norm().clamp_min(1e-30)
    value = 0.0
    for _ in range(rounds):
        (product,) = torch.autograd.grad(
            gradient, weight, grad_outputs=vector, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        product = product + shift * vector
        before, value = value, float((vector.double() * product.double()).sum())
        size = product.norm()
        if not size > 0:
            return 0.0
        vector = product / size
        if abs(value - before) <= tolerance * abs(value):
            break
    return value


def _gradients(
    model: nn.Module, weights: Sequence[Tensor], images: Tensor, labels: Tensor
) -> tuple[Tensor | None, ...]:
    """dL/dW of each layer, as functions of the weights; None for a weight that the loss does not depend on."""
    loss = F.cross_entropy(logits_of(model(images)), labels)
    return torch.autograd.grad(loss, list(weights), create_graph=True, allow_unused=True)


def _signs(like: Tensor, rng: torch.Generator) -> Tensor:
    """±1 with equal chances, of a tensor's shape."""
    return torch.randint(0, 2, like.shape, generator=rng).mul_(2).sub_(1).to(like)
