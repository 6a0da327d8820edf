"""What a training step costs under every method and rival, relative to float: seconds, and peak memory.

    python benchmarks/method_cost.py --json runs/method_cost.json
    PYTHONPATH=benchmarks/accuracy python benchmarks/method_cost.py --methods staged lsq rivals:TorchaoPARQ rivals:Brevitas

All methods train copies of one network side by side, each through a whole schedule of its own (--steps): step by step in turns, so
that a slow moment of the machine hits all, with the same images. Seconds are the mean, over eight stretches of the schedule, of
the median step in each, so that phases count by their length and what happens once (planes being fixed, the last step) does not.
Memory is what a process of its own grows by in a schedule of twelve steps. Planes are 2, or what a method is defined for;
`float, distilled` is a float step beside a frozen twin (`--distill 0.9`), which is counted apart from the methods.
The default takes half an hour of one core.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import measure

import csqcli
from csqcli.models import libraries as sources
from csqcli.quant.catalog import CARDS, find_card
from csqcli.training.teacher import Teacher

FLOAT, DISTILLED = "float", "float, distilled"
STRETCHES = 8
STEPS_FOR_MEMORY = 12
PLANES = 2


def trained() -> list[str]:
    """csq's methods that train under quantization."""
    return [name for name, card in CARDS.items() if name != FLOAT and card.trains]


def training(method: str, model_name: str, total_steps: int, arguments: Any) -> Callable[[], None]:
    """One step of training a fresh network under ``method``: call it ``total_steps`` times."""
    torch.manual_seed(0)
    model = sources.load(model_name, num_classes=1000, pretrained=False).model.to(arguments.device)
    model = model.to(memory_format=torch.channels_last)
    images = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size, device=arguments.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(arguments.batch_size, device=arguments.device)
    optimizer: torch.optim.Optimizer
    if method in (FLOAT, DISTILLED):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    else:
        card = find_card(method)
        planes = max(min(PLANES, card.max_planes), card.min_planes)
        optimizer = csqcli.CSQ(model, planes, total_steps=total_steps, lr=1e-4, method=method)
    teacher = Teacher(model, distill=0.9, features=0.0) if method == DISTILLED else None

    def step() -> None:
        scores = model(images)
        loss = nn.functional.cross_entropy(scores, labels)
        if teacher is not None:
            loss = teacher.loss(images, scores, loss, amp=False)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_per_step(methods: list[str], model_name: str, arguments: Any) -> dict[str, float]:
    """Seconds of a step over each method's schedule, side by side."""
    works = {method: training(method, model_name, arguments.steps, arguments) for method in methods}
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(arguments.steps):
        for method, step in works.items():
            seconds[method].append(measure.seconds_of(step, arguments.device))
    length = arguments.steps // STRETCHES
    return {method: _mean_of_medians(values, length) for method, values in seconds.items()}


def _mean_of_medians(seconds: list[float], length: int) -> float:
    stretches = [seconds[start : start + length] for start in range(0, len(seconds) - length + 1, length)]
    return statistics.mean(map(statistics.median, stretches))


def peak(method: str, model_name: str, arguments: Any) -> int:
    """Bytes that this process grows by while it trains."""
    sources.load(model_name, num_classes=1000, pretrained=False)  # modules that are loaded once count for nobody
    before = measure.peak_bytes(arguments.device)
    step = training(method, model_name, STEPS_FOR_MEMORY, arguments)
    for _ in range(STEPS_FOR_MEMORY):
        step()
    return measure.peak_bytes(arguments.device) - before


def relative(seconds: dict[str, float], peaks: dict[str, int]) -> dict[str, dict[str, float]]:
    """{method: seconds and bytes, and both relative to float}."""
    return {
        method: {
            "seconds_per_step": seconds[method],
            "peak_bytes": peaks[method],
            "time_ratio": seconds[method] / seconds[FLOAT],
            "memory_ratio": peaks[method] / max(peaks[FLOAT], 1),
        }
        for method in seconds
    }


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["timm:tf_efficientnet_lite0", "torchvision:resnet18"])
    parser.add_argument("--methods", nargs="+", default=trained(), help="beside float (default: all of csq's)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40, help=f"of the schedule, a multiple of {STRETCHES}")
    arguments = parser.parse_args()
    if arguments.steps < STRETCHES or arguments.steps % STRETCHES:
        parser.error(f"--steps is no multiple of {STRETCHES}")
    methods = [FLOAT, DISTILLED, *arguments.methods]
    peaks = {  # first: a process begins with the peak of the one that started it
        name: {method: measure.in_fresh_process(peak, method, name, arguments) for method in methods}
        for name in arguments.models
    }
    models = {name: relative(seconds_per_step(methods, name, arguments), peaks[name]) for name in arguments.models}
    for name, rows in models.items():
        print(f"\n| {name} | time | memory |\n|---|---|---|")
        for method, cost in rows.items():
            print(f"| {method} | {cost['time_ratio']:.2f} | {cost['memory_ratio']:.2f} |")
    own = [cost["time_ratio"] for rows in models.values() for method, cost in rows.items() if method == "staged"]
    measure.emit(
        {
            "ratio": max(own, default=None),
            "ratio_of": "seconds of a step of `staged` / of a float step, worst model",
            "models": models,
            "batch_size": arguments.batch_size,
            "image_size": arguments.image_size,
            "steps": arguments.steps,
            "machine": measure.machine(arguments.device),
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
