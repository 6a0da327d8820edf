"""Devices by name, and one clear line where there is none of that name."""

from __future__ import annotations

import pytest
import torch

from csqcli.errors import UserError
from csqcli.recipe.resolve import resolve
from csqcli.system.device import pick_device


def machine(monkeypatch: pytest.MonkeyPatch, *, gpus: int = 0, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_auto_takes_a_cuda_gpu_when_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=2, mps=True)
    assert [str(pick_device(name)) for name in ("auto", "cpu", "cuda", "cuda:1", "mps")] == [
        "cuda", "cpu", "cuda", "cuda:1", "mps"
    ]  # fmt: skip
    machine(monkeypatch, mps=True)
    assert str(pick_device("auto")) == "cpu"


@pytest.mark.parametrize(
    ("name", "gpus", "line"),
    [
        ("cuda", 0, "--device cuda: no CUDA device is available; use --device cpu or auto"),
        ("cuda:1", 0, "--device cuda:1: no CUDA device is available; use --device cpu or auto"),
        ("cuda:1", 1, "--device cuda:1: no such device; only cuda:0 is available"),
        ("cuda:9", 4, "--device cuda:9: no such device; cuda:0 to cuda:3 are available"),
        ("mps", 0, "--device mps: no Apple GPU is available to PyTorch; use --device cpu or auto"),
        ("tpu", 0, "--device tpu: no such device; cpu, cuda, cuda:N, mps or auto"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, line: str
) -> None:
    machine(monkeypatch, gpus=gpus)
    with pytest.raises(UserError) as caught:
        pick_device(name)
    assert caught.value.line() == line


@pytest.mark.parametrize("name", ["cuda:x", "tpu", "cuda:", "CPU"])
def test_a_recipe_takes_no_device_that_nobody_has(name: str) -> None:
    with pytest.raises(UserError, match=r"device: Input should be auto, cpu, cuda, cuda:N or mps \(got"):
        resolve("digits", {"device": name})
