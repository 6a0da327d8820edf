"""Architectures of the paper's tables that neither timm nor torchvision has, and the digits network of the demo.

Names start with what they were made for (``cifar_resnet20``), so that nobody takes them for timm's 224-pixel models.
Each class carries a ``data_config`` in timm's terms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CIFAR_CONFIG: dict[str, Any] = {
    "input_size": (3, 32, 32),
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.2010),  # mean of per-image deviations: what published CIFAR checkpoints were trained with
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}
DIGITS_CONFIG: dict[str, Any] = {
    "input_size": (1, 8, 8),
    "mean": (0.2873,),
    "std": (0.3539,),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut; 1×1 convolution and BatchNorm where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + shortcut)


class CifarResNet(nn.Module):
    """ResNet-(6n+2) for 32×32 images (He et al. 2016, section 4.2) with 1×1 downsamples, torchvision-style names."""

    data_config = CIFAR_CONFIG

    def __init__(self, blocks: int, *, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, stride=1)
        self.layer2 = self._stage(width, 2 * width, blocks, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, stride=2)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, *, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))


class CifarVGG19BN(nn.Module):
    """VGG-19 with BatchNorm for 32×32 images: 16 convolutions, five poolings, one linear classifier."""

    data_config = CIFAR_CONFIG
    stages = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))

    def __init__(self, *, num_classes: int = 10) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        channels = 3
        for width, convolutions in self.stages:
            for _ in range(convolutions):
                modules += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            modules.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*modules)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class DigitsCNN(nn.Module):
    """Three small convolutions for scikit-learn's 8×8 digits; 19k weights."""

    data_config = DIGITS_CONFIG

    def __init__(self, *, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 48, 3, padding=1, stride=2, bias=False)
        self.bn3 = nn.BatchNorm2d(48)
        self.fc = nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.fc(x.mean(dim=(2, 3)))


def cifar_resnet20(num_classes: int = 10) -> nn.Module:
    """The paper's CIFAR-10 ResNet-20: stem of 16, stages 16/32/64 of three blocks."""
    return CifarResNet(3, num_classes=num_classes)


def cifar_resnet8(num_classes: int = 10) -> nn.Module:
    """One block per stage: the small proxy of benchmarks/accuracy/quality.py."""
    return CifarResNet(1, num_classes=num_classes)


def cifar_vgg19bn(num_classes: int = 10) -> nn.Module:
    """The paper's CIFAR-10 VGG19BN."""
    return CifarVGG19BN(num_classes=num_classes)


def digits_cnn(num_classes: int = 10) -> nn.Module:
    """The network of the embedded digits checkpoint."""
    return DigitsCNN(num_classes=num_classes)


REGISTRY = {f.__name__: f for f in (cifar_resnet20, cifar_resnet8, cifar_vgg19bn, digits_cnn)}
