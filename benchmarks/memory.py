"""Peak memory of training, in bytes per weight, of csq and its relatives beyond float training.

    python benchmarks/memory.py --json runs/memory.json

A stack of large linear layers at batch 1, so that activations do not count; each method trains in a process of its own
through all of its stages. float is SGD with momentum: weight, gradient and momentum, 12 bytes a weight.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import measure

from csqcli.quant.latent import LatentUniform, StagedCSQ, StagedSettings
from csqcli.quant.layers import find_layers
from csqcli.quant.methods import Clock, GateMethod, GateSettings, WeightMethod
from csqcli.quant.optimizer import QuantizedOptimizer, base_groups

METHODS = ("float", "csq", "csq, bfloat16 state", "ste", "csq-paper", "csq-paper, bfloat16 state")
STEPS = 8


def make(name: str, model: nn.Module) -> WeightMethod:
    layers, _ = find_layers(model)
    clock = Clock(STEPS, STEPS)
    name, _, state = name.partition(", ")
    dtype = torch.bfloat16 if state else torch.float32
    if name == "float":
        return WeightMethod([], clock)
    if name == "ste":
        return LatentUniform(layers, clock, planes=[3] * len(layers), learned_step=False)
    if name == "csq":
        return StagedCSQ(layers, clock, StagedSettings(target_bits=3, search_share=0.4, state_dtype=dtype))
    return GateMethod(layers, clock, GateSettings(target_bits=3, state_dtype=dtype))


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


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=40)
    arguments = parser.parse_args()
    peaks: dict[str, Any] = {
        name: measure.in_fresh_process(peak, name, arguments.width, arguments.depth, arguments.device)
        for name in METHODS
    }
    measure.emit(
        {
            "ratio": peaks["csq"] / peaks["float"],
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
