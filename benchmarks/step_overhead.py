"""One csq training step against one float training step: same model, batch and precision, in turns.

    python benchmarks/step_overhead.py --json runs/step_overhead.json
    python benchmarks/step_overhead.py --device cuda --models resnet50 vit_small_patch16_224 --batch-size 256 --amp

The schedule's three stages cost differently (soft masks, soft staircase, hard integers), so each is timed and `ratio` is
their mean over the default schedule (10, 40 and 50 % of the steps), for the model where it is largest. Both sides step
with SGD and momentum on everything that is not quantized.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import measure

from csqcli.models import libraries as sources
from csqcli.quant.layers import find_layers
from csqcli.quant.methods.base import Schedule, plan_for
from csqcli.quant.methods.staged import Staged
from csqcli.quant.optimizer import QuantizedOptimizer, base_groups

STEPS = 1000  # of the schedule that the stages are taken from
STAGES = {"soft masks": (0.1, 50), "soft staircase": (0.4, 300), "hard integers": (0.5, 800)}  # share, a step of it


def build(name: str, arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = sources.load(name, num_classes=1000, pretrained=False).model.to(arguments.device)
    return model.to(memory_format=torch.channels_last) if arguments.channels_last else model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, arguments: Any) -> Callable[[], None]:
    size = (arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    images = torch.randn(size, device=arguments.device)
    if arguments.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(arguments.batch_size, device=arguments.device)

    def step() -> None:
        with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.amp):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def staged(model: nn.Module, stage_step: int) -> QuantizedOptimizer:
    layers, _ = find_layers(model)
    searched = stage_step < STEPS // 10  # the share of the steps in which masks are soft
    planes = None if searched else [3] * len(layers)
    method = Staged(layers, plan_for(layers, 3, Schedule(STEPS, 100), planes=planes))
    optimizer = QuantizedOptimizer(method, torch.optim.SGD(base_groups(model, method), lr=1e-4, momentum=0.9))
    optimizer.step_count = stage_step
    return optimizer


def overhead(name: str, arguments: Any) -> dict[str, Any]:
    float_model = build(name, arguments)
    plain = torch.optim.SGD(float_model.parameters(), lr=1e-4, momentum=0.9)
    works = {"float": steps(float_model, plain, arguments)}
    for stage, (_, stage_step) in STAGES.items():
        model = build(name, arguments)
        works[stage] = steps(model, staged(model, stage_step), arguments)
    seconds = measure.interleaved(works, arguments.repeats, arguments.device)
    ratios = {stage: seconds[stage] / seconds["float"] for stage in STAGES}
    mean = sum(share * ratios[stage] for stage, (share, _) in STAGES.items())
    return {"seconds": seconds, "stages": ratios, "ratio": mean}


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["torchvision:resnet18", "torchvision:mobilenet_v3_small"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast on both sides")
    parser.add_argument("--channels-last", action="store_true", help="on both sides")
    arguments = parser.parse_args()
    per_model = {name: overhead(name, arguments) for name in arguments.models}
    measure.emit(
        {
            "ratio": max(result["ratio"] for result in per_model.values()),
            "ratio_of": "seconds of a csq training step / a float training step, mean over the schedule, worst model",
            "batch_size": arguments.batch_size,
            "models": per_model,
            "repeats": arguments.repeats,
            "machine": measure.machine(arguments.device),
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
