"""Models for tests that need a factory: no BatchNorm, so a doubled batch and two processes see the same mathematics."""

from __future__ import annotations

from torch import nn


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


def features() -> nn.Module:
    """Feature maps and no classifier."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1))
    model.data_config = {"input_size": (1, 8, 8), "mean": (0.29,), "std": (0.35,)}
    return model
