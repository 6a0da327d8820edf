"""What names of weights say. Loads no PyTorch."""

from __future__ import annotations


def owner_of(name: str) -> str:
    """The module that a weight of this name belongs to."""
    return name.rpartition(".")[0].removesuffix(".parametrizations.weight")
