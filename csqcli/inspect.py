"""What csq would quantize in a model: weights, their share of parameters and of multiply-accumulates, and what stays float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from csqcli.quant.layers import FloatTensor, Layer, find_layers

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Operations:
    """Multiply-accumulates of one image of ``input_size``."""

    input_size: tuple[int, ...]
    macs: dict[str, int | None]  # per layer; None where its weight is in no operation
    total: int  # of the whole network


def coverage(
    model: nn.Module, input_size: Sequence[int], *, exclude: Sequence[str] = (), task: str = "classification"
) -> dict[str, Any]:
    """Coverage of a model at one image of ``input_size`` (C, H, W); ``task`` as in :func:`example_inputs`.

    ``macs`` per layer are null where nothing uses the weight.
    """
    layers, left = find_layers(model, exclude=exclude)
    operations = count_macs(model, layers, input_size, task=task)
    macs, total_macs = operations.macs, operations.total
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


def example_inputs(
    task: str, input_size: Sequence[int], *, batch: int = 1, device: torch.device | str = "cpu"
) -> tuple[Any, ...]:
    """Positional arguments of a forward pass over a batch of noise; ``task`` as `sources.task_of` names it."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, *input_size, generator=generator).to(device)
    if task == "detection":
        return (list(images),)
    return (images, images.flip(-1)) if task == "optical flow" else (images,)


@torch.no_grad()
def count_macs(
    model: nn.Module, layers: Sequence[Layer], input_size: Sequence[int], *, task: str = "classification"
) -> Operations:
    """Multiply-accumulates of one image, per layer and in all.

    Counted are convolutions, matrix products and attention, by PyTorch's own formulas. An operation belongs to the layer
    whose memory it reads, so functional uses and packed projections count; a layer that computes a new weight from its
    own (weight standardisation) gets the operations of its module's forward pass by a hook. The model is called once, in
    eval mode; its modes, its gradients and the random stream are as before.
    """
    hooked: dict[str, int] = {}
    handles = [_module_of(model, layer.name).register_forward_hook(_counting(layer, hooked)) for layer in layers]
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    counter = _Counter(layers)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation without a formula
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), counter:
            model(*example_inputs(task, input_size, device=device))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    macs = {layer.name: counter.macs.get(layer.name, hooked.get(layer.name)) for layer in layers}
    return Operations(tuple(input_size), macs, counter.total)


class _Counter(TorchDispatchMode):
    """Multiply-accumulates of every operation that runs, by the weight that it reads."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.names = {layer.parameter.untyped_storage().data_ptr(): layer.name for layer in layers}
        self.macs: dict[str, int] = {}
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function.overloadpacket)
        if formula is not None:
            macs = formula(*args, **(kwargs or {}), out_val=result) // 2
            self.total += macs
            read = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
            for name in {self.names[pointer] for pointer in read & self.names.keys()}:
                self.macs[name] = self.macs.get(name, 0) + macs
        return result


def _counting(layer: Layer, macs: dict[str, int]) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or not inputs or not isinstance(inputs[0], Tensor):
            return
        if isinstance(module, _TRANSPOSED):
            done = inputs[0].numel() * layer.weights // module.in_channels
        else:
            done = output.numel() * layer.weights // layer.parameter.shape[layer.channel_dim]
        macs[layer.name] = macs.get(layer.name, 0) + done

    return hook


def _module_of(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
