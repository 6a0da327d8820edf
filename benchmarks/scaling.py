"""How the cost of csq's passes grows: with gates or weights, with layers at equal weights, with images per step.

    python benchmarks/scaling.py --json runs/scaling.json

Times `collect` and `materialise` alone (all that csq adds to a float step). `ratio` is the time per weight at the largest size
over that at the smallest in cache-free territory (10^6 weights): 1 is linear. `slope` is d log(seconds) / d log(size).
Images per step do not enter these passes at all; the last table shows the whole step to be linear in them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import measure

from csqcli.models import libraries as sources
from csqcli.quant.layers import Layer, find_layers
from csqcli.quant.methods.base import Schedule, WeightMethod, plan_for
from csqcli.quant.methods.csq import BitLevelCSQ
from csqcli.quant.methods.staged import Staged
from csqcli.quant.optimizer import QuantizedOptimizer, base_groups

SCHEDULE = Schedule(1000, 100)


def weights(total: int, count: int, device: str) -> list[Layer]:
    """``count`` equal layers of about ``total`` weights together, with gradients."""
    side = max(1, round((total / count) ** 0.5))
    layers = [Layer(f"{i}.weight", nn.Parameter(torch.randn(side, side, device=device))) for i in range(count)]
    for layer in layers:
        layer.parameter.grad = torch.randn_like(layer.parameter)
    return layers


def passes(method: WeightMethod, step: int) -> Callable[[], None]:
    def work() -> None:
        method.collect(step, lr=1e-3, lr_share=0.5)
        method.materialise(step + 1)

    return work


def staged(layers: list[Layer]) -> Callable[[], None]:
    method = Staged(layers, plan_for(layers, 3, SCHEDULE, planes=[3] * len(layers)))
    return passes(method, 300)  # on the soft staircase


def gates(layers: list[Layer]) -> Callable[[], None]:
    return passes(BitLevelCSQ(layers, plan_for(layers, 3, SCHEDULE)), 300)


def one(make: Callable[[list[Layer]], Callable[[], None]], layers: list[Layer], arguments: Any) -> float:
    return measure.interleaved({"it": make(layers)}, arguments.repeats, arguments.device)["it"]


def images(arguments: Any) -> dict[int, float]:
    """Seconds of a whole csq step of cifar_resnet20 by images per step."""
    times = {}
    for batch in (32, 64, 128, 256):
        torch.manual_seed(0)
        model = sources.load("cifar_resnet20", num_classes=10, pretrained=False).model.to(arguments.device)
        layers, _ = find_layers(model)
        method = Staged(layers, plan_for(layers, 3, SCHEDULE))
        optimizer = QuantizedOptimizer(method, torch.optim.SGD(base_groups(model, method), lr=1e-4))
        pixels = torch.randn(batch, 3, 32, 32, device=arguments.device)

        def step(model: Any = model, optimizer: Any = optimizer, pixels: Any = pixels) -> None:
            model(pixels).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        times[batch] = measure.interleaved({"step": step}, arguments.repeats, arguments.device)["step"]
    return times


def slope(times: dict[int, float]) -> float:
    (small, first), *_, (large, last) = times.items()
    return math.log(last / first) / math.log(large / small)


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--most-weights", type=int, default=62_500_000, help="of csq's: 16 gates each")
    arguments = parser.parse_args()
    sizes = [n for n in (10_000, 100_000, 1_000_000, 10_000_000, arguments.most_weights) if n <= arguments.most_weights]
    by_weights = {n: one(staged, weights(n, 10, arguments.device), arguments) for n in sizes}
    by_gates = {16 * n: one(gates, weights(n, 10, arguments.device), arguments) for n in sizes}
    by_layers = {k: one(staged, weights(1_000_000, k, arguments.device), arguments) for k in (1, 10, 100, 1000)}
    by_images = images(arguments)
    linear = {n: t for n, t in by_gates.items() if n >= 16_000_000}
    (first, start), *_, (last, end) = linear.items()
    measure.emit(
        {
            "ratio": (end / last) / (start / first),
            "ratio_of": f"seconds per gate at {last:,} gates / at {first:,} gates (csq)",
            "slope_weights": slope({n: t for n, t in by_weights.items() if n >= 1_000_000}),
            "slope_gates": slope(linear),
            "slope_images": slope(by_images),
            "seconds_by_weights_csq": by_weights,
            "seconds_by_gates_csq_paper": by_gates,
            "seconds_by_layers_csq_1e6_weights": by_layers,
            "seconds_by_images_cifar_resnet20": by_images,
            "machine": measure.machine(arguments.device),
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
