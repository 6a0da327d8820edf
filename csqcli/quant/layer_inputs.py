"""What layers multiply their weights with: the inputs of convolutions and matrix products, as columns.

Operations are recognised by the very parameter that they are given, so padding of one's own, packed projections of
self-attention and functional uses are seen, and a weight that a module computes from its parameter (weight standardisation, a
parametrisation) is not mistaken for it. Not seen are parts of a parameter: packed projections of cross-attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from csqcli.quant.layers import Layer

_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
# nn.MultiheadAttention's function, which would reach a mode as one operation, as a chain of those that it is made of
_ATTENTION = FunctionType(
    F.multi_head_attention_forward.__code__,
    vars(F) | {"has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


class _StopForward(Exception):
    """Every layer asked for has been seen: the rest of the forward pass is of no use."""


class ExecutionOrder(TorchFunctionMode):
    """Inside, a forward pass leaves the indices of ``layers`` in :attr:`order`, as they ran, and in :attr:`biases` the bias that
    each was given."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.of = {id(layer.parameter): index for index, layer in enumerate(layers)}
        self.stop_after: set[int] = set()  # layers after which the pass may end; none: it runs to its end
        self.order: list[int] = []
        self.biases: dict[int, nn.Parameter] = {}
        self._attending: int | None = None  # images of the attention that runs: its rows are token after token

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # inside of it, it is not looked for again: were it whole there too, it would be unseen and not endless
        if function is F.multi_head_attention_forward and self._attending is None:
            return self._attend(args, kwargs or {})
        result = function(*args, **(kwargs or {}))
        dims = _CONVOLUTIONS.get(function)
        if dims is None and function is not F.linear:
            return result
        given = dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {})
        index = self.of.get(id(given.get("weight")))
        if index is None or index in self.order:  # of a layer that runs twice, the first time
            return result
        with torch._C.DisableTorchFunction():
            self._see(index, dims, given)
        if self.stop_after and self.stop_after <= set(self.order):
            raise _StopForward
        return result

    def _attend(self, args: Any, kwargs: dict[str, Any]) -> Any:
        query = args[0] if args else kwargs["query"]  # [tokens, images, columns], or of one image [tokens, columns]
        self._attending = query.shape[1] if query.dim() == 3 else 1
        try:
            with self:
                return _ATTENTION(*args, **kwargs)
        finally:
            self._attending = None

    def _see(self, index: int, dims: int | None, given: dict[str, Any]) -> None:
        self.order.append(index)
        if isinstance(given.get("bias"), nn.Parameter):
            self.biases[index] = given["bias"]


class LayerInputs(ExecutionOrder):
    """Inside, a forward pass leaves the inputs of ``layers`` in :attr:`columns` too, as [groups, columns, samples].

    At most about ``positions`` output positions of an image are taken (one number, or one per layer), on a regular grid whose
    origin is ``offset`` positions on.
    """

    def __init__(self, layers: Sequence[Layer], *, positions: int | Sequence[int], offset: int = 0) -> None:
        super().__init__(layers)
        self.positions = [positions] * len(layers) if isinstance(positions, int) else list(positions)
        self.offset = offset
        self.columns: dict[int, Tensor] = {}

    def _see(self, index: int, dims: int | None, given: dict[str, Any]) -> None:
        super()._see(index, dims, given)
        if dims is None:
            rows = given["input"]
            if self._attending is not None:
                rows = rows.reshape(-1, self._attending, rows.shape[-1]).transpose(0, 1)
            self.columns[index] = rows_of(rows, self.positions[index], self.offset)
        else:
            self.columns[index] = patches(dims, given, self.positions[index], self.offset)


@contextlib.contextmanager
def allow_early_stop() -> Iterator[None]:
    """Around a forward pass that may end early."""
    with contextlib.suppress(_StopForward):
        yield


def rows_of(inputs: Tensor, positions: int, offset: int) -> Tensor:
    """[1, columns, samples] of the input of a matrix product, [batch, …, columns]."""
    if inputs.dim() > 2:
        tokens = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
        every = max(1, tokens.shape[1] // positions)
        inputs = tokens[:, offset % every :: every]
    return inputs.reshape(-1, inputs.shape[-1]).t().unsqueeze(0)


def patches(dims: int, given: dict[str, Any], positions: int, offset: int) -> Tensor:
    """[groups, columns, samples] of a convolution's input: what each output position multiplies the weight with."""
    image, kernel = given["input"].detach(), given["weight"].shape[2:]
    if image.dim() == dims + 1:
        image = image.unsqueeze(0)
    stride, dilation = (_each(given.get(name, 1), dims) for name in ("stride", "dilation"))
    groups = given.get("groups", 1)
    image = F.pad(image, _padding(given.get("padding", 0), kernel, dilation))
    if dims == 1:
        image, kernel, stride, dilation = image.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    sizes = zip(image.shape[2:], kernel, stride, dilation, strict=True)
    outputs = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in sizes]
    every = max(1, int((outputs[0] * outputs[1] / positions) ** (0.5 if outputs[0] > 1 else 1)))
    skips = [min(every, size) for size in outputs]
    rounds = (offset, offset // skips[0])  # after as many batches as it takes, every position has been an origin
    begin = [at % skip * s for at, skip, s in zip(rounds, skips, stride, strict=True)]
    image = image[:, :, begin[0] :, begin[1] :]
    wide = [skip * s for skip, s in zip(skips, stride, strict=True)]
    if tuple(kernel) == (1, 1):
        taken = image[:, :, :: wide[0], :: wide[1]].flatten(2)
    else:
        taken = F.unfold(image, tuple(kernel), dilation=tuple(dilation), stride=tuple(wide))  # [B, C·k, L]
    taken = taken.unflatten(1, (groups, -1))
    return taken.permute(1, 2, 0, 3).flatten(2)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """As `F.pad` takes it: the last dimension first, both sides."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(one, one) for one in _each(padding, len(kernel))]
    return [one for pair in reversed(sides) for one in pair]
