"""What names of weights say, and how many planes there may be. Loads no PyTorch."""

from __future__ import annotations

MOST_PLANES = 8  # of a layer, and what it starts with where nothing else is said
FLOAT_BITS = 32  # of weights and activations that are not rounded
INT8_PLANES = 7  # integers up to ±127


def owner_of(name: str) -> str:
    """The module that a weight of this name belongs to."""
    return name.rpartition(".")[0].removesuffix(".parametrizations.weight")
