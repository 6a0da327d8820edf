"""A sample stands for the whole tensor: it is in step with none of its dimensions."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from csqcli.quant.passes.sampling import sample_indices


@given(st.integers(0, 5000), st.integers(1, 600))
def test_every_position_is_another_one_and_small_tensors_are_taken_whole(count: int, most: int) -> None:
    taken = sample_indices(count, most).tolist()
    assert len(taken) == len(set(taken)) == min(count, most)
    assert all(0 <= position < count for position in taken)
    if count <= most:
        assert taken == list(range(count))


@given(st.sampled_from([(128, 16, 32, 32), (64, 3, 64, 64), (256, 256, 3, 3), (512, 512, 3, 3), (100, 48, 14, 14)]))
def test_every_index_of_every_dimension_is_met_about_equally_often(shape: tuple[int, ...]) -> None:
    taken = sample_indices(math.prod(shape), 2**14)
    for dimension, size in enumerate(shape):
        index = taken // math.prod(shape[dimension + 1 :]) % size
        met = torch.bincount(index, minlength=size)
        expected = len(taken) / size
        assert met.min() >= 0.75 * expected - 2
        assert met.max() <= 1.25 * expected + 2
