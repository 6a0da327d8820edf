"""What csq would quantize in a model: weights, their share of parameters and of multiply-accumulates, and what stays float."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from csqcli.errors import FORWARD_ERRORS, UserError, cannot_run
from csqcli.quant.layers import FloatTensor, Layer, find_layers
from csqcli.quant.names import owner_of


@dataclass(frozen=True)
class Call:
    """A convolution or matrix product with a layer's weight, on one image."""

    kind: Literal["convolution", "linear"]
    input: tuple[int, ...]  # [1, channels, *sides] as the operation gets it, padded or not; [rows, inputs]
    # [outputs, inputs / groups, *kernel] ([inputs, outputs / groups, …] transposed); [outputs, inputs]
    weight: tuple[int, ...]
    bias: bool = False
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()


@dataclass(frozen=True)
class Operations:
    """Multiply-accumulates of one image of ``input_size``."""

    input_size: tuple[int, ...]
    macs: dict[str, int | None]  # per layer; None where its weight is in no operation
    total: int  # of the whole network
    calls: dict[str, list[Call]] = field(default_factory=dict)  # per layer, in the order in which they run


def coverage(
    model: nn.Module, input_size: Sequence[int], *, exclude: str | Sequence[str] = (), task: str = "classification"
) -> dict[str, Any]:
    """Coverage of a model at one image of ``input_size`` (C, H, W); ``task`` as in :func:`example_inputs`.

    ``macs`` per layer are null where nothing uses the weight. UserError for images that the model cannot run on.
    """
    layers, left = find_layers(model, exclude=exclude)
    try:
        operations = count_macs(model, layers, input_size, task=task)
    except FORWARD_ERRORS as error:
        raise UserError(
            f"the model {cannot_run(error, input_size)}", hint="give the input size that it takes"
        ) from error
    macs, total_macs = operations.macs, operations.total
    parameters = sum(p.numel() for p in model.parameters())
    weights = sum(layer.weights for layer in layers)
    counted = sum(value or 0 for value in macs.values())
    return {
        "input_size": list(input_size),
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
    task: str,
    input_size: Sequence[int],
    *,
    batch: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, ...]:
    """Positional arguments of a forward pass over a batch of noise; ``task`` as `libraries.task_of` names it."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, *input_size, generator=generator).to(device, dtype)
    if task == "detection":
        return (list(images),)
    return (images, images.flip(-1)) if task == "optical flow" else (images,)


@torch.no_grad()
def count_macs(
    model: nn.Module, layers: Sequence[Layer], input_size: Sequence[int], *, task: str = "classification"
) -> Operations:
    """Multiply-accumulates of one image, per layer and in all.

    Counted are convolutions, matrix products and attention by PyTorch's own formulas, and recurrent layers. An operation
    belongs to the layer whose memory it reads, so functional uses and packed projections count. One that reads no layer's
    memory belongs to the layer in whose forward pass it runs: weight standardisation and mixtures of experts compute new
    weights from their own. The model is called once, in eval mode; its modes, its gradients and the random stream are as
    before.
    """
    modes = [(module, module.training) for module in model.modules()]
    like = next(model.parameters())
    device = like.device
    counter = _Counter(layers)
    handles = counter.watch(model, layers)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation without a formula
    model.eval()
    try:
        rng = torch.random.fork_rng([device] if device.type == "cuda" else [])
        # attention as matrix products: not every release has formulas for its fused forms
        with rng, sdpa_kernel(SDPBackend.MATH), counter:
            model(*example_inputs(task, input_size, device=device, dtype=like.dtype))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    macs = {layer.name: counter.macs.get(layer.name) for layer in layers}
    return Operations(tuple(input_size), macs, counter.total, counter.calls)


class _Counter(TorchDispatchMode):
    """Multiply-accumulates of every operation that runs, by the layer that it belongs to."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.names = {layer.parameter.untyped_storage().data_ptr(): layer.name for layer in layers}
        self.running: list[str] = []  # layers in whose forward pass we are, innermost last
        self.macs: dict[str, int] = {}
        self.calls: dict[str, list[Call]] = {}
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function.overloadpacket)
        if formula is not None:
            read = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
            names = {self.names[pointer] for pointer in read & self.names.keys()} or set(self.running[-1:])
            self._add(formula(*args, **(kwargs or {}), out_val=result) // 2, names)
            call = self._call(function.overloadpacket, args) if names else None
            if call is not None:
                for name in names:
                    self.calls.setdefault(name, []).append(call)
        return result

    def _call(self, packet: Any, args: tuple[Any, ...]) -> Call | None:
        """What an operation on a layer's weight does; None for other operations than convolutions and matrix products."""
        aten = torch.ops.aten
        if packet is aten.convolution:
            pixels, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
            return Call(
                "convolution",
                tuple(pixels.shape),
                tuple(weight.shape),
                bias is not None,
                tuple(stride),
                tuple(padding),
                tuple(dilation),
                groups,
                transposed,
                tuple(output_padding),
            )
        if packet not in (aten.addmm, aten.mm):
            return None
        left, right = args[-2:]
        if left.untyped_storage().data_ptr() in self.names:  # the weight stands in front
            left, right = right.t(), left.t()
        return Call("linear", tuple(left.shape), tuple(right.shape[::-1]), packet is aten.addmm)

    def _add(self, macs: int, names: Iterable[str]) -> None:
        self.total += macs
        for name in names:
            self.macs[name] = self.macs.get(name, 0) + macs

    def watch(self, model: nn.Module, layers: Sequence[Layer]) -> list[Any]:
        """Hooks on the modules that own ``layers``, to be removed by the caller."""
        owned: dict[str, list[Layer]] = {}
        for layer in layers:
            owned.setdefault(owner_of(layer.name), []).append(layer)
        handles = []
        for name, own in owned.items():
            module = model.get_submodule(name)
            if isinstance(module, nn.RNNBase):
                handles.append(module.register_forward_hook(self._recurrent(own)))
            elif len(own) == 1 and dict(module.named_children()).keys() <= {"parametrizations"}:
                handles += self._around(module, own[0].name)  # all that it does, it does with this weight
        return handles

    def _around(self, module: nn.Module, name: str) -> list[Any]:
        def enter(module: nn.Module, inputs: Any) -> None:
            self.running.append(name)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self.running.pop()

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def _recurrent(self, layers: Sequence[Layer]) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            for layer in layers:
                if layer.name not in self.macs:  # fused: no operation of it was seen
                    self._add(inputs[0].numel() // module.input_size * layer.weights, [layer.name])

        return hook
