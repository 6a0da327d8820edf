"""Calibration images without data: distilled from what a network's BatchNorms remember of the images it was trained on.

Noise is moved until the mean and standard deviation of what comes into every BatchNorm are its running ones (ZeroQ, Cai et al.,
CVPR 2020, Eq. 2 and Algorithm 1). They are kept as 8-bit pixels like any other image, so everything that calibrates takes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from csqcli.data.loaders import stream_seed
from csqcli.data.splits import Images
from csqcli.errors import UserError

DISTILLED_BATCH = 32  # images whose statistics are taken together
_LR = 0.1  # of Adam on pixels in units of their standard deviation
_VARIANCE_FLOOR = 1e-8  # below which a deviation has no slope


def distill_images(
    model: nn.Module,
    config: dict[str, Any],
    *,
    count: int,
    steps: int,
    seed: int,
    device: torch.device,
    on_step: Callable[[int], None] = lambda done: None,
) -> Images:
    """``count`` images at the model's input size, uint8, all with label 0; the same for the same model, seed and device.

    ``config`` is the model's data config, whose mean and standard deviation the pixels have too. They are padded by as much as the
    evaluation's crop takes away. ``on_step`` is told how many of ``steps`` · batches are done. UserError for a model without
    BatchNorm statistics, and where the distillation diverges.
    """
    shape = config["input_size"]
    mean, std = (torch.tensor(config[key], device=device).view(1, -1, 1, 1) for key in ("mean", "std"))
    made: list[Tensor] = []
    with _frozen(model), _statistics(model) as gaps:
        for begin in range(0, count, DISTILLED_BATCH):
            generator = torch.Generator().manual_seed(stream_seed(seed, begin))
            noise = torch.randn(min(DISTILLED_BATCH, count - begin), *shape, generator=generator)
            images = noise.to(device).requires_grad_(True)
            optimizer = torch.optim.Adam([images], lr=_LR)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for step in range(steps):
                gaps.clear()
                model(images)
                if not gaps:
                    hint = "calibrate on a folder of images instead"
                    raise UserError(
                        "the model has no BatchNorm to distil images from", where="--calib zeroq", hint=hint
                    )
                loss = torch.stack([*gaps, _gap(images, images.new_zeros(()), images.new_ones(()))]).sum()
                if not bool(torch.isfinite(loss)):
                    hint = "check the checkpoint, or calibrate on a folder of images"
                    raise UserError("the distillation diverged", where="--calib zeroq", hint=hint)
                (images.grad,) = torch.autograd.grad(loss, images)
                optimizer.step()
                schedule.step()
                on_step(begin // DISTILLED_BATCH * steps + step + 1)
            made.append(((images.detach() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).cpu())
    pixels = torch.cat(made)
    return Images(torch.zeros(count, dtype=torch.long), pixels=_padded(pixels, config.get("crop_pct", 1.0)))


def _padded(pixels: Tensor, crop_pct: float) -> Tensor:
    """With a margin of repeated edges, so that the evaluation's resize leaves the pixels alone and its crop takes the margin off."""
    height, width = pixels.shape[-2:]
    above, left = (int(side / crop_pct) - side for side in (height, width))
    first, top = round(left / 2), round(above / 2)  # as torchvision's CenterCrop rounds
    margins = (first, left - first, top, above - top)
    return F.pad(pixels.float(), margins, mode="replicate").to(torch.uint8) if any(margins) else pixels


def _gap(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Squared distance of each channel's mean and standard deviation over a batch from the wanted ones, meaned over channels."""
    dims = [0, *range(2, values.dim())]
    found = values.mean(dim=dims), values.var(dim=dims, correction=0).clamp_min(_VARIANCE_FLOOR).sqrt()
    return (found[0] - mean).square().mean() + (found[1] - std).square().mean()


@contextlib.contextmanager
def _statistics(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that every forward pass appends the gap of each BatchNorm's inputs to."""
    gaps: list[Tensor] = []

    def note(module: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        assert module.running_mean is not None
        assert module.running_var is not None
        gaps.append(_gap(inputs[0], module.running_mean, module.running_var.clamp_min(_VARIANCE_FLOOR).sqrt()))

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        yield gaps
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients of its own; as it was after."""
    training = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was
        for parameter in trained:
            parameter.requires_grad_(True)
