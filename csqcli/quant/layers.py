"""Which tensors of a model are weights to quantize: one rule, in one place.

A weight is a parameter of two or more dimensions that a linear- or convolution-like operation multiplies its input with
(packed attention projections and recurrent layers too), or that a parametrisation computes such a weight from. It is
recognised by what it is (the module that owns it and the role its own name states), never by a list of model names.
Everything else stays float and is listed with the reason.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from csqcli.errors import UserError, did_you_mean

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Layer:
    """One weight tensor under quantization: its state-dict name, the parameter itself, where its output channels are."""

    name: str
    parameter: nn.Parameter
    channel_dim: int = 0
    aliases: tuple[str, ...] = ()  # further state-dict names of the same tensor (tied weights)

    @property
    def weights(self) -> int:
        return self.parameter.numel()

    @property
    def allows_channel_scales(self) -> bool:
        """Whether a scale per output channel is fewer numbers than weights: where a channel is one weight, all share one scale."""
        return self.weights > self.parameter.shape[self.channel_dim]

    @functools.cached_property
    def memory_order(self) -> tuple[int, ...]:
        """Dimensions from the slowest to the fastest in memory, as they were when this was first asked."""
        strides = self.parameter.stride()
        # stable: dimensions of size 1 keep their place
        return tuple(sorted(range(len(strides)), key=lambda dim: -strides[dim]))

    def flat(self, tensor: Tensor) -> Tensor:
        """``tensor`` of the weight's shape as [weights], in the order in which the weight lies in memory (channels_last too)."""
        return tensor.permute(self.memory_order).reshape(-1)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Tensor]:
        """The weight's values as [weights], to write to: its own memory, or a copy that is written back.

        The copy is for weights that have gaps, or that were moved to another memory format since.
        """
        weight = self.parameter.data
        in_order = weight.permute(self.memory_order)
        if in_order.is_contiguous():
            yield in_order.view(-1)
        else:
            values = torch.empty_like(weight, memory_format=torch.contiguous_format).view(-1)
            yield values
            weight.copy_(self.unflatten(values))

    def by_channel(self, flat: Tensor) -> Tensor:
        """[weights] of :meth:`flat` as [outer, channels, inner]: output channels are the middle dimension."""
        order = self.memory_order
        at = order.index(self.channel_dim)
        inner = math.prod(self.parameter.shape[dim] for dim in order[at + 1 :])
        return flat.view(-1, self.parameter.shape[self.channel_dim], inner)

    def unflatten(self, flat: Tensor) -> Tensor:
        """Inverse of :meth:`flat`: contiguous, in the weight's shape."""
        return self._in_shape(flat, self.memory_order).contiguous()

    def reordered(self, flat: Tensor, order: Sequence[int]) -> Tensor:
        """[…, weights] that were laid out in another memory order, in this one's."""
        if tuple(order) == self.memory_order:
            return flat
        kept = range(flat.dim() - 1)
        own = [len(kept) + dim for dim in self.memory_order]
        return self._in_shape(flat, order).permute(*kept, *own).reshape(flat.shape)

    def _in_shape(self, flat: Tensor, order: Sequence[int]) -> Tensor:
        """[…, weights] laid out in ``order`` as […, *weight]."""
        lead = flat.shape[:-1]
        split = flat.view(*lead, *(self.parameter.shape[dim] for dim in order))
        inverse = [len(lead) + order.index(dim) for dim in range(len(order))]
        return split.permute(*range(len(lead)), *inverse)


@dataclass(frozen=True)
class FloatTensor:
    """A parameter of two or more dimensions that stays float, and why."""

    name: str
    shape: tuple[int, ...]
    why: str


def find_layers(model: nn.Module, *, exclude: Iterable[str] = ()) -> tuple[list[Layer], list[FloatTensor]]:
    """Weights to quantize, in the model's own order, and the tensors of two or more dimensions left float.

    ``exclude`` holds globs over tensor names (``fc.weight``, ``layer4.*``) that stay float and uncounted; a text is one.
    Raises UserError for a glob that matches no weight, for weights with NaN or infinite values, and for parameters that
    cannot be trained in place: lazy ones, and expanded ones.
    """
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    found: dict[int, tuple[str, nn.Parameter, int, list[str]]] = {}
    left: dict[int, FloatTensor] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for own_name, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{module_name}.{own_name}" if module_name else own_name
            _check_memory(name, parameter)
            if id(parameter) in found:
                if name not in (found[id(parameter)][0], *found[id(parameter)][3]):
                    found[id(parameter)][3].append(name)
                continue
            why = _why_not_a_weight(module, own_name, parameter)
            if why is None:
                left.pop(id(parameter), None)
                channel_dim = 1 if isinstance(module, _TRANSPOSED) else 0
                found[id(parameter)] = (name, parameter, channel_dim, [])
            elif parameter.dim() >= 2:
                left.setdefault(id(parameter), FloatTensor(name, tuple(parameter.shape), why))

    names = [name for name, *_ in found.values()]
    excluded = set().union(*(match(pattern, names, where="layers.exclude") for pattern in exclude), set())
    layers = []
    for name, parameter, channel_dim, aliases in found.values():
        if name in excluded:
            left[id(parameter)] = FloatTensor(name, tuple(parameter.shape), "excluded by the recipe")
            continue
        if not torch.isfinite(parameter).all():
            raise UserError("holds NaN or infinite values", where=name, hint="the checkpoint is damaged; use another")
        layers.append(Layer(name, parameter, channel_dim, tuple(aliases)))
    if not layers:
        hint = "it has no linear or convolution layer"
        if found:
            hint = f"all {len(found)} are excluded: see layers.exclude in the recipe, or the argument `exclude`"
        raise UserError("the model has no weight to quantize", hint=hint)
    return layers, list(left.values())


def layers_named(model: nn.Module, names: Iterable[str]) -> list[Layer]:
    """The layers of a model that a quantized file lists, in the file's order. UserError for a name it does not have."""
    known = {layer.name: layer for layer in find_layers(model)[0]}
    missing = [name for name in names if name not in known]
    if missing:
        raise UserError(
            "the model has no such weight", where=missing[0], hint="the file belongs to another architecture"
        )
    return [known[name] for name in names]


def match(pattern: str, names: Iterable[str], *, where: str) -> set[str]:
    """Names that a glob selects; a module's name selects its weight too. UserError when there is none."""
    names = list(names)
    hits = {name for name in names if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(_module(name), pattern)}
    if not hits:
        hint = did_you_mean(pattern, [*names, *map(_module, names)]) or "`csq inspect MODEL` lists the names"
        raise UserError(f"`{pattern}` matches no quantized weight", where=where, hint=hint)
    return hits


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _check_memory(name: str, parameter: nn.Parameter) -> None:
    """UserError for a parameter that has no memory yet, or several elements at one place of it."""
    if nn.parameter.is_lazy(parameter):
        raise UserError("has no shape yet (a lazy module)", where=name, hint="run the model on an image once before")
    if any(size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
        raise UserError("is expanded: its elements share memory", where=name, hint="make it a clone of itself")


def _why_not_a_weight(module: nn.Module, own_name: str, parameter: nn.Parameter) -> str | None:
    """None for a weight; otherwise the reason that `csq inspect` prints."""
    if parameter.dim() < 2:
        return "fewer than two dimensions"
    if parameter.numel() == 0:
        return "no elements"
    if not parameter.is_floating_point():
        return f"dtype {parameter.dtype}"
    if isinstance(module, _NORMS):
        return "normalisation"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding table"
    if own_name == "weight" or own_name.endswith("_weight"):  # in_proj_weight, q_proj_weight, …
        return None
    if isinstance(module, nn.RNNBase) and own_name.startswith("weight_"):  # weight_ih_l0, weight_hh_l0_reverse, …
        return None
    if (
        own_name == "weight_v" and "weight_g" in module._parameters
    ):  # weight_norm: the direction; its length is per channel
        return None
    if isinstance(module, ParametrizationList):  # the same, and parametrisations of one tensor
        return None if own_name in ("original", "original1") else "parameter of a parametrisation"
    return "no weight of a linear- or convolution-like operation"
