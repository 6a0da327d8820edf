"""Models for tests that need a factory: no BatchNorm, so a doubled batch and two processes see the same mathematics."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


def group_norm_cnn(num_classes: int = 10) -> nn.Module:
    """Two convolutions with GroupNorm for 8×8 digits."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )
    model.data_config = {"input_size": (1, 8, 8), "mean": (0.29,), "std": (0.35,)}
    return model


def says_nothing(num_classes: int = 10) -> nn.Module:
    """A factory's model without a data config, for images of any size with three channels."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


def seven(num_classes: int = 10) -> nn.Module:
    """A factory that does not mind how many classes it is asked for."""
    return says_nothing(7)


def dropout_cnn(num_classes: int = 10) -> nn.Module:
    """Draws numbers while it trains."""
    model = nn.Sequential(group_norm_cnn(32), nn.Dropout(0.3), nn.Linear(32, num_classes))
    model.data_config = {"input_size": (1, 8, 8), "mean": (0.29,), "std": (0.35,)}
    return model


def layer_norm_cnn(num_classes: int = 10) -> nn.Module:
    """A convolution into four patches with LayerNorm behind it, as ConvNeXt and ViT have it, for 8×8 digits."""
    model = nn.Sequential(
        nn.Conv2d(1, 24, 4, stride=4),
        nn.Flatten(),
        nn.LayerNorm(96),
        nn.Linear(96, 32),
        nn.GELU(),
        nn.Linear(32, num_classes),
    )
    model.data_config = {"input_size": (1, 8, 8), "mean": (0.29,), "std": (0.35,)}
    return model


def pooled_batchnorm(num_classes: int = 10) -> nn.Module:
    """BatchNorm on one value per image and channel, as behind a squeeze: a single image has no variance."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, num_classes),
    )
    model.data_config = {"input_size": (1, 8, 8), "mean": (0.29,), "std": (0.35,)}
    return model


def features() -> nn.Module:
    """Feature maps and no classifier."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1))
    model.data_config = {"input_size": (1, 8, 8), "mean": (0.29,), "std": (0.35,)}
    return model


class Corners(nn.Module):
    """Layers that a quantizer meets once a year: all zeros, one weight, one value, an outlier, and 1e-30 next to 1e30."""

    data_config: ClassVar = {"input_size": (1, 8, 8), "mean": (0.29,), "std": (0.35,)}

    def __init__(self, num_classes: int = 10, tiny: float = 1e-30) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.zeros = nn.Conv2d(16, 16, 1, bias=False)
        self.single = nn.Conv2d(1, 1, 1, bias=False)
        self.constant = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.tiny = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.huge = nn.Conv2d(32, 32, 1, bias=False)
        self.outlier = nn.Linear(32, num_classes)
        with torch.no_grad():
            self.zeros.weight.zero_()
            self.constant.weight.fill_(0.1)
            self.tiny.weight.mul_(tiny)
            self.huge.weight.div_(tiny)
            self.outlier.weight[0, 0] = 300.0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x) + self.single(x))
        x = x + self.zeros(x) + self.constant(x)
        x = torch.relu(self.huge(torch.relu(self.tiny(x))))
        return self.outlier(x.mean(dim=(2, 3)))


def tanhs(num_classes: int = 10) -> nn.Module:
    """Layers whose inputs have both signs."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )
    model.data_config = {"input_size": (1, 8, 8), "mean": (0.29,), "std": (0.35,)}
    return model


class Attending(nn.Module):
    """nn.MultiheadAttention over the rows of an image; a transposed convolution in front, whose inputs `--epochs 0` does not see."""

    data_config: ClassVar = {"input_size": (1, 8, 8), "mean": (0.29,), "std": (0.35,)}

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.widened = nn.ConvTranspose2d(1, 1, 2, stride=2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.widened(x).flatten(1, 2)
        return self.head((rows + self.attention(rows, rows, rows)[0]).mean(dim=1))
