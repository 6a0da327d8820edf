"""Which device to compute on."""

from __future__ import annotations

import torch

from csqcli.errors import UserError


def pick_device(name: str) -> torch.device:
    """``auto`` → a GPU when there is one. UserError when one is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is available", where="--device cuda", hint="use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
