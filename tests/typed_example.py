"""What people write against csq's API, checked by mypy, strict, in `make lint`. Not run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import csqcli


def quantize(folder: Path) -> float:
    report = csqcli.search("resnet18", target_bits=3, data="/imagenet", output=folder, epochs=5, lr=0.02)
    assert_type(report, dict[str, Any])
    file = folder / "model.safetensors"
    settings: dict[str, Any] = {"optimizer.momentum": 0.8, "data.workers": 4}
    csqcli.finetune(file, data="/imagenet", epochs=3, output=folder / "tuned", **settings)
    csqcli.export(file, form="onnx", activations="int8", target="openvino")
    csqcli.inspect("resnet18", exclude=["fc"])
    assert_type(csqcli.report(file), dict[str, Any])
    accuracy = csqcli.evaluate(file, "/imagenet", device="cpu")
    assert_type(accuracy["samples"], int)
    return accuracy["top1"]


def own_loop(model: nn.Module, batches: list[tuple[Tensor, Tensor]], names: Iterable[str]) -> nn.Module:
    optimizer = csqcli.CSQ(model, target_bits=2.5, total_steps=len(batches), exclude=list(names))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.1], total_steps=len(batches))
    for images, labels in batches:
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]  # some releases of torch have no types here
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        with optimizer.hard() as layers:
            print(sum(layer.planes for layer in layers))
    try:
        csqcli.save(model, optimizer, "m.safetensors", source="timm:resnet18", num_classes=10, accuracy={"samples": 8})
    except csqcli.UserError as error:
        print(error.line())
    assert_type(csqcli.load("m.safetensors", into=model), nn.Module)
    return csqcli.load("m.safetensors")
