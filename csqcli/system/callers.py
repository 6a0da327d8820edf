"""What a function of the library leaves as it found it in the process of whoever calls it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator


@contextlib.contextmanager
def preserve_global_state() -> Iterator[None]:
    """PyTorch's number of threads, and the states of all random streams (Python's, NumPy's, PyTorch's on the CPU and on CUDA
    where it is in use), are afterwards what they were before, whatever happened in between."""
    import numpy
    import torch

    threads, streams = torch.get_num_threads(), (random.getstate(), numpy.random.get_state(), torch.get_rng_state())
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        python, of_numpy, of_torch = streams
        random.setstate(python)
        numpy.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if of_gpus:
            torch.cuda.set_rng_state_all(of_gpus)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
