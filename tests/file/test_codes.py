"""Packing is lossless, as small as it says, and refuses damage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from csqcli.file import codes as packing

shapes = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=9)


@given(st.sampled_from([0, 1, 2, 7, 8, 127, 128, 255, 32767]), shapes, st.integers(0, 2**32 - 1))
def test_integers_come_back_exactly(top: int, shape: tuple[int, ...], seed: int) -> None:
    integers = torch.randint(-top, top + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    data, encoding = packing.encode(integers)
    assert torch.equal(packing.decode(data, encoding, shape).to(torch.int32), integers)


def test_ternary_weights_take_a_quarter_byte_and_skewed_ones_less() -> None:
    even = torch.tensor([-1, 0, 1]).repeat(4000)
    assert packing.encode(even)[0].numel() <= 3000
    skewed = (torch.rand(12_000, generator=torch.Generator().manual_seed(0)) < 0.05).int()
    data, encoding = packing.encode(skewed)
    assert encoding == "codes2+huffman"
    assert data.numel() * 8 / 12_000 < 0.4  # entropy 0.286; a coder of bytes pays at least 1/4 bit per 2-bit code


@pytest.mark.parametrize("sigma", [0.6, 1.5, 5.0, 40.0])
def test_huffman_coded_gaussian_weights_come_close_to_their_entropy(sigma: float) -> None:
    rng = np.random.default_rng(1)
    integers = torch.from_numpy(np.round(rng.normal(0, sigma, 200_000)).clip(-127, 127).astype(np.int32))
    bits = packing.encode(integers)[0].numel() * 8 / 200_000
    assert bits <= packing.entropy_bits(integers) * 1.03 + 0.01


def test_entropy_of_a_fair_coin_is_one_bit() -> None:
    assert packing.entropy_bits(torch.tensor([0, 1, 0, 1])) == 1.0
    assert packing.entropy_bits(torch.zeros(9)) == 0.0


@given(
    st.binary(max_size=200), st.sampled_from(["codes2", "codes4+huffman", "codes16", "codes3", "x", "codes8+huffman"])
)
def test_damaged_payloads_raise_value_error_only(payload: bytes, encoding: str) -> None:
    data = torch.from_numpy(np.frombuffer(payload, dtype=np.uint8).copy())
    try:
        packing.decode(data, encoding, (5, 7))
    except ValueError:
        return
    assert len(payload) in (9, 35, 70) or "huffman" in encoding


def test_a_decompression_bomb_is_stopped_at_the_declared_size() -> None:
    data, encoding = packing.encode(torch.zeros(10_000_000, dtype=torch.int32))
    with pytest.raises(ValueError, match="does not end where the shape says"):
        packing.decode(data, encoding, (10,))


def test_layers_of_nearly_nothing_but_zeros_take_nearly_no_bytes() -> None:
    integers = torch.zeros(200_000, dtype=torch.int32)
    integers[::5000] = 9  # a byte-wise Huffman code alone would spend a bit on each weight
    data, encoding = packing.encode(integers)
    assert data.numel() * 8 / 200_000 < 0.05
    assert torch.equal(packing.decode(data, encoding, (200_000,)).to(torch.int32), integers)


def test_integers_changed_in_place_are_packed_anew() -> None:
    integers = torch.zeros(64, dtype=torch.int32)
    first, encoding = packing.encode(integers)
    assert packing.encode(integers)[0] is first
    integers[5] = 3
    again, encoding = packing.encode(integers)
    assert packing.decode(again, encoding, (64,))[5] == 3
