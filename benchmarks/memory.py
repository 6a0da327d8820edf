"""Peak memory of training, in bytes per weight, of csq and its relatives beyond float training.

    python benchmarks/memory.py --json runs/memory.json

A stack of large linear layers at batch 1, so that activations do not count; each method trains in a process of its own
through all of its stages. float is SGD with momentum: weight, gradient and momentum, 12 bytes a weight.

    python benchmarks/memory.py --estimate --json runs/memory-estimate.json

sets what csq says a step will take (csqcli/system/memory.py) against what a process grows by in three of them.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import measure

from csqcli.models import libraries as sources
from csqcli.quant.layers import find_layers
from csqcli.quant.method_settings import StagedSettings
from csqcli.quant.methods.base import FloatTraining, Schedule, WeightMethod, plan_for
from csqcli.quant.methods.csq import BitLevelCSQ
from csqcli.quant.methods.staged import Staged
from csqcli.quant.methods.uniform import StraightThrough
from csqcli.quant.optimizer import QuantizedOptimizer, base_groups
from csqcli.system import memory

METHODS = ("float", "staged", "staged, bfloat16 state", "ste", "csq", "csq, bfloat16 state")
STEPS = 8
SIZE = (3, 224, 224)
MODELS = (
    ("torchvision:resnet18", 16, False),
    ("torchvision:resnet18", 32, False),
    ("torchvision:resnet18", 32, True),
    ("timm:resnet50", 16, False),
    ("torchvision:densenet121", 8, False),
    ("torchvision:mobilenet_v3_small", 32, False),
    ("timm:regnetx_002", 64, False),
    ("timm:efficientnet_b0", 16, False),
    ("timm:convnext_atto", 16, False),
    ("timm:vit_tiny_patch16_224", 16, False),
    ("timm:vit_tiny_patch16_224", 16, True),
)


def make(name: str, model: nn.Module) -> WeightMethod:
    layers, _ = find_layers(model)
    schedule = Schedule(STEPS, STEPS)
    name, _, state = name.partition(", ")
    dtype = torch.bfloat16 if state else torch.float32
    if name == "float":
        return FloatTraining([], plan_for([], 3, schedule))
    if name == "ste":
        return StraightThrough(layers, plan_for(layers, 3, schedule, planes=[3] * len(layers)))
    plan = plan_for(layers, 3, schedule, state_dtype=dtype)
    if name == "staged":
        return Staged(layers, plan, StagedSettings(search_share=0.4))
    return BitLevelCSQ(layers, plan)


def peak(name: str, width: int, depth: int, device: str) -> float:
    """Peak bytes per weight, weights themselves included."""
    before = measure.peak_bytes(device)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False, device=device) for _ in range(depth)))
    method = make(name, model)
    optimizer = QuantizedOptimizer(
        method, torch.optim.SGD(base_groups(model, method) or model.parameters(), lr=1e-3, momentum=0.9)
    )
    images = torch.randn(1, width, device=device)
    for _ in range(STEPS):
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (measure.peak_bytes(device) - before) / (width * width * depth)


def estimated_and_measured(name: str, images: int, amp: bool, device: str) -> dict[str, float]:
    """Bytes that three steps of SGD with momentum take beyond model and images."""
    model = sources.load(name, num_classes=1000, pretrained=False).model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    pixels, labels = torch.randn(images, *SIZE, device=device), torch.randint(1000, (images,), device=device)
    before = measure.peak_bytes(device)
    for _ in range(3):
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            scores = model(pixels)
        nn.functional.cross_entropy(scores.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = measure.peak_bytes(device) - before
    step = memory.estimate(model, SIZE, state_bytes=4, amp=amp, device=torch.device(device))
    return {"estimated": step.of(images), "measured": measured, "ratio": step.of(images) / measured}


def estimates(device: str) -> dict[str, Any]:
    rows = {
        f"{name}, {images} images, {'bfloat16' if amp else 'float32'}": measure.in_fresh_process(
            estimated_and_measured, name, images, amp, device
        )
        for name, images, amp in MODELS
    }
    for row, found in rows.items():
        print(f"| {row} | {found['estimated'] / 2**30:.2f} | {found['measured'] / 2**30:.2f} | {found['ratio']:.2f} |")
    return {
        "ratio": statistics.median(found["ratio"] for found in rows.values()),
        "ratio_of": "bytes that a step is estimated to take / that it took, median of the models",
        "models": rows,
        "machine": measure.machine(device),
    }


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--estimate", action="store_true", help="the estimate of a step against its measured growth")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=40)
    arguments = parser.parse_args()
    if arguments.estimate:
        measure.emit(estimates(arguments.device), arguments.json)
        return
    peaks: dict[str, Any] = {
        name: measure.in_fresh_process(peak, name, arguments.width, arguments.depth, arguments.device)
        for name in METHODS
    }
    measure.emit(
        {
            "ratio": peaks["staged"] / peaks["float"],
            "ratio_of": "peak bytes per weight of csq training / of float training with SGD and momentum",
            "peak_bytes_per_weight": peaks,
            "beyond_float": {name: value - peaks["float"] for name, value in peaks.items()},
            "weights": arguments.width**2 * arguments.depth,
            "machine": measure.machine(arguments.device),
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
