"""Images made from BatchNorm statistics: they have them, leave the model alone, and are enough to quantize on."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from csqcli.data.loaders import LoaderSettings, make_loader
from csqcli.errors import UserError
from csqcli.training.distilled_images import distill_images

CONFIG = {"input_size": (3, 16, 16), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "crop_pct": 1.0}


def network() -> nn.Sequential:
    """Two convolutions whose BatchNorms have seen images that are far from noise: smooth, and brighter to the right."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.BatchNorm2d(12),
    )
    with torch.no_grad():
        for _ in range(60):
            model(torch.linspace(-1.5, 1.5, 16).expand(32, 3, 16, 16) + torch.randn(32, 3, 1, 1))
    return model.train()


def distance(model: nn.Sequential, images: torch.Tensor) -> float:
    """Of the second BatchNorm's inputs from its statistics, as the paper's Eq. 2 has it, in NumPy's float64."""
    seen: list[np.ndarray] = []
    hook = model[4].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double().numpy()))
    with torch.no_grad():
        copy.deepcopy(model).eval()  # the copy has no hook
        model.eval()(images)
    hook.remove()
    mean, std = seen[0].mean(axis=(0, 2, 3)), seen[0].std(axis=(0, 2, 3))
    norm = model[4]
    wanted = norm.running_mean.double().numpy(), norm.running_var.double().sqrt().numpy()
    return float(((mean - wanted[0]) ** 2).mean() + ((std - wanted[1]) ** 2).mean())


def distilled(model: nn.Module, config: dict = CONFIG, *, steps: int = 150, seed: int = 3):
    cpu = torch.device("cpu")
    return distill_images(model, config, count=40, steps=steps, seed=seed, device=cpu)


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(CONFIG[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (pixels / 255 - mean) / std


def test_distilled_images_have_the_statistics_that_the_network_remembers() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    images = distilled(model)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert images.pixels is not None
    assert (images.pixels.dtype, tuple(images.pixels.shape), len(images)) == (torch.uint8, (40, 3, 16, 16), 40)
    noise = normalized(distilled(model, steps=1).pixels)
    assert distance(model, normalized(images.pixels)) < 0.2 * distance(model, noise)


def test_a_seed_decides_them() -> None:
    model = network()
    first, again, other = (distilled(model, steps=5, seed=seed).pixels for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_crop_of_evaluation_takes_off_no_more_than_was_added() -> None:
    config = CONFIG | {"input_size": (3, 80, 80), "crop_pct": 0.875, "interpolation": "bicubic"}
    images = distilled(network(), config, steps=2)
    assert tuple(images.pixels.shape[2:]) == (91, 91)
    loader = make_loader(images, config, LoaderSettings(training=False, batch_size=40))
    (batch, _), *_ = loader.epoch(0)
    inner = normalized(images.pixels[:, :, 6:86, 6:86])
    assert torch.allclose(batch, inner, atol=1e-5)


def test_a_network_without_batchnorm_is_refused() -> None:
    with pytest.raises(UserError, match="no BatchNorm to distil images from"):
        distilled(nn.Conv2d(3, 4, 3))


def test_digits_are_quantized_without_a_training_image(csq, tmp_path: Path) -> None:
    run = ("search", "--recipe", "digits", "--epochs", 0, "--target-bits", 3, "--calib", "zeroq", "--quiet")
    reports = []
    for name in ("one", "two"):
        code, _, err = csq(*run, "-o", tmp_path / name, "--set", "zeroq_steps=100")
        assert code == 0, err
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    assert reports[0]["inputs"]["train"]["images"] == 0
    assert reports[0]["accuracy"]["hard_top1"] >= 96  # 98.2 in float
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")}) == 1
