"""A width of its own for the input of every layer, within a mean: the knapsack of the weights' planes, on inputs.

What rounding an input to b bits costs is taken from the diagonal Fisher of the input itself, E[½ Σ g² (x − q_b(x))²], g the gradient of
the loss at that input, image by image, for labels drawn from the model's own predictions: no label of the images is looked
at. Which widths keep most within the budget is then exact (`quant.budget.allocate`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csqcli.errors import UserError
from csqcli.quant.activations import ActivationQuantizer, owners, quantizer_of, samples_of
from csqcli.quant.budget import Budget, PlaneLimits, allocate, mean_planes
from csqcli.quant.layers import Layer
from csqcli.quant.measuring import evaluating, evaluating_untrained, logits_of, unfrozen
from csqcli.quant.names import owner_of

FEWEST, MOST = 2, 8  # bits that a searched input may have
_MICRO_BATCH = 32  # images per backward pass

Batches = Callable[[], Iterable[Tensor]]  # the calibration images [B, C, H, W], from the start at every call
Per = Literal["values", "macs"]


@dataclass(frozen=True)
class Widths:
    """Bits by the module whose input they round, and their mean over what the budget counts."""

    bits: Mapping[str, int]
    mean: float


def find_widths(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Batches,
    *,
    target: float,
    per: Per = "values",
    macs: Mapping[str, int | None] | None = None,
    method: str = "lsq",
    seed: int = 0,
    untrained: bool = False,
) -> Widths:
    """Widths of 2 to 8 bits for the inputs of ``layers``, whose mean is at most ``target``.

    The mean is over the values of the inputs (``per`` values: the bytes that they take), or over the multiply-accumulates
    that read them (``per`` macs, by layer name in ``macs``: with equal planes everywhere, the bit operations). The network's own
    input is left out: it has 8 bits. The model comes back as it was; ``untrained`` is as in `activations.calibrate`. UserError
    where no input can be widened.
    """
    samples = samples_of(model, owners(model, layers), batches(), untrained=untrained)
    names = [name for name, sample in samples.items() if not sample.is_image]  # in the order in which they run
    if not names:
        raise UserError("no input of a layer to choose a width for", where="--act-bits auto", hint="pass --act-bits 8")
    candidates = {
        name: [quantizer_of(b, samples[name], method=method) for b in range(FEWEST, MOST + 1)] for name in names
    }
    values = {name: samples[name].image_values for name in names}
    losses = _losses(model, layers, batches(), candidates, seed, untrained=untrained)
    weights = values if per == "values" else _macs_of(names, layers, macs or {})
    limits = PlaneLimits((FEWEST,) * len(names), (MOST,) * len(names))
    table = tuple(tuple(b * weights[name] for b in range(MOST + 1)) for name in names)
    counted = tuple(weights[name] for name in names)
    savings = torch.zeros(len(names), MOST, dtype=torch.float64)
    for row, name in enumerate(names):
        lost = losses[name].cummin(dim=0).values  # a further bit never harms
        savings[row, FEWEST:] = lost[:-1] - lost[1:]
    bits = allocate(savings, Budget(target, counted, limits, table))
    return Widths(dict(zip(names, bits, strict=True)), mean_planes(bits, counted))


def _macs_of(names: Sequence[str], layers: Sequence[Layer], macs: Mapping[str, int | None]) -> dict[str, int]:
    found = dict.fromkeys(names, 0)
    for layer in layers:
        owner = owner_of(layer.name)
        if owner in found:
            found[owner] += macs.get(layer.name) or 0
    return found


def _losses(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Tensor],
    candidates: Mapping[str, Sequence[ActivationQuantizer]],
    seed: int,
    *,
    untrained: bool = False,
) -> dict[str, Tensor]:
    """By module: the expected increase of the loss at each candidate's width [widths] in float64."""
    widths = MOST - FEWEST + 1
    lost = {name: torch.zeros(widths, dtype=torch.float64) for name in candidates}
    generator, images_seen = torch.Generator().manual_seed(seed), 0
    mode = evaluating_untrained(model) if untrained else evaluating(model)
    with mode, unfrozen(layers), _inputs_of(model, list(candidates)) as seen:
        for images in batches:
            if not len(images):  # none of it could be decoded
                continue
            for part in _parts(images, equal=untrained):
                seen.clear()
                with torch.enable_grad():
                    logits = logits_of(model(part)).float()
                    labels = torch.multinomial(logits.detach().softmax(dim=1).cpu(), 1, generator=generator).flatten()
                    loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
                inputs = [(name, value) for name, value in seen if value.requires_grad]
                gradients = torch.autograd.grad(loss, [value for _, value in inputs], allow_unused=True)
                images_seen += len(part)
                for (name, value), gradient in zip(inputs, gradients, strict=True):
                    if gradient is None:
                        continue
                    value, weight = value.detach(), gradient.float().square()
                    with torch.no_grad():
                        for place, quantizer in enumerate(candidates[name]):
                            error = (quantizer(value) - value).float().square()
                            lost[name][place] += 0.5 * float((weight * error).sum(dtype=torch.float64))
    return {name: total / max(images_seen, 1) for name, total in lost.items()}


def _parts(images: Tensor, *, equal: bool) -> Sequence[Tensor]:
    """Images that go through the network at once: ``equal`` parts leave no single image, of which BatchNorm has no variance."""
    return images.tensor_split(-(-len(images) // _MICRO_BATCH)) if equal else images.split(_MICRO_BATCH)


@contextmanager
def _inputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[list[tuple[str, Tensor]]]:
    """A list that every forward pass adds the modules' inputs to, each with a gradient of its own where a tensor is shared."""
    modules, seen = dict(model.named_modules()), list[tuple[str, Tensor]]()

    def watch(name: str) -> Callable[..., tuple[Any, ...]]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            own: dict[int, Tensor] = {}  # attention that gets one tensor three times relies on its identity
            for value in inputs:
                if isinstance(value, Tensor) and value.is_floating_point() and id(value) not in own:
                    own[id(value)] = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
                    seen.append((name, own[id(value)]))
            return tuple(own.get(id(value), value) for value in inputs)

        return hook

    hooks = [modules[name].register_forward_pre_hook(watch(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()
