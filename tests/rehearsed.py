"""Models that train like any other and that no file can hold, each for another reason."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Net(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4, num_classes)
        self.data_config = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).mean((2, 3)))


def scale_beside_a_weight(num_classes: int) -> nn.Module:
    net = _Net(num_classes)
    net.conv.register_buffer("weight_scale", torch.ones(1))
    return net


def complex_buffer(num_classes: int) -> nn.Module:
    net = _Net(num_classes)
    net.register_buffer("phases", torch.ones(3, dtype=torch.complex64))
    return net


def uint16_buffer(num_classes: int) -> nn.Module:
    net = _Net(num_classes)
    net.register_buffer("table", torch.ones(3, dtype=torch.uint16))
    return net


def long_name(num_classes: int) -> nn.Module:
    net = _Net(num_classes)
    net.add_module("x" * 600, nn.Linear(4, 4))
    return net


class _Extra(_Net):
    def get_extra_state(self) -> Any:
        return {"epoch": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def extra_state(num_classes: int) -> nn.Module:
    return _Extra(num_classes)


def nine_dimensions(num_classes: int) -> nn.Module:
    net = _Net(num_classes)
    net.odd = nn.Module()
    net.odd.weight = nn.Parameter(torch.ones(2, 1, 1, 1, 1, 1, 1, 1, 2))
    return net
