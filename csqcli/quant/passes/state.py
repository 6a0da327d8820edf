"""What all state per weight shares: its number format, slices that stay in cache, kernels where there is a GPU.

State is float32 (the reference) or bfloat16, half the bytes. bfloat16 keeps 8 bits of a number, so most updates of one
training step would round to nothing; they are rounded up or down at random instead, and are right on average. The random
bits are a pure function of the step, so resumed runs and all ranks round alike.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

log = logging.getLogger(__name__)

CHUNK = 2**15  # weights per slice of gates on a CPU: 8 planes of fp32 temporaries are 1 MiB each
PART = 2**17  # latents per slice and thread on a CPU
GPU_CHUNK = 2**22  # without Triton: few launches, and temporaries that fit beside any model
_SHIFT, _SHIFTS = 509, 64  # two windows of the noise start this far apart, or a multiple of it


def chunk_size(device: torch.device) -> int:
    """Weights per slice of a pass over gates."""
    return GPU_CHUNK if device.type == "cuda" else CHUNK


def part_size(device: torch.device) -> int:
    """Weights per slice of a pass over latents."""
    return GPU_CHUNK if device.type == "cuda" else PART * torch.get_num_threads()


def kernels_for(device: torch.device) -> ModuleType | None:
    """The Triton twins of the passes; None on a CPU, and where Triton is missing or cannot build them."""
    return _load_kernels(device) if device.type == "cuda" else None


@functools.cache
def _load_kernels(device: torch.device) -> ModuleType | None:
    try:
        from csqcli.quant.passes import kernels

        kernels.check(device)
    except Exception as error:  # whatever it is: PyTorch's own operations do the same
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("Triton's kernels do not run here (%s): PyTorch's operations take their place, slower", reason)
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


def parts_of(rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of [outer, channels, inner] along its first two dimensions, of `part_size` weights or one channel."""
    outer, channels, inner = rows.shape
    weights = part_size(rows.device)
    some = max(1, weights // inner)  # channels at a time
    many = max(1, weights // (channels * inner))
    for first in range(0, outer, many):
        for start in range(0, channels, some):
            yield slice(first, first + many), slice(start, start + some)


def of_channels(vector: Tensor, channels: slice) -> Tensor:
    """The entries of a vector [channels, 1] that belong to some channels; one of [1, 1] belongs to all."""
    return vector if len(vector) == 1 else vector[channels]
