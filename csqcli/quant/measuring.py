"""What a network scores on a few batches, with its weights as they are or rounded: for allocators, and for looking at a model.

Rounding is to the nearest integers at the step with the least squared error, one per output channel, as every method of csq
starts from. Whatever is changed to measure it is put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from csqcli.errors import UserError, machine_fault
from csqcli.quant.layers import Layer
from csqcli.quant.passes.rounding import mse_step, plane_errors, quantize

Batches = Iterable[tuple[Tensor, Tensor]]  # images [B, C, H, W] and labels [B], on the model's device
ONE_VALUE = "more than 1 value per channel"  # in torch's words for a batch of which BatchNorm finds no variance
_NO_SECOND = "is not implemented"  # in torch's words for an operation that cannot be differentiated twice


class Watch(Protocol):
    """Names a slow step while its body runs; what it yields is told how many of ``total`` are done (``Display.step``)."""

    def __call__(self, name: str, total: int | None = None) -> AbstractContextManager[Callable[[int], None]]: ...


@contextlib.contextmanager
def no_progress(name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Nobody looks on."""
    yield lambda done: None


@dataclass(frozen=True)
class Score:
    """Mean cross entropy (nats), and top-1 in percent, over so many images."""

    loss: float
    top1: float
    images: int


def logits_of(output: Any) -> Tensor:
    """The class scores of a model's output: a tensor, or the first entry of the tuple or dict that it returns."""
    while not isinstance(output, Tensor):
        if isinstance(output, dict):
            output = output["out"] if "out" in output else next(iter(output.values()))
        else:
            output = output[0]
    return output


@torch.no_grad()
def score(model: nn.Module, batches: Batches) -> Score:
    """Loss and top-1 of the model as it stands, in eval mode; the mode it was in comes back. UserError without an image."""
    loss, hits, images = 0.0, 0, 0
    with evaluating(model):
        for pixels, labels in batches:
            if len(labels):
                scores = logits_of(model(pixels))
                loss += float(F.cross_entropy(scores.double(), labels, reduction="sum"))
                hits += int((scores.argmax(dim=1) == labels).sum())
                images += len(labels)
    if not images:
        raise UserError("no image could be used")
    return Score(loss / images, 100 * hits / images, images)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode while the body runs; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def evaluating_untrained(model: nn.Module) -> Iterator[None]:
    """As :func:`evaluating`, but BatchNorms that have no statistics yet normalise by the batch, as they will in training.

    Those are the ones whose running mean is 0 and variance 1, with which they would do nothing. Their statistics stay as they
    are. UserError for a batch of which one of them gets a single value per channel.
    """
    fresh = [module for module in model.modules() if isinstance(module, _BatchNorm) and _has_no_statistics(module)]
    before = [(buffer, buffer.clone()) for norm in fresh for buffer in norm.buffers()]
    with evaluating(model):
        for norm in fresh:
            norm.training = True  # its own alone: `train()` would wake the dropout inside of timm's
        try:
            yield
        except ValueError as error:
            if ONE_VALUE not in str(error):
                raise
            raise UserError(
                "BatchNorm has no statistics of one image at a time", hint="raise data.batch_size"
            ) from error
        finally:
            for buffer, value in before:
                buffer.copy_(value)


def _has_no_statistics(norm: _BatchNorm) -> bool:
    mean, variance = norm.running_mean, norm.running_var
    return mean is not None and variance is not None and not bool(mean.any()) and bool((variance == 1).all())


@contextlib.contextmanager
def weights_as(pairs: Iterable[tuple[Layer, Tensor]]) -> Iterator[None]:
    """Other weights (of the layers' shapes) in the model while the body runs."""
    before = []
    try:
        for layer, weight in pairs:
            before.append((layer, layer.parameter.detach().clone()))
            layer.parameter.data.copy_(weight)
        yield
    finally:
        for layer, weight in before:
            layer.parameter.data.copy_(weight)


def channel_steps(layer: Layer, weight: Tensor, planes: int) -> Tensor:
    """[channels, 1], or [1, 1] where that would be a step per weight: the step of each channel at so many planes.

    ``weight`` is [outer, channels, inner] (`Layer.by_channel`).
    """
    return mse_step(weight, planes, channel_dim=1 if layer.allows_channel_scales else None).view(-1, 1)


def rounded(layer: Layer, planes: int) -> Tensor:
    """The layer's weight at so many planes, of its shape; zeros at 0 planes."""
    if planes == 0:
        return torch.zeros_like(layer.parameter)
    weight = layer.by_channel(layer.flat(layer.parameter.detach())).float()
    step = channel_steps(layer, weight, planes)
    return layer.unflatten(quantize(weight, step, planes).mul_(step).reshape(-1)).to(layer.parameter.dtype)


def squared_errors(layers: Sequence[Layer], bits: int, weighting: Sequence[Tensor] | None = None) -> Tensor:
    """[layers, bits + 1] float64: Σ_i F_i (W − Q_k(W))² at k = 0 … n planes, Q_0 = 0.

    ``weighting`` is F of each layer, of the weight's shape; None is 1 everywhere.
    """
    errors = torch.zeros(len(layers), bits + 1, dtype=torch.float64)
    for index, layer in enumerate(layers):
        weight = layer.by_channel(layer.flat(layer.parameter.detach())).float()
        factor = layer.by_channel(layer.flat(weighting[index])) if weighting is not None else torch.ones_like(weight)
        steps = torch.stack([channel_steps(layer, weight, k) for k in range(1, bits + 1)])
        errors[index] = plane_errors(weight, unit=torch.ones_like(steps[0]), steps=steps, fisher=factor).cpu()
    return errors


@contextlib.contextmanager
def unfrozen(layers: Sequence[Layer]) -> Iterator[list[Tensor]]:
    """The layers' weights, which gradients reach while the body runs: those that were frozen too."""
    parameters = [layer.parameter for layer in layers]
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield list(parameters)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextlib.contextmanager
def differentiating(model: nn.Module, layers: Sequence[Layer]) -> Iterator[list[Tensor]]:
    """The layers' weights for second derivatives: in eval mode, attention by operations that have them. UserError where one of
    the model's own has none."""
    try:
        with evaluating(model), unfrozen(layers) as weights, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield weights
    except RuntimeError as error:
        if machine_fault(error) is not None or _NO_SECOND not in str(error):
            raise
        what = f"an operation of the model has no second derivative ({str(error).splitlines()[0]})"
        raise UserError(what, hint="take --allocator importance, which needs first ones alone") from error


def chunks(batches: Batches, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches in parts of at most ``size`` images; empty ones are passed over."""
    for images, labels in batches:
        if len(labels):
            yield from zip(images.split(size), labels.split(size), strict=True)


@dataclass(frozen=True)
class Call:
    """One call of a module: what it was given, and its output, the first where there are several."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]
    output: Tensor


@torch.no_grad()
def calls_of(model: nn.Module, images: Tensor, names: Iterable[str]) -> tuple[Tensor, dict[str, list[Call]]]:
    """The model's class scores for ``images``, and the calls of the modules of these names, in order.

    Modules that are not called, or give no floating tensor, are left out.
    """
    found: dict[str, list[Call]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            output = first_tensor(output)
            if output is not None:
                found.setdefault(name, []).append(Call(arguments, named, output.detach().clone()))

        return hook

    modules = dict(model.named_modules())
    wanted = [name for name in dict.fromkeys(names) if name in modules]
    handles = [modules[name].register_forward_hook(keep(name), with_kwargs=True) for name in wanted]
    try:
        return logits_of(model(images)), found
    finally:
        for handle in handles:
            handle.remove()


def outputs_of(model: nn.Module, images: Tensor, names: Iterable[str]) -> dict[str, list[Tensor]]:
    """As :func:`calls_of`, the outputs alone."""
    return {name: [call.output for call in calls] for name, calls in calls_of(model, images, names)[1].items()}


def first_tensor(output: Any) -> Tensor | None:
    """What a module gives, or the first of it; None where that is no floating tensor."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, Tensor) and first.is_floating_point() else None
