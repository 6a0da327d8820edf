"""A bound on the tensors that a model's constructor makes, for arguments that come out of a file."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class AllocationLimit(TorchDispatchMode):
    """Inside, ``tensors`` may be made from nothing, of ``elements`` in all, and what operations broadcast to has no more of them.

    A constructor whose arguments come from a file then fails before it allocates, not after.
    """

    def __init__(self, elements: int, *, tensors: int = 2**20) -> None:
        super().__init__()
        self.left = self.limit = elements
        self.tensors = self.tensors_left = tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        shapes = [item.shape for item in (*args, *kwargs.values()) if isinstance(item, Tensor)]
        if shapes:
            self._check(_broadcast(shapes), self.limit)
        elif any(argument.name == "device" for argument in func._schema.arguments):
            size = func(*args, **kwargs | {"device": torch.device("meta")}).numel()
            self._check(size, self.left)
            self.left -= size
            self.tensors_left -= 1
            if self.tensors_left < 0:
                raise ValueError(f"arguments that ask for more than {self.tensors:,} tensors")
        return func(*args, **kwargs)

    @staticmethod
    def _check(size: int, limit: int) -> None:
        if size > limit:
            raise ValueError(f"arguments that ask for tensors of {size:,} elements")


def _broadcast(shapes: list[torch.Size]) -> int:
    """Elements that an elementwise operation on these shapes gives; 0 where they do not broadcast."""
    dims = max(map(len, shapes))
    columns = zip(*([1] * (dims - len(shape)) + list(shape) for shape in shapes), strict=True)
    return math.prod(max(column) if set(column) <= {1, max(column)} else 0 for column in columns)
