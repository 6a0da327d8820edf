"""BatchNorms of a network whose weights are rounded and not trained: their statistics follow what that does to their inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def tracking_norms(model: nn.Module) -> list[_BatchNorm]:
    """BatchNorms that have statistics of their own."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@contextlib.contextmanager
def following(norm: nn.Module, float_norm: nn.Module) -> Iterator[None]:
    """Move a BatchNorm's statistics by what became of its inputs: the mean by the difference of the means on the same images,
    the variance by the ratio of the variances; inside batch by batch, at the end by all that was seen.

    Not by the statistics of these images themselves: those of a checkpoint are of its own training images, augmentation and
    size, and a network that is not trained on does not get used to others.
    """
    mean, variance = (getattr(norm, name).clone() for name in ("running_mean", "running_var"))
    waiting: list[tuple[Tensor, Tensor]] = []
    shifts: list[Tensor] = []
    ratios: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        waiting.append(_moments_of(inputs[0]))

    def follow(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not waiting:
            return
        (float_mean, float_variance), (own_mean, own_variance) = waiting.pop(0), _moments_of(inputs[0])
        eps: float = norm.eps  # type: ignore[assignment]
        shifts.append(own_mean - float_mean)
        ratios.append((own_variance + eps) / (float_variance + eps))
        settle(shifts[-1], ratios[-1])

    def settle(shift: Tensor, ratio: Tensor) -> None:
        norm.running_mean.copy_(mean + shift)  # type: ignore[operator]
        norm.running_var.copy_(variance * ratio)  # type: ignore[operator]

    hooks = [float_norm.register_forward_pre_hook(look), norm.register_forward_pre_hook(follow)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if shifts:
            settle(torch.stack(shifts).mean(dim=0), torch.stack(ratios).mean(dim=0))


def _moments_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel, of [N, C, …]."""
    dims = [dim for dim in range(values.dim()) if dim != 1]
    variance, mean = torch.var_mean(values.detach().float(), dim=dims, correction=0)
    return mean, variance
