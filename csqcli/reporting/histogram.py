"""How a layer's integers are spread, in few numbers, however many there are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from csqcli.file import codes

_MOST_BINS = 33


@dataclass(frozen=True)
class Histogram:
    """A layer's integers. The lists are short, so that those of every layer of any file can be kept."""

    low: int  # the least integer that occurs
    high: int
    entropy_bits: float  # per weight
    magnitudes: tuple[int, ...]  # weights whose |Q| is 0, 1, 2…3, 4…7 and so on
    bins: tuple[int, ...]  # weights in bins of one width from −max |Q| to max |Q|


def histogram(counts: np.ndarray, *, low: int) -> Histogram:
    """``counts[i]``: how often the integer ``low + i`` occurs; one at least does."""
    values = np.arange(low, low + len(counts), dtype=np.int64)[counts > 0]
    counts = counts[counts > 0]
    top = int(np.abs(values).max())
    bits = np.frexp(np.abs(values).astype(np.float64))[1]  # of |Q| in binary; 0 for 0
    wide = min(2 * top + 1, _MOST_BINS)
    bins = ((values + top) * wide) // (2 * top + 1)
    return Histogram(
        low=int(values[0]),
        high=int(values[-1]),
        entropy_bits=round(codes.entropy_bits(counts), 6),
        magnitudes=tuple(np.bincount(bits, weights=counts).astype(int).tolist()),
        bins=tuple(np.bincount(bins, weights=counts, minlength=wide).astype(int).tolist()),
    )


def magnitude_name(bits: int) -> str:
    """``±4…7`` for the magnitudes of three bits."""
    return "0" if bits == 0 else "±1" if bits == 1 else f"±{2 ** (bits - 1)}…{2**bits - 1}"
