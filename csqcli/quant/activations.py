"""Activation quantizers: static learned scales on the inputs of quantized layers, attached as hooks.

The model's code, module tree and state dict stay as they are. A quantizer rounds what a layer receives to A bits at one
scale per layer that training learns (LSQ or PACT; DoReFa's is fixed) and that evaluation only
reads: a prediction never depends on its batch. Inputs that were never negative in calibration are unsigned; the network's
own input has 8 bits, in every layer that reads it (`quant.one_image`). One bit is the sign, or 0 and 1 where inputs are
never negative. Layers whose module is never called (weights used functionally, the output projection inside
``nn.MultiheadAttention``) have no input to hook and are listed as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.quant.layers import Layer
from csqcli.quant.measuring import evaluating, evaluating_untrained
from csqcli.quant.names import owner_of
from csqcli.quant.one_image import ModuleInput, inputs_from_one_image
from csqcli.quant.passes.sampling import sample_indices

CALIBRATION_BATCHES = 4  # of training images, that ranges are those of
INPUT_BITS = 8  # of the network's own input
_LEAST = 1e-20  # of a scale; fresh networks have activations of 1e-12
_SAMPLE = 2**16  # values per layer and batch that the calibration looks at


@dataclass(frozen=True)
class ActivationRecord:
    """A quantizer as stored: the module whose input it rounds, its width, sign and step."""

    module: str
    bits: int
    signed: bool
    scale: float  # value of integer 1; one signed bit is ± it


class ActivationQuantizer(nn.Module):
    """round(x/s) within the A-bit range, times s; s is learned.

    ``lsq``: dL/ds by Esser et al. 2020, Eq. 3, scaled by 1/√(N·top), N the values of one image (``image_values``). ``pact``: Choi
    et al. 2018, the clipping level α = s·top is what learns, from clipped values only: dL/ds is scaled by 1/top², so that a step
    of SGD on s takes α where one on α would. ``dorefa``: Zhou et al. 2016, Eq. 5 and 11: the range is fixed, and gradients pass
    inside it. ``xnor``: Rastegari et al. 2016, one bit: sign(x)·s, gradients pass where |x| ≤ 1 (section 3.1); s stands in the
    place of their K, which changes with every image and position, and is learned as LSQ's is. Inputs that are never negative,
    whose signs say nothing, are rounded to 0 or s as by LSQ.
    """

    def __init__(
        self, bits: int, *, signed: bool, scale: float, method: str = "lsq", image_values: int | None = None
    ) -> None:
        super().__init__()
        self.bits, self.signed, self.method = bits, signed, method
        self.image_values = image_values  # N; None where the input's first dimension is the batch, and tells it
        self.scale = nn.Parameter(torch.tensor([scale], dtype=torch.float32), requires_grad=method != "dorefa")

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest integer; there is no 0 between those of one signed bit."""
        if self.is_sign:
            return (-1, 1)
        return (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if self.signed else (0, 2**self.bits - 1)

    @property
    def is_sign(self) -> bool:
        """Whether its two values are −s and s."""
        return self.signed and self.bits == 1

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.range
        if self.is_sign:
            binary: Tensor = _Sign.apply(x.float(), self.scale, self.image_values)
            return binary.to(x.dtype)
        rounded: Tensor = _Quantize.apply(x.float(), self.scale, low, high, self.method == "pact", self.image_values)
        return rounded.to(x.dtype)


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, pact: bool, image_values: int | None
    ) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.low, ctx.high, ctx.pact, ctx.image_values = low, high, pact, image_values
        return torch.round(x / scale).clamp_(low, high) * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        ratio = x / scale
        below, above = ratio < ctx.low, ratio > ctx.high
        inside = ~(below | above)
        clipped = below * float(ctx.low) + above * float(ctx.high)
        slope = clipped if ctx.pact else clipped + (ratio.round() - ratio) * inside
        damping = ctx.high**-2 if ctx.pact else ((ctx.image_values or _features(x)) * ctx.high) ** -0.5
        return gradient * inside, ((gradient * slope).sum() * damping).reshape(1), None, None, None, None


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, image_values: int | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.image_values = image_values
        return torch.where(x < 0, -scale, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        damped = (gradient * torch.where(x < 0, -1.0, 1.0)).sum() * (ctx.image_values or _features(x)) ** -0.5
        return gradient * (x.abs() <= 1), damped.reshape(1), None


def _features(x: Tensor) -> int:
    """Values of one image where the first dimension is the batch: N of LSQ's gradient scale, which does not grow with it."""
    return max(x.numel() // max(len(x), 1), 1)


class ActivationQuantizers:
    """All quantizers of a model, and the hooks that apply them."""

    def __init__(
        self, model: nn.Module, quantizers: dict[str, ActivationQuantizer], unreached: Sequence[str] = ()
    ) -> None:
        self.quantizers, self.unreached = quantizers, list(unreached)
        modules = dict(model.named_modules())
        device = next(model.parameters()).device
        for name, quantizer in quantizers.items():
            if name not in modules:
                raise UserError(
                    "the model has no such module", where=name, hint="the file belongs to another architecture"
                )
            modules[name].register_forward_pre_hook(_apply(quantizer.to(device)))

    def parameters(self) -> list[nn.Parameter]:
        """The learned scales."""
        return [quantizer.scale for quantizer in self.quantizers.values()]

    @torch.no_grad()
    def keep_positive(self) -> None:
        """After a step: a scale at 0 or below would round everything to 0, and no gradient would reach it again."""
        for quantizer in self.quantizers.values():
            quantizer.scale.clamp_(min=_LEAST)

    def take(self, records: Sequence[ActivationRecord]) -> None:
        """Signs and scales of quantizers of the same modules, in the same order: another process's."""
        for quantizer, record in zip(self.quantizers.values(), records, strict=True):
            quantizer.signed = record.signed
            quantizer.scale.data.fill_(record.scale)

    def count_image_values(self, model: nn.Module, images: Tensor) -> None:
        """Learn N of quantizers that were attached from a file, which does not say it, from what some images give the layers."""
        for name, sample in samples_of(model, list(self.quantizers), [images]).items():
            self.quantizers[name].image_values = sample.stored_image_values

    def records(self) -> list[ActivationRecord]:
        """The quantizers as they are stored."""
        return records_of(self.quantizers)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: quantizer.scale.detach() for name, quantizer in self.quantizers.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, scale in state.items():
            self.quantizers[name].scale.data.copy_(scale)


def records_of(quantizers: Mapping[str, ActivationQuantizer]) -> list[ActivationRecord]:
    """Quantizers, by the module whose input they round, as they are stored."""
    return [ActivationRecord(name, q.bits, q.signed, float(q.scale.detach())) for name, q in quantizers.items()]


def attached(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The quantizers that a model's hooks apply, by the module whose input they round."""
    hooks = ((name, hook) for name, module in model.named_modules() for hook in module._forward_pre_hooks.values())
    return {
        name: hook.quantizer
        for name, hook in hooks
        if isinstance(getattr(hook, "quantizer", None), ActivationQuantizer)
    }


def detach(model: nn.Module) -> None:
    """Take every quantizer's hook off a model."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(getattr(hook, "quantizer", None), ActivationQuantizer):
                del module._forward_pre_hooks[key]


def attach(model: nn.Module, records: Iterable[ActivationRecord], *, method: str = "lsq") -> ActivationQuantizers:
    """Put stored quantizers back on a model. UserError when it has no such module."""
    quantizers = {r.module: ActivationQuantizer(r.bits, signed=r.signed, scale=r.scale, method=method) for r in records}
    return ActivationQuantizers(model, quantizers)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Tensor],
    *,
    bits: int | Mapping[str, int],
    method: str = "lsq",
    untrained: bool = False,
) -> ActivationQuantizers:
    """Quantizers for the inputs of ``layers``, with signs and MSE-optimal scales measured on a few batches of images.

    ``bits`` is one width, or a width by the module whose input it is for. ``dorefa`` clips unsigned inputs to [0, 1]; signed
    ones, and the network's own, have a range of their own there too.

    The model runs in eval mode and comes back as it was. ``untrained`` says that its BatchNorms will be trained and may have no
    statistics yet: those that have none normalise by the batch, so that scales fit what training will see.
    """
    wanted = owners(model, layers)
    samples = samples_of(model, wanted, batches, untrained=untrained)
    quantizers = {}
    for name, sample in samples.items():  # in the order in which the layers ran
        asked = bits if isinstance(bits, int) else bits.get(name, INPUT_BITS)
        width = max(asked, INPUT_BITS) if sample.is_image else asked
        quantizers[name] = quantizer_of(width, sample, method=method)
    return ActivationQuantizers(model, quantizers, [name for name in wanted if name not in samples])


def owners(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """The modules that hold the weights of ``layers``, each once, by its first name; those that share a weight, all."""
    names = (name for layer in layers for name in (layer.name, *layer.aliases))
    first = dict(model.named_modules())  # a module that is registered twice has one
    return [name for name in dict.fromkeys(map(owner_of, names)) if name in first]


@dataclass(frozen=True)
class InputSample:
    """What calibration saw of a module's input."""

    values: Tensor  # some of them, flat
    signed: bool  # whether any of all values was negative
    is_image: bool = False  # the network's own input
    image_values: int = 1  # of one image
    # whether the first dimension is the batch: windows may be folded into it, or sequences come first
    is_batched: bool = True

    @property
    def stored_image_values(self) -> int | None:
        """As a quantizer has it."""
        return None if self.is_batched else self.image_values


@torch.no_grad()
def samples_of(
    model: nn.Module, names: Sequence[str], batches: Iterable[Tensor], *, untrained: bool = False
) -> dict[str, InputSample]:
    """A sample of what each module receives, in the order in which they run.

    Modules that are never called are left out. How the model runs is as in :func:`calibrate`.
    """
    modules = dict(model.named_modules())
    samples: dict[str, list[Tensor]] = {}
    negative, batched = set[str](), set(names)

    def watch(name: str, images: Tensor) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = next((value for value in inputs if isinstance(value, Tensor)), None)
            if x is None or not x.is_floating_point():
                return
            flat = x.detach().float().flatten()
            if bool((flat < 0).any()):
                negative.add(name)
            if x.shape[:1] != images.shape[:1]:
                batched.discard(name)
            samples.setdefault(name, []).append(flat[sample_indices(flat.numel(), _SAMPLE, device=flat.device)])

        return hook

    of_one: dict[str, ModuleInput] = {}
    with evaluating_untrained(model) if untrained else evaluating(model):
        for images in batches:
            if not len(images):  # none of it could be decoded
                continue
            of_one = of_one or inputs_from_one_image(model, names, images[:1])
            hooks = [modules[name].register_forward_pre_hook(watch(name, images)) for name in names]
            try:
                model(images)
            finally:
                for handle in hooks:
                    handle.remove()
    found = {}
    for name, values in samples.items():
        one = of_one.get(name, ModuleInput())
        found[name] = InputSample(
            torch.cat(values),
            name in negative,
            is_image=one.is_image,
            image_values=one.values,
            is_batched=name in batched,
        )
    return found


@torch.no_grad()
def quantizer_of(bits: int, sample: InputSample, *, method: str = "lsq") -> ActivationQuantizer:
    """A quantizer of so many bits at the scale with the least squared error on a sample; ``dorefa``'s unsigned range is [0, 1]
    unless the input is the image."""
    values = sample.values
    quantizer = ActivationQuantizer(
        bits, signed=sample.signed, scale=1.0, method=method, image_values=sample.stored_image_values
    ).to(values.device)
    low, high = quantizer.range
    if quantizer.is_sign:
        quantizer.scale.data.fill_(float(values.abs().mean()) or 1.0)
    elif method == "dorefa" and not sample.signed and not sample.is_image:
        quantizer.scale.data.fill_(1 / high)
    else:
        quantizer.scale.data.fill_(_mse_scale(values, low, high))
    return quantizer


def _mse_scale(values: Tensor, low: int, high: int) -> float:
    """The scale with the least squared rounding error on a sample; 1 for an all-zero one. Far below the largest value too: the few
    enormous activations of some transformers are not worth that all others become zero."""
    largest = float(values.abs().max())
    if largest == 0:
        return 1.0
    shares = [*torch.linspace(0.05, 1.0, 40).tolist(), *torch.logspace(-3, -1.4, 17).tolist()]
    scales = [largest * share / max(high, 1) for share in shares]
    errors = [float((values - torch.round(values / s).clamp_(low, high) * s).square().sum()) for s in scales]
    return scales[errors.index(min(errors))]


def _apply(quantizer: ActivationQuantizer) -> Callable[..., tuple[Any, ...]]:
    """A forward pre-hook that rounds every floating tensor among the positional inputs (query, key and value alike)."""

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        done: dict[int, Tensor] = {}  # self-attention gets one tensor three times, and relies on its identity
        for value in inputs:
            if isinstance(value, Tensor) and value.is_floating_point() and id(value) not in done:
                done[id(value)] = quantizer(value)
        return tuple(done.get(id(value), value) for value in inputs)

    hook.__dict__["quantizer"] = quantizer  # what `attached` and `detach` find it by
    return hook
