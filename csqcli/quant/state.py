"""What all state per weight shares: its number format, slices that stay in cache, kernels where there is a GPU.

State is float32 (the reference) or bfloat16, half the bytes. bfloat16 keeps 8 bits of a number, so most updates of one
training step would round to nothing; they are rounded up or down at random instead, and are right on average. The random
bits are a pure function of the step, so resumed runs and all ranks round alike.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

CHUNK = 2**15  # weights per slice on a CPU: 8 planes of fp32 temporaries are 1 MiB each
GPU_CHUNK = 2**22  # without Triton: few launches, and temporaries that fit beside any model
_SHIFT, _SHIFTS = 509, 64  # two windows of the noise start this far apart, or a multiple of it


def chunk_for(device: torch.device) -> int:
    """Weights per slice of a pass on this device."""
    return GPU_CHUNK if device.type == "cuda" else CHUNK


@functools.cache
def load_kernels() -> ModuleType | None:
    """The Triton twins of the passes; None where Triton does not exist."""
    try:
        from csqcli.quant import kernels
    except ImportError:
        return None
    return kernels


class Noise:
    """Random bits of one pass for :func:`round_into`.

    One table is drawn per seed, and every slice of the state looks at it through a window of its own: numbers far apart
    share bits within a step, which leaves each of them right on average.
    """

    def __init__(self, widest: int, *, seed: int, device: torch.device) -> None:
        """``widest``: columns of the largest window."""
        rng = torch.Generator(device).manual_seed(seed)
        count = widest + 2 * _SHIFT * _SHIFTS
        self.table = torch.randint(0, 2**16, (count,), dtype=torch.int32, device=device, generator=rng)
        self.windows = 0

    def window(self, rows: int, columns: int) -> Tensor:
        """int32 [rows, columns] in [0, 2^16); at most 64 rows."""
        self.windows = (self.windows + 1) % _SHIFTS
        return self.table.as_strided((rows, columns), (_SHIFT, 1), self.windows * _SHIFT)


def round_into(target: Tensor, value: Tensor, noise: Tensor) -> None:
    """Write float32 ``value`` (overwritten) to bfloat16 ``target``, up with the probability that makes it right on average.

    A bfloat16 is the upper half of a float32: ``noise`` is added to the lower half, carries, and the lower half is cut off.
    """
    value.view(torch.int32).add_(noise).bitwise_and_(-(2**16))
    target.copy_(value)
