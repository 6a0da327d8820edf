"""A training step in channels_last against the same step in contiguous memory: same model and batch, in turns.

    python benchmarks/memory_format.py --json runs/memory_format.json
    python benchmarks/memory_format.py --models timm:convnext_atto timm:vit_tiny_patch16_224

It is why `channels_last: auto` takes channels_last for networks with depthwise convolutions on a CPU.
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

from csqcli.models import libraries

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def step(name: str, memory_format: torch.memory_format, arguments: Any) -> Callable[[], None]:
    torch.manual_seed(0)
    model = libraries.load(name, num_classes=10, pretrained=False).model.to(arguments.device)
    model = model.to(memory_format=memory_format)
    size = (arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    images = torch.randn(size, device=arguments.device).contiguous(memory_format=memory_format)
    labels = torch.arange(arguments.batch_size, device=arguments.device) % 10

    def work() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        model.zero_grad()

    return work


def main() -> None:
    parser = measure.parser(__doc__)
    usual = [
        "timm:tf_efficientnet_lite0",
        "torchvision:mobilenet_v3_small",
        "torchvision:resnet18",
        "timm:convnext_atto",
    ]
    parser.add_argument("--models", nargs="+", default=usual)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ratios = {}
    for name in arguments.models:
        works = {kind: step(name, memory_format, arguments) for kind, memory_format in FORMATS.items()}
        seconds = measure.interleaved(works, arguments.repeats, arguments.device)
        ratios[name] = seconds["contiguous"] / seconds["channels_last"]
    result = {
        "ratio": ratios[arguments.models[0]],
        "ratio_of": f"seconds of a training step, contiguous / channels_last, of {arguments.models[0]}",
        "models": ratios,
        "machine": measure.machine(arguments.device),
    }
    measure.emit(result, arguments.json)


if __name__ == "__main__":
    main()
