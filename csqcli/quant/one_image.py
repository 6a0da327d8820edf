"""What one image gives each module: how many values, and whether they are still the image's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from csqcli.quant.measuring import evaluating


@dataclass
class ModuleInput:
    """What a module receives when one image goes through the model."""

    values: int = 1  # of its largest input
    is_image: bool = False


@torch.no_grad()
def inputs_from_one_image(model: nn.Module, names: Sequence[str], image: Tensor) -> dict[str, ModuleInput]:
    """What each module that is called receives, positionally, from ``image`` [1, …].

    The image is also what views, copies, types, norms, padding and other operations make of it, until a convolution or a matrix product:
    its values are still those of the pixels. The model runs once, in eval mode; it and the random stream come back as they were.
    """
    found: dict[str, ModuleInput] = {}
    modules = dict(model.named_modules())
    following = _ImageOperations(image)

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            given = found.setdefault(name, ModuleInput())
            for value in inputs:
                if isinstance(value, Tensor) and value.is_floating_point():
                    given.values = max(given.values, value.numel())
                    given.is_image |= following.is_in(value)

        return hook

    hooks = [modules[name].register_forward_pre_hook(watch(name)) for name in names]
    try:
        rng = torch.random.fork_rng([image.device] if image.is_cuda else [])
        with evaluating(model), rng, following:
            model(image)
    finally:
        for handle in hooks:
            handle.remove()
    return found


class _ImageOperations(TorchDispatchMode):
    """Follows the image, and the features that are computed from it, through every operation that runs."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.held = [image]  # so that no address of the image's is used twice
        self.image = {_address(image)}
        self.features: set[int | None] = set()  # of which an address that is used again is classified again

    def is_in(self, value: Any) -> bool:
        """Whether a value is a tensor of the image's, or a view of one."""
        return isinstance(value, Tensor) and _address(value) in self.image

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_address(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)} - {None}
        result = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        multiplies = packet in flop_registry or "rnn" in str(packet)  # cells of fused recurrences have no formula
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        addresses = {_address(value) for value in made} - {None}
        if multiplies or given & self.features:
            self.features |= addresses
            self.image -= addresses  # written in place
        elif given & self.image:
            self.held += made
            self.image |= addresses
            self.features -= addresses
        else:
            self.features -= addresses - given
        return result


def _address(tensor: Tensor) -> int | None:
    """Of a tensor's memory; None of one that has none of its own, as sparse ones."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):
        return None
