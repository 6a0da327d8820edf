"""Factories as people write them, each with another trap for what trains their models."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Net(nn.Module):
    def __init__(self, num_classes: int, *, channels: int = 1, side: int = 8) -> None:
        super().__init__()
        self.side = side
        self.conv = nn.Conv2d(channels, 4, 3)
        self.fc = nn.Linear(4, num_classes)
        self.data_config = {"input_size": (channels, 8, 8), "mean": (0.5,), "std": (0.5,)}

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[-1] == self.side, f"images of {self.side} pixels only"
        return self.fc(self.conv(images).mean((2, 3)))


def frozen(num_classes: int) -> nn.Module:
    return Net(num_classes).requires_grad_(False)


def expanded(num_classes: int) -> nn.Module:
    net = Net(num_classes)
    net.conv.weight = nn.Parameter(torch.ones(1, 1, 3, 3).expand(4, 1, 3, 3))
    return net


def lazy(num_classes: int) -> nn.Module:
    net = Net(num_classes)
    net.fc = nn.LazyLinear(num_classes)
    return net


def two_channels(num_classes: int) -> nn.Module:
    return Net(num_classes, channels=2)


def twelve_pixels(num_classes: int = 10) -> nn.Module:
    return Net(num_classes, side=12)


def slip(num_classes: int) -> nn.Module:
    return [nn.Identity()][num_classes]


class _Slips(Net):
    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            raise KeyError("no such part")
        return super().forward(images)


def slips_in_training(num_classes: int) -> nn.Module:
    return _Slips(num_classes)


class _DiskSlips(Net):
    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            raise FileNotFoundError(2, "No such file or directory", "table.bin")
        return super().forward(images)


def reads_a_table(num_classes: int) -> nn.Module:
    return _DiskSlips(num_classes)


class _Unbounded(Net):
    """A clip that is off, as gemma4_vit_* of timm have them."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("most", torch.tensor(torch.inf))
        self.register_buffer("least", torch.tensor(-torch.inf))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).clamp(self.least, self.most)


def unbounded(num_classes: int) -> nn.Module:
    return _Unbounded(num_classes)


def half_precision(num_classes: int) -> nn.Module:
    return Net(num_classes).half()


def frozen_convolution(num_classes: int) -> nn.Module:
    model = Net(num_classes)
    model.conv.requires_grad_(False)
    return model


class _Named(Net):
    def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"out": super().forward(images), "aux": images}


def scores_by_name(num_classes: int) -> nn.Module:
    return _Named(num_classes)


def undeclared(num_classes: int) -> nn.Module:
    """Grey images, and no data_config that says so."""
    model = Net(num_classes)
    del model.data_config
    return model
