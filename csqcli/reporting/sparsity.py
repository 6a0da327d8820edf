"""The sparsity that a runtime could use, counted in a file's integers: whole layers, filters, input channels, and 2:4 groups.

Single zeros that lie anywhere save bytes (the coder's) and nothing at run time. A filter (output channel) of zeros can be left
out with whatever reads it, an input channel of zeros with whatever makes it, and GPUs have kernels for weights of which at most
two in any four neighbours along the inputs are not 0 (semi-structured, 2:4). NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_GROUP, _KEPT = 4, 2


@dataclass(frozen=True)
class LayerSparsity:
    """Counts of one layer's zeros. Filters are the places along ``channel_dim``, inputs those along the other of the first two
    dimensions; where a convolution has groups, an input is the same place in each of them."""

    weights: int
    zeros: int
    filters: int
    empty_filters: int  # all of whose weights are 0
    inputs: int
    empty_inputs: int
    left: int  # weights that neither an empty filter nor an empty input has
    groups: (
        int  # of four inputs next to each other, at the same filter and kernel position; incomplete ones do not count
    )
    sparse_groups: int  # of which at most two weights are not 0


def count_sparsity(nonzero: np.ndarray, *, channel_dim: int = 0) -> LayerSparsity:
    """Counts of a layer whose weights are 0 where ``nonzero`` (bool, of the weight's shape, two dimensions or more) is False."""
    rows = np.moveaxis(nonzero, channel_dim, 0)
    filters, inputs = rows.shape[:2]
    positions = math.prod(rows.shape[2:])
    rows = rows.reshape(filters, inputs, positions)
    full_filters = int(rows.any(axis=(1, 2)).sum())
    full_inputs = int(rows.any(axis=(0, 2)).sum())
    fours = rows[:, : inputs - inputs % _GROUP].reshape(filters, inputs // _GROUP, _GROUP, positions)
    per_group = fours.sum(axis=2, dtype=np.uint8)
    return LayerSparsity(
        weights=rows.size,
        zeros=rows.size - int(np.count_nonzero(rows)),
        filters=filters,
        empty_filters=filters - full_filters,
        inputs=inputs,
        empty_inputs=inputs - full_inputs,
        left=full_filters * full_inputs * positions,
        groups=per_group.size,
        sparse_groups=int((per_group <= _KEPT).sum()),
    )


def described(found: Mapping[str, LayerSparsity]) -> dict[str, Any] | None:
    """The sparsity of a model as its report has it: of the whole, and a list of its layers. None where nothing was counted."""
    if not found:
        return None
    whole = total(found)
    counts = ("filters", "empty_filters", "inputs", "empty_inputs")
    return {
        **_shares(whole),
        "empty_layers": sum(layer.zeros == layer.weights for layer in found.values()),
        **{name: getattr(whole, name) for name in counts},
        "layers": [
            {"name": name, **_shares(layer), **{count: getattr(layer, count) for count in counts}}
            for name, layer in found.items()
        ],
    }


def total(found: Mapping[str, LayerSparsity]) -> LayerSparsity:
    """The sums over all layers."""
    rows = [asdict(layer) for layer in found.values()]
    return LayerSparsity(**{name: sum(row[name] for row in rows) for name in rows[0]})


def sentence(found: Mapping[str, LayerSparsity]) -> str:
    """The sparsity of a model in a line: ``61.2 % of weights are 0; empty: 1 of 4 layers, …``."""
    whole = total(found)
    layers = sum(layer.zeros == layer.weights for layer in found.values())
    structured = 100 * (1 - whole.left / max(whole.weights, 1))
    groups = f"; {100 * whole.sparse_groups / whole.groups:.1f} % of groups of four are 2:4" if whole.groups else ""
    return (
        f"{100 * whole.zeros / max(whole.weights, 1):.1f} % of weights are 0; empty: {layers} of {len(found)} layers, "
        f"{whole.empty_filters:,} of {whole.filters:,} filters, {whole.empty_inputs:,} of {whole.inputs:,} input channels, "
        f"{structured:.1f} % of weights with them{groups}"
    )


def _shares(layer: LayerSparsity) -> dict[str, float | None]:
    weights = max(layer.weights, 1)
    return {
        "zeros": layer.zeros / weights,
        "structured": (layer.weights - layer.left) / weights,
        "two_of_four": layer.sparse_groups / layer.groups if layer.groups else None,
    }
