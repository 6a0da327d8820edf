"""Test vectors of the bit-packed forms: small files, and beside each what a reader must find in it.

``python -m tests.file.vectors`` writes them anew. The expected hashes are taken from the models in memory, before anything is
packed, by NumPy and hashlib alone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from csqcli.exporting.folding import fold, in_16_bits
from csqcli.file import io
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import ModelRecord
from csqcli.models.networks import DIGITS_CONFIG
from csqcli.quant.hard_layer import HardLayer, top_planes

FOLDER = Path(__file__).parent


def write(folder: Path) -> list[Path]:
    """All vectors; the files' paths. Each has its expectations beside it as JSON."""
    paths = []
    for name, file in (
        ("plain", plain()),
        ("small", small()),
        ("basis", basis()),
        ("basis-small", in_16_bits(basis())),
    ):
        path = folder / f"{name}.safetensors"
        io.write(path, file, form="bit-packed")
        path.with_suffix(".json").write_text(json.dumps(expected(file), indent=1, sort_keys=True) + "\n")
        paths.append(path)
    return paths


def expected(file: QuantizedFile) -> dict[str, Any]:
    """SHA-256 of every layer's integers (little-endian int16) and of every tensor of the state dict (little-endian)."""
    integers = {layer.name: layer.integers.numpy().astype("<i2") for layer in file.layers}
    tensors: dict[str, Any] = {}
    for layer in file.layers:
        weight = _weight(layer)
        tensors |= {name: _described("float32", weight) for name in (layer.name, *layer.aliases)}
    for name, value in file.others.items():
        plain_bytes = value.contiguous().reshape(-1).view(torch.uint8).numpy().reshape(-1)
        kind = str(value.dtype).removeprefix("torch.")
        tensors[name] = _described(kind, plain_bytes) | {"shape": list(value.shape)}
    return {
        "integers": {name: hashlib.sha256(values.tobytes()).hexdigest() for name, values in integers.items()},
        "tensors": tensors,
    }


def _described(kind: str, values: np.ndarray) -> dict[str, Any]:
    digest = hashlib.sha256(values.tobytes()).hexdigest()
    return {"dtype": kind, "shape": list(values.shape), "sha256": digest}


def _weight(layer: HardLayer) -> np.ndarray:
    """Integers × scale, or signed sums of the basis, in NumPy float32."""
    integers = np.moveaxis(layer.integers.numpy(), layer.channel_dim, -1)
    if layer.basis is None:
        weight = integers.astype(np.float32) * layer.scale.numpy()
    else:
        number = (integers + 2 ** len(layer.basis) - 1) // 2
        signed = [np.where(number >> j & 1, row, -row) for j, row in enumerate(layer.basis.numpy())]
        weight = signed[0]
        for part in signed[1:]:
            weight = weight + part
    return np.ascontiguousarray(np.moveaxis(weight, -1, layer.channel_dim), dtype="<f4")


class _Corners(nn.Module):
    """Every code width and type, a transposed channel dimension, a tied name, a layer of zeros, empty and scalar tensors."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.two, self.four, self.eight, self.sixteen, self.none = (nn.Parameter(torch.zeros(1)) for _ in range(5))
        self.tied = self.four
        for name, value in {
            "halves": torch.randn(7, generator=rng).half().float(),
            "singles": torch.randn(3, 5, generator=rng),
            "doubles": torch.randn(2, dtype=torch.float64, generator=rng),
            "float16s": torch.randn(3, generator=rng).half(),
            "bfloat16s": torch.randn(3, generator=rng).bfloat16(),
            "steps": torch.tensor(2**40 + 3),
            "ints": torch.arange(-3, 4, dtype=torch.int32),
            "shorts": torch.arange(-300, 301, 100, dtype=torch.int16),
            "bytes": torch.arange(0, 256, 51, dtype=torch.uint8),
            "signed": torch.arange(-2, 3, dtype=torch.int8),
            "flags": torch.tensor([True, False, True]),
            "empty": torch.zeros(0, 4),
            "zeros": torch.zeros(6),
            "tiny": torch.tensor([2.0**-130, -(2.0**-149), 0.0]),
            "naïve_ß": torch.tensor([1.5]),
        }.items():
            self.register_buffer(name, value)


def _record() -> ModelRecord:
    return ModelRecord(source="m:f", library="factory", name="m:f", num_classes=3, weights_from="random")


def _random(low: int, high: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def plain() -> QuantizedFile:
    """``--bit-packed`` of a made-up model."""
    model, rng = _Corners(), torch.Generator().manual_seed(1)
    mask = torch.tensor
    few = (torch.rand(40, 30, generator=rng) < 0.1).int() * _random(-1, 1, 40, 30, seed=2)  # runs of zeros
    layers = [
        HardLayer("two", few, torch.tensor([0.123456789]), top_planes(1, 8)),
        HardLayer(
            "four", _random(-7, 7, 5, 3, 3, 3, seed=3), torch.rand(5, generator=rng), top_planes(3, 8), 0, ("tied",)
        ),
        HardLayer("eight", _random(-127, 127, 3, 4, 7, seed=4), torch.rand(4, generator=rng), top_planes(7, 8), 1),
        HardLayer("sixteen", _random(-255, 255, 9, 11, seed=5), torch.tensor([2.0**-20 / 3]), mask([True] * 8)),
        HardLayer("none", torch.zeros(2, 3, dtype=torch.int32), torch.tensor([1.0]), mask([False] * 8)),
    ]
    return io.assemble(model, layers, record=_record(), data_config=DIGITS_CONFIG, target_bits=None)


def small() -> QuantizedFile:
    """``--bit-packed-small`` of a convolution, BatchNorm and a linear layer."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)).eval()
    for value in (model[1].weight, model[1].bias, model[1].running_mean, model[1].running_var):  # type: ignore[union-attr]
        nn.init.uniform_(value, 0.5, 1.5)  # type: ignore[arg-type]
    layers = [
        HardLayer("0.weight", _random(-3, 3, 6, 1, 3, 3, seed=6), torch.rand(6), top_planes(2, 8)),
        HardLayer("4.weight", _random(-1, 1, 3, 216, seed=7), torch.rand(3), top_planes(1, 8)),
    ]
    for layer in layers:
        dict(model.named_parameters())[layer.name].data.copy_(layer.weight())
    file = io.assemble(model, layers, record=_record(), data_config=DIGITS_CONFIG, target_bits=None)
    return in_16_bits(fold(file, model, (1, 8, 8)).file)


def basis() -> QuantizedFile:
    """Layers of a learned basis, per filter and one for all."""
    rng = torch.Generator().manual_seed(8)
    model = nn.Sequential(nn.Linear(20, 6), nn.Linear(6, 3))
    layers = [
        HardLayer(
            f"{index}.weight",
            2 * _random(0, 2**k - 1, *shape, seed=9 + index) - (2**k - 1),
            torch.ones(1),
            top_planes(k, 8),
            dim,
            basis=torch.rand(k, columns, generator=rng),
        )
        for index, k, shape, dim, columns in ((0, 3, (6, 20), 1, 20), (1, 2, (3, 6), 0, 1))
    ]
    return io.assemble(model, layers, record=_record(), data_config=DIGITS_CONFIG, target_bits=None)
