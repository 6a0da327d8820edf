"""What an exported file is compared with, and what happens when it differs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.quant import activations
from csqcli.quant.hard_layer import HardLayer
from csqcli.quant.measuring import logits_of
from csqcli.system import files
from csqcli.system.lock import locked_file
from csqcli.training.evaluate import Accuracy

PROBE_IMAGES = 4
FLOAT_TOLERANCE = 5e-4  # of the logits' standard deviation; float engines differ by the order of their sums
ACCURACY_TOLERANCE = 0.5  # points of top-1, or of few images
_FEW_IMAGES = 3  # so many; predictions that stand at the edge turn where sums differ in their last digit
_NO_SATURATION = 64  # the largest integer of which two products with 255 fit into 16 bits
_FLOOR = 1e-6  # logits that are all alike have no spread to measure against


class ParityError(UserError):
    """The file just written does not do what the hard model does."""


@dataclass(frozen=True)
class Probe:
    """Images and the hard model's answer to them."""

    images: Tensor  # [N, C, H, W] float32
    logits: Tensor  # [N, classes] float32
    source: str  # "4 synthetic images"

    @property
    def spread(self) -> float:
        return float(self.logits.std())


@torch.no_grad()
def make_probe(model: nn.Module, input_size: Sequence[int], images: Tensor | None, *, source: str) -> Probe:
    """Run the hard model (eval mode, CPU) on ``images``, or on seeded normal noise where there are none."""
    if images is None:
        images = torch.randn(PROBE_IMAGES, *input_size, generator=torch.Generator().manual_seed(0))
        source = "synthetic"
    return Probe(images, logits_of(model(images)), f"{len(images)} {source} images")


def check_layer(written: HardLayer, wanted: HardLayer) -> None:
    """Integers, scale and weight, bit for bit. ParityError names the layer."""
    if written.name != wanted.name or not torch.equal(written.integers, wanted.integers):
        raise ParityError("integers differ from the source file's", where=wanted.name)
    if not same_bits(written.scale, wanted.scale) or not same_bits(written.weight(), wanted.weight()):
        raise ParityError("integers × scale is not the hard weight", where=wanted.name)
    if (written.basis is None) != (wanted.basis is None):
        raise ParityError("only one of the two has a learned basis", where=wanted.name)
    if written.basis is not None and wanted.basis is not None and not same_bits(written.basis, wanted.basis):
        raise ParityError("basis differs from the source file's", where=wanted.name)
    if not torch.equal(written.mask, wanted.mask) or set(written.aliases) != set(wanted.aliases):
        raise ParityError("mask or tied names differ from the source file's", where=wanted.name)


def check_others(written: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Parameters and buffers that are not quantized, bit for bit. ParityError names the tensor."""
    for name in sorted(written.keys() ^ wanted.keys()):
        raise ParityError("tensor is missing" if name in wanted else "tensor does not belong here", where=name)
    for name, value in wanted.items():
        if not same_bits(written[name], value):
            raise ParityError("values differ from the source file's", where=name)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal in dtype, shape and bytes: NaN equals itself, −0.0 differs from 0.0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    flat = [value.contiguous().view(-1).view(torch.uint8) for value in (left, right)] if left.numel() else []
    return not flat or torch.equal(flat[0], flat[1])


def saturates(int8_layers: Sequence[HardLayer], instructions: Sequence[str]) -> str:
    """What to do where kernels of this processor may have saturated; empty where they cannot have.

    Without integer dot products x86 adds two products of an unsigned 8-bit input and an integer in 16 bits: 2 · 255 · 64 is the most.
    """
    is_x86 = any(name.startswith(("sse", "avx")) for name in instructions)
    if not is_x86 or any("vnni" in name or name == "amx_int8" for name in instructions):
        return ""
    largest = {layer.name: int(layer.integers.abs().max()) for layer in int8_layers if layer.integers.numel()}
    beyond = [name for name, top in largest.items() if top > _NO_SATURATION]
    if not beyond:
        return ""
    return (
        f"this processor has no integer dot products (VNNI), and its int8 kernels saturate where integers go beyond {_NO_SATURATION} "
        f"({beyond[0]} has {largest[beyond[0]]}): search with --set quantization.max_bits=6, or export on one that has them"
    )


def check_logits(logits: Tensor, probe: Probe, *, tolerance_in_std: float, where: str) -> float:
    """The largest logit error; ParityError beyond ``tolerance_in_std`` of the reference's standard deviation."""
    if logits.shape != probe.logits.shape:
        raise ParityError(f"logits of shape {list(logits.shape)}, {list(probe.logits.shape)} expected", where=where)
    error = float((logits - probe.logits).abs().max())
    if not error <= tolerance_in_std * probe.spread + _FLOOR:
        share = error / max(probe.spread, _FLOOR)
        raise ParityError(
            f"logits differ by {share:.2g} of their standard deviation (tolerance {tolerance_in_std:g}), "
            "although every layer's weights are exact",
            where=where,
            hint="the engine computes something else; please report the model",
        )
    return error


@torch.no_grad()
def rounding_floor(
    model: nn.Module,
    probe: Probe,
    bias_units: Mapping[str, Tensor],
    output_units: Mapping[str, Tensor],
    *,
    relative: float = 1e-6,
    repeats: int = 4,
) -> float:
    """How far the hard model's own logits move, in their standard deviations, under changes that no engine avoids.

    Those are one part in 10⁶ of the inputs; ``relative`` of the largest output of each module whose input is rounded,
    since engines sum in another order or numbers are stored in fewer bits; and half a unit ([1] or [channels]) of the
    outputs of modules: of ``bias_units`` (input scale × weight scale), to whose multiples int8 engines round biases, alike at
    all positions; of ``output_units``, to whose multiples the file rounds outputs, at each position on its own. Rounded
    activations then flip to neighbouring integers, and flips cascade. So few draws may see none: the least is what one flip of an
    input does to the outputs of the layer that runs last.
    """
    rng = torch.Generator().manual_seed(0)
    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_hook(_jitter(unit, rng, False)) for name, unit in bias_units.items()]
    hooks += [modules[name].register_forward_hook(_jitter(unit, rng, True)) for name, unit in output_units.items()]
    rounded, ran = activations.attached(model), list[str]()
    hooks += [modules[name].register_forward_hook(_noise(rng, relative)) for name in rounded]
    hooks += [modules[name].register_forward_hook(lambda *_, name=name: ran.append(name)) for name in rounded]  # type: ignore[misc]
    try:
        moved = 0.0
        for _ in range(repeats):
            noise = 1 + 1e-6 * torch.randn(probe.images.shape, generator=rng)
            moved = max(moved, float((logits_of(model(probe.images * noise)) - probe.logits).abs().max()))
    finally:
        for hook in hooks:
            hook.remove()
    last = next((name for name in reversed(ran) if isinstance(getattr(modules[name], "weight", None), Tensor)), None)
    if last is not None:
        weight: Any = modules[last].weight
        moved = max(moved, float(rounded[last].scale.abs().max() * weight.abs().max()))
    return moved / max(probe.spread, _FLOOR)


def _jitter(unit: Tensor, rng: torch.Generator, everywhere: bool) -> Callable[..., Any]:
    """A forward hook that moves outputs by up to half a unit: each value, or each channel alike at all positions."""

    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return None
        dim = 1 if isinstance(module, nn.modules.conv._ConvNd) else output.dim() - 1
        per_channel = [1] * output.dim()
        per_channel[dim] = output.shape[dim]
        noise = torch.rand(output.shape if everywhere else per_channel, generator=rng) - 0.5
        # one unit for all, or one per channel: of a group's, in a grouped transposed convolution, where each group has the same
        return output + noise * unit.repeat(output.shape[dim] // unit.numel()).reshape(per_channel)

    return hook


def _noise(rng: torch.Generator, relative: float) -> Callable[..., Any]:
    """A forward hook that moves each output by up to ``relative`` of the largest."""

    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return None
        return output + (2 * relative * output.abs().max()) * (torch.rand(output.shape, generator=rng) - 0.5)

    return hook


def check_accuracy(written: Accuracy, wanted: Accuracy, *, where: str) -> None:
    """Top-1 of the file against the hard model's, on the same images. ParityError beyond half a point and three images."""
    tolerance = max(ACCURACY_TOLERANCE, 100 * _FEW_IMAGES / max(wanted.samples, 1))
    if abs(written.top1 - wanted.top1) > tolerance + 1e-9:
        what = f"top-1 is {written.top1:.2f} %, the hard model's {wanted.top1:.2f} %"
        raise ParityError(f"{what} on {wanted.samples:,} images (tolerance {tolerance:.2g} points)", where=where)


@contextlib.contextmanager
def candidate(output: Path, *, force: bool = True) -> Iterator[Path]:
    """A path beside ``output`` to write and verify; renamed to ``output`` when the block succeeds.

    Only one process at a time writes ``output``; another one is refused at once, as is a name that exists without ``force``.
    After a ParityError the file stays as ``OUTPUT.rejected`` and whatever ``output`` was before stays as it was.
    """
    with locked_file(output):
        if output.exists() and not (force and output.is_file()):
            raise UserError("exists already", where=str(output), hint="choose another name or pass --force")
        path = output.with_name(f".{output.name}.candidate-{os.getpid()}{output.suffix}")
        for stale in files.leftovers(output):
            stale.unlink(missing_ok=True)
        try:
            yield path
            os.replace(path, output)
        except ParityError as error:
            rejected = output.with_name(f"{output.name}.rejected")
            if path.exists():
                os.replace(path, rejected)
                error.hint = f"{error.hint}; {rejected} is kept for inspection".removeprefix("; ")
            raise
        except UserError as error:  # the candidate's is a name that nobody has seen
            error.where = error.where.replace(str(path), str(output))
            error.args = (error.line(),)
            raise
        except OSError as error:
            raise UserError(f"cannot be written ({error.strerror or error})", where=str(output)) from None
        finally:
            path.unlink(missing_ok=True)
