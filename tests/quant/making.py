"""What several files of this folder make or measure."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csqcli.quant.layers import Layer


def layers_of(weights: list[int]) -> list[Layer]:
    """A layer for each number of weights, whatever they are."""
    return [Layer(f"{index}.weight", nn.Parameter(torch.empty(count))) for index, count in enumerate(weights)]


def held_bytes(state: object) -> int:
    """Bytes of every tensor in a state dict."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(held_bytes, parts))
