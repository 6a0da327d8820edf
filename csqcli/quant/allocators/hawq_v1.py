"""HAWQ (Dong et al., ICCV 2019): the top Hessian eigenvalue of a layer times its squared quantization error.

The paper orders layers by λ_l/n_l (its Eq. 9) and leaves the widths that fit this order to a person, and orders their
retraining by λ_l·‖Q(W_l) − W_l‖² (its Eq. 11). That product, which bounds twice the loss that rounding costs, is the value
here; the knapsack divides it by the cost of a plane, n_l weights, and so keeps the paper's order.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.quant.allocators.hessian import PART, top_eigenvalues
from csqcli.quant.layers import Layer
from csqcli.quant.masks import savings
from csqcli.quant.measuring import Batches, Watch, chunks, no_progress, squared_errors

_ROUNDS, _TOLERANCE = 20, 1e-2


def eigenvalue_importance(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Batches,
    bits: int,
    *,
    seed: int = 0,
    watch: Watch = no_progress,
) -> Tensor:
    """[layers, bits] float64: ½ λ_l (‖W − Q_b‖² − ‖W − Q_{b+1}‖²), λ_l on the first images of ``batches``; below 0 it is 0."""
    first = next(iter(chunks(batches, PART)), None)
    if first is None:
        raise UserError("no image could be used", where="--allocator hawq-v1")
    values = top_eigenvalues(model, layers, *first, rounds=_ROUNDS, tolerance=_TOLERANCE, seed=seed, watch=watch)
    return savings(squared_errors(layers, bits) * values.clamp_min(0).unsqueeze(1), 1.0)
