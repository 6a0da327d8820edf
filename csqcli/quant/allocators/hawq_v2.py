"""HAWQ-V2 (Dong et al., NeurIPS 2020): the mean Hessian trace of a layer times its squared quantization error.

Ω_l(k) = Tr(H_l)/n_l · ‖Q_k(W_l) − W_l‖² is twice the loss that rounding is expected to cost (Lemma 1). The paper lists
combinations of widths under a size limit and takes that of the least Σ Ω; the knapsack finds the same minimum exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from csqcli.quant.allocators.hessian import hessian_traces
from csqcli.quant.layers import Layer
from csqcli.quant.masks import savings
from csqcli.quant.measuring import Batches, Watch, no_progress, squared_errors

_PROBES = 50  # the authors' number of Hutchinson vectors


def trace_importance(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Batches,
    bits: int,
    *,
    seed: int = 0,
    watch: Watch = no_progress,
) -> Tensor:
    """[layers, bits] float64: ½ Tr(H_l)/n_l (‖W − Q_b‖² − ‖W − Q_{b+1}‖²); a trace below 0 counts as 0."""
    traces = hessian_traces(model, layers, batches, probes=_PROBES, seed=seed, watch=watch)
    counts = torch.tensor([layer.weights for layer in layers], dtype=torch.float64)
    return savings(squared_errors(layers, bits) * (traces.clamp_min(0) / counts).unsqueeze(1), 1.0)
