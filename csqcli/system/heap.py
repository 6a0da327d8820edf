"""Memory that was freed stays with the process, on Linux with glibc: training steps on the CPU become faster.

A step asks for the same large blocks as the step before. glibc maps each block of 32 MiB and more anew, and gives smaller ones back
whenever the top of its heap is free; the system then clears and maps every page again (`benchmarks/heap.py`).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST = 2**31 - 1  # an int: what is free at the top of the heap is never given back
# Bytes from which a block is mapped by itself, the first that this glibc takes. Larger blocks, those of an evaluation, would leave
# holes that no other block fills: from 1 GiB on, processes grow by a quarter.
_MAPPED_FROM = (2**27, 2**25)


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Have this process and those it forks keep what they free; whether that was done.

    Not on systems without glibc, nor where the environment sets malloc up already (``MALLOC_…``, ``GLIBC_TUNABLES``).
    """
    chosen = any(name.startswith("MALLOC_") for name in environment)
    if chosen or "GLIBC_TUNABLES" in environment or sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return any(libc.mallopt(_MMAP_THRESHOLD, size) for size in _MAPPED_FROM) and bool(
        libc.mallopt(_TRIM_THRESHOLD, _LARGEST)
    )
