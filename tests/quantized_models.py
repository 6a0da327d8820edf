"""Small quantized files and modules for the export tests, made without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from timm.layers import ScaledStdConv2d
from torch import Tensor, nn

from csqcli.file import io
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import ActivationEntry, ModelRecord
from csqcli.models import libraries as sources
from csqcli.quant import activations, equations
from csqcli.quant.hard_layer import HardLayer, hard_layer
from csqcli.quant.layers import find_layers

SMALL_IMAGES: dict[str, Any] = {"input_size": (3, 12, 12), "mean": (0.5,), "std": (0.25,), "interpolation": "bilinear"}
MASKS = ("11000000", "10010000", "11110000", "00000001", "11111111")  # contiguous, with a hole, one plane, 9-bit span


def harden(model: nn.Module, masks: Sequence[str] = MASKS, *, per_channel: bool = False) -> list[HardLayer]:
    """Round every weight to the planes of its mask (taken in turn), in place, and return the layers.

    ``per_channel`` gives every channel a step of its own, whatever it was.
    """
    hard = []
    for number, layer in enumerate(find_layers(model)[0]):
        mask = equations.mask_from_string(masks[number % len(masks)])
        scale = layer.parameter.detach().abs().max().clamp_min(1e-3).reshape(1)
        integers = equations.quantize_integers(layer.parameter.detach(), scale, 8)
        kept = int(sum(2**b for b, on in enumerate(mask.tolist()) if on))
        delivered = hard_layer(layer, integers.sign() * (integers.abs() & kept), scale / 255, mask)
        if per_channel:
            steps = delivered.scale * torch.linspace(0.5, 1.5, layer.parameter.shape[layer.channel_dim])
            delivered = replace(delivered, scale=steps)
        hard.append(delivered)
        layer.parameter.data.copy_(hard[-1].weight())
    return hard


def shake(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters as after training, negative and zero γ among them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if not module.affine:
                continue
            nn.init.uniform_(module.weight, -1.0, 1.0)
            nn.init.normal_(module.bias, 0, 0.1)
            with torch.no_grad():
                module.weight[0] = 0.0
    return model


def make_file(
    source: str, masks: Sequence[str] = MASKS, *, num_classes: int = 10, per_channel: bool = False, **details: Any
) -> QuantizedFile:
    """A quantized file of a random network."""
    torch.manual_seed(0)
    spec = sources.parse(source)
    model = shake(sources.build(spec, num_classes=num_classes)).eval()
    record = ModelRecord(
        source=spec.source, library=spec.library, name=spec.name, num_classes=num_classes, weights_from="random"
    )
    config = sources.data_config(model, spec)
    layers = harden(model, masks, per_channel=per_channel)
    return io.assemble(model, layers, record=record, data_config=config, target_bits=None, **details)


class Traps(nn.Module):
    """One of every operation whose weight an exporter likes to lose, fold, transpose or duplicate."""

    data_config: ClassVar = {"input_size": (3, 16, 16), "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear"}

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.up = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.down = nn.ConvTranspose2d(12, 16, 3, stride=1, padding=1, groups=2)
        self.zeros = nn.Conv2d(16, 16, 1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.tied = nn.Linear(16, 16)
        self.tied_too = nn.Linear(16, 16, bias=False)
        self.tied_too.weight = self.tied.weight
        self.head = nn.Linear(16, num_classes)
        self.unused = nn.Linear(16, 4)
        nn.init.zeros_(self.zeros.weight)
        nn.init.zeros_(self.stem.weight[3])  # type: ignore[arg-type]  # an all-zero channel

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.depthwise(self.grouped(x)) + x
        x = self.down(self.up(x)).mean(-1) + self.zeros(x).mean(-1).repeat_interleave(2, -1)
        x = x.transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        x = torch.relu(self.tied_too(torch.relu(self.tied(x))))
        return {"out": self.head(x.mean(1)), "aux": x}


class Norms(nn.Module):
    """BatchNorms that fold with the convolution before them, and those that must not."""

    data_config: ClassVar = Traps.data_config

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.plain, self.plain_norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-2)  # ε that shows
        self.read_twice, self.read_twice_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.used_twice, self.used_twice_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.standard, self.standard_norm = ScaledStdConv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.bare = nn.BatchNorm2d(8, affine=False)
        self.linear, self.linear_norm = nn.Linear(8, 12, bias=False), nn.BatchNorm1d(12)
        self.head = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.plain_norm(self.plain(x)))
        y = self.read_twice(x)
        x = self.read_twice_norm(y) + y
        x = self.used_twice(x) + self.used_twice_norm(self.used_twice(x))
        x = torch.relu(self.bare(self.standard_norm(self.standard(x)))).mean((2, 3))
        return self.head(torch.relu(self.linear_norm(self.linear(x))))


class Branching(nn.Module):
    """Control flow that depends on the data: nothing can trace it."""

    data_config: ClassVar = Traps.data_config

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.fc = nn.Linear(3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return self.fc(x) if float(x.sum()) > 0 else self.fc(-x)


def file_with_scales(
    model: nn.Module, source: str, masks: Sequence[str], *, bits: int | None, num_classes: int = 10
) -> QuantizedFile:
    """A quantized file of ``model`` (in eval mode; changed), its layers' inputs calibrated to ``bits`` on seeded noise."""
    hard = harden(model, masks)
    config = model.data_config
    entries = []
    if bits is not None:
        rng = torch.Generator().manual_seed(1)
        batches = [torch.randn(8, *config["input_size"], generator=rng) for _ in range(2)]
        quantizers = activations.calibrate(model, find_layers(model)[0], batches, bits=bits)
        entries = [ActivationEntry(**vars(record)) for record in quantizers.records()]
    record = ModelRecord(source=source, library="factory", name=source, num_classes=num_classes, weights_from="random")
    return io.assemble(model, hard, record=record, data_config=config, target_bits=None, activations=entries)
