"""What csq would quantize in a model: weights, their share of parameters and of multiply-accumulates, and what stays float."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from csqcli.quant.layers import FloatTensor, Layer, find_layers

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def coverage(model: nn.Module, input_size: Sequence[int], *, exclude: Sequence[str] = ()) -> dict[str, Any]:
    """Coverage of a model at one image of ``input_size`` (C, H, W).

    ``macs`` per layer are counted by a hook on the module that owns the weight; null where that module is never called
    (functional use of its weight), as inside ``nn.MultiheadAttention``.
    """
    layers, left = find_layers(model, exclude=exclude)
    macs, total_macs = count_macs(model, layers, input_size)
    parameters = sum(p.numel() for p in model.parameters())
    weights = sum(layer.weights for layer in layers)
    counted = sum(value or 0 for value in macs.values())
    return {
        "parameters": parameters,
        "quantized_weights": weights,
        "parameter_share": weights / parameters,
        "macs": total_macs,
        "mac_share": min(counted / total_macs, 1.0) if total_macs else 0.0,
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.parameter.shape),
                "weights": layer.weights,
                "macs": macs[layer.name],
                "tied_with": list(layer.aliases),
            }
            for layer in layers
        ],
        "left_float": [_float_record(tensor) for tensor in left],
    }


def _float_record(tensor: FloatTensor) -> dict[str, Any]:
    return {"name": tensor.name, "shape": list(tensor.shape), "why": tensor.why}


@torch.no_grad()
def count_macs(
    model: nn.Module, layers: Sequence[Layer], input_size: Sequence[int]
) -> tuple[dict[str, int | None], int]:
    """Multiply-accumulates of one image: per layer (None where no hook fired), and of the whole network.

    The total counts convolutions, matrix products and attention as PyTorch's FLOP counter sees them.
    """
    modules = dict(model.named_modules())
    macs: dict[str, int | None] = {layer.name: None for layer in layers}
    handles = []

    def watch(layer: Layer) -> None:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, Tensor) or not inputs or not isinstance(inputs[0], Tensor):
                return
            if isinstance(module, _TRANSPOSED):
                done = inputs[0].numel() * layer.weights // module.in_channels
            else:
                done = output.numel() * layer.weights // layer.parameter.shape[layer.channel_dim]
            macs[layer.name] = (macs[layer.name] or 0) + done

        handles.append(modules[layer.name.rpartition(".")[0]].register_forward_hook(hook))

    for layer in layers:
        watch(layer)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            model(torch.zeros(1, *input_size, device=device))
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return macs, counter.get_total_flops() // 2
