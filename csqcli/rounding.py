"""Post-training quantization of a model in its caller's memory: what ``csq search --epochs 0`` does, without data sources or files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from csqcli.data.loaders import stream_seed
from csqcli.errors import FORWARD_ERRORS, UserError, cannot_run
from csqcli.quant.catalog import find_card
from csqcli.quant.layerwise import Quantized, quantize_model
from csqcli.quant.measuring import evaluating, logits_of
from csqcli.quant.method_settings import PTQSettings
from csqcli.quant.names import FLOAT_BITS
from csqcli.quant.optimizer import check_target, settings_of
from csqcli.quant.wrappers import unwrap
from csqcli.saving import images_of
from csqcli.system.progress import Display


def quantize_in_memory(
    model: nn.Module,
    images: Iterable[Any],
    target_bits: float,
    *,
    exclude: str | Sequence[str],
    act_bits: int,
    settings: Mapping[str, Any] | None,
    seed: int,
    display: Display,
) -> Quantized:
    """Round ``model`` in place; see :func:`csqcli.quantize` for the arguments."""
    if not isinstance(model, nn.Module):
        hint = "give the model itself: csqcli.quantize(model, …)"
        raise UserError(f"the model must be a torch.nn.Module, not a {type(model).__name__}", hint=hint)
    check_target(target_bits)
    if type(act_bits) is not int or act_bits not in (*range(2, 9), FLOAT_BITS):
        raise UserError(f"act_bits must be 2 to 8, or 32 for inputs that stay float, not {act_bits!r}")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UserError(f"seed must be a whole number from 0 on, not {seed!r}")
    chosen = settings_of(find_card("ptq"), settings)
    assert isinstance(chosen, PTQSettings)
    network = unwrap(model)
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        batches = _first(chosen.images, images, network)
        _check_runs(network, batches[0][:1])
        found = quantize_model(
            network,
            batches,
            target_bits,
            exclude=exclude,
            act_bits=act_bits,
            settings=chosen,
            seed=stream_seed(seed, 1),  # as a run of this seed draws them
            watch=display.step,
        )
    if network is not model and act_bits < FLOAT_BITS:
        torch._dynamo.reset()  # what was compiled before does not know the hooks
    return found


@torch.no_grad()
def _check_runs(network: nn.Module, image: Tensor) -> None:
    """UserError where the network does not take an image, [1, C, H, W]."""
    try:
        with evaluating(network):
            logits_of(network(image))
    except FORWARD_ERRORS as error:
        raise UserError(cannot_run(error, image.shape[1:]), where="csqcli.quantize") from error


@torch.no_grad()
def _first(count: int, images: Iterable[Any], network: nn.Module) -> list[Tensor]:
    """The first ``count`` images, in the batches that they come in. UserError where one is NaN or infinite."""
    batches: list[Tensor] = []
    for batch in images_of(images, network, where="csqcli.quantize"):
        left = count - sum(map(len, batches))
        if not len(batch):
            continue
        batches.append(batch[:left].clone())  # no inference tensor
        if not bool(torch.isfinite(batches[-1]).all()):
            raise UserError("the images hold NaN or infinite values", where="csqcli.quantize")
        if left <= len(batch):
            break
    if not batches:
        raise UserError("the loader gives no image", where="csqcli.quantize")
    return batches
