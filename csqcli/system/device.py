"""Which device to compute on."""

from __future__ import annotations

import torch

from csqcli.errors import UserError


def pick_device(name: str) -> torch.device:
    """``auto`` → a CUDA GPU when there is one. UserError for a device that this machine does not have, or nobody has."""
    where, hint = f"--device {name}", "use --device cpu or auto"
    kind, _, number = name.partition(":")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise UserError("no CUDA device is available", where=where, hint=hint)
        count = torch.cuda.device_count()
        if number and not (number.isdecimal() and int(number) < count):
            there = "only cuda:0 is" if count == 1 else f"cuda:0 to cuda:{count - 1} are"
            raise UserError(f"no such device; {there} available", where=where)
        if number:
            torch.cuda.set_device(int(number))  # kernels run on the current one
    elif name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("no Apple GPU is available to PyTorch", where=where, hint=hint)
    elif name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name != "cpu":
        raise UserError("no such device", where=where, hint="cpu, cuda, cuda:N, mps or auto")
    return torch.device(name)
