"""A hard model as one for inference alone, whose numbers beside the integers are few and take 16 bits.

In evaluation a BatchNorm is one scale and one shift per channel, so mean, variance and ε fold into those two; the
bias and the per-channel steps of the convolution before it fold into them too, where nothing else reads what that
convolution gives. Integers stay as they are. Then every float32 number is rounded to a float16 times a power of two per
tensor. The network's module tree and names stay: a folded BatchNorm has mean 0 and variance 1.

Training mode would use the batch's statistics, which the folded scale no longer fits: such a model is not trained on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from csqcli.file.io import QuantizedFile
from csqcli.file.layout import half_exponent
from csqcli.quant.hard_layer import HardLayer
from csqcli.quant.layers import layers_named

_Norm = nn.modules.batchnorm._BatchNorm


@dataclass
class Folding:
    """A folded model, in float32, and what happened to its parts."""

    file: QuantizedFile
    norms: int = 0  # BatchNorms that became one scale and one shift per channel
    steps: int = 0  # layers whose per-channel steps are in the BatchNorm behind them
    kept: dict[str, str] = field(default_factory=dict)  # BatchNorms that stay as they are, and why


@torch.no_grad()
def fold(file: QuantizedFile, model: nn.Module, input_size: Sequence[int]) -> Folding:
    """Statistics, and biases and steps in front of them, folded. ``model`` is the file's own in eval mode; it is changed."""
    folding = Folding(file)
    layers = {layer.name: layer for layer in file.layers}
    before = _layers_before(model, list(layers), input_size)
    names = {id(module): name for name, module in model.named_modules()}
    for norm in (module for module in model.modules() if isinstance(module, _Norm)):
        if norm.running_var is None or norm.running_mean is None or norm.weight is None:
            folding.kept[names[id(norm)]] = "has no statistics, or no scale and shift"
            continue
        gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.double() - norm.running_mean.double() * gain
        pair = before.get(id(norm))
        if pair is not None:
            layer, bias = layers[pair[0]], pair[1]
            if bias is not None:
                shift += bias.double() * gain
                bias.zero_()
            if layer.scale.numel() > 1:
                product = gain * layer.scale.double()
                unit = _power_of_two_near(product)
                gain = product / unit
                layers[layer.name] = replace(layer, scale=torch.tensor([unit], dtype=torch.float32))
                folding.steps += 1
        norm.weight.copy_(gain * (1 + norm.eps) ** 0.5)  # of a variance of 1
        norm.bias.copy_(shift)
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
        folding.norms += 1
    state = model.state_dict()
    folding.file = _with_numbers(file, list(layers.values()), {name: state[name] for name in file.others})
    folding.file.manifest.folded = file.manifest.folded or folding.norms > 0
    return folding


@torch.no_grad()
def norms_behind(model: nn.Module, layers: Sequence[str], input_size: Sequence[int]) -> dict[str, str]:
    """Quantized layers → the BatchNorm that alone reads what each gives. ``model`` is in eval mode."""
    before = _layers_before(model, layers, input_size)
    names = {id(module): name for name, module in model.named_modules()}
    return {layer: names[norm] for norm, (layer, _) in before.items()}


def in_16_bits(file: QuantizedFile) -> QuantizedFile:
    """Every float32 number beside the integers rounded to a float16 times a power of two of its tensor's."""
    layers = [
        replace(layer, scale=_rounded(layer.scale), basis=None if layer.basis is None else _rounded(layer.basis))
        for layer in file.layers
    ]
    return _with_numbers(file, layers, {name: _rounded(value) for name, value in file.others.items()})


def _with_numbers(file: QuantizedFile, layers: list[HardLayer], others: dict[str, Tensor]) -> QuantizedFile:
    manifest = file.manifest.model_copy(deep=True)
    for record, layer in zip(manifest.layers, layers, strict=True):
        record.scale = layer.scale.tolist() if layer.scale.numel() > 1 else float(layer.scale)
        record.basis = layer.basis.tolist() if layer.basis is not None else None
    return QuantizedFile(manifest, layers, {name: value.clone().contiguous() for name, value in others.items()})


def _rounded(value: Tensor) -> Tensor:
    if value.dtype != torch.float32 or value.numel() == 0:
        return value
    factor = 2.0 ** half_exponent(value)
    return ((value.double() * factor).half().double() / factor).float()


def _power_of_two_near(values: Tensor) -> float:
    """The power of two next to the median magnitude of what is not 0; 1 where all is."""
    logs = values.abs()[values != 0].log2()
    return 2.0 ** int(logs.median().round().clamp(-100, 100)) if len(logs) else 1.0


class _Reads(TorchDispatchMode):
    """Which operations read which tensors, in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[list[Tensor]] = []  # the tensors that each reads
        self.results: dict[int, int] = {}  # id of a tensor -> the operation that made it
        self.held: list[Any] = []  # so that no id is used twice

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and not any(value is other for other in read):
                self.results[id(value)] = len(self.operations)
        self.operations.append(read)
        self.held.append(result)
        return result


def _layers_before(
    model: nn.Module, layers: Sequence[str], input_size: Sequence[int]
) -> dict[int, tuple[str, Tensor | None]]:
    """id of a BatchNorm → the quantized layer in front of it and that layer's bias.

    For convolutions and linear layers whose weight one operation reads, as it is, and whose output nothing reads but this
    BatchNorm, which reads nothing else.
    """
    device = next(model.parameters()).device
    with _Reads() as reads:
        output = model(torch.zeros(1, *input_size, device=device))
    readers: dict[int, list[int]] = defaultdict(list)  # id of a tensor -> operations
    by_storage: dict[int, list[int]] = defaultdict(list)
    for number, read in enumerate(reads.operations):
        for value in read:
            readers[id(value)].append(number)
            by_storage[value.untyped_storage().data_ptr()].append(number)
    delivered = {id(value) for value in tree_leaves(output)}

    def readers_of(parameter: Tensor) -> set[int]:
        """Operations that read a parameter, views of it aside."""
        own = parameter.untyped_storage().data_ptr()
        return {number for number in by_storage[own] if not _is_view(reads.held[number], own)}

    norms: dict[int, list[_Norm]] = defaultdict(list)  # operation -> the norms that it belongs to
    for module in model.modules():
        if isinstance(module, _Norm) and module.weight is not None and len(readers_of(module.weight)) == 1:
            norms[readers_of(module.weight).pop()].append(module)
    found: dict[int, tuple[str, Tensor | None]] = {}
    made_by = {number: identity for identity, number in reads.results.items()}
    for layer in layers_named(model, layers):
        module = model.get_submodule(layer.name.rpartition(".")[0])
        plain = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and module.weight is layer.parameter
        grouped = isinstance(module, nn.modules.conv._ConvTransposeNd) and module.groups > 1
        if not plain or grouped or layer.aliases:
            continue
        bias: nn.Parameter | None = module.bias  # type: ignore[assignment]
        if len(users := readers_of(layer.parameter)) != 1 or (bias is not None and readers_of(bias) != users):
            continue
        identity = made_by.get(users.pop())
        if identity is None or identity in delivered or len(readers[identity]) != 1:
            continue
        behind = norms[readers[identity][0]]
        if len(behind) == 1 and behind[0].num_features == layer.parameter.shape[layer.channel_dim]:
            found[id(behind[0])] = layer.name, bias
    return found


def _is_view(result: Any, storage: int) -> bool:
    return isinstance(result, Tensor) and result.untyped_storage().data_ptr() == storage
