"""Packing is lossless, as small as it says, and refuses damage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from csqcli.file import codes

shapes = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=9)
tops = st.sampled_from([0, 1, 2, 7, 8, 127, 128, 255, 32767])


def random_integers(top: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-top, top + 1, shape, dtype=np.int32)


@given(tops, shapes, st.integers(0, 2**32 - 1))
def test_integers_come_back_exactly(top: int, shape: tuple[int, ...], seed: int) -> None:
    integers = random_integers(top, shape, seed)
    data, encoding = codes.encode(integers)
    assert np.array_equal(codes.decode(data, encoding, shape), integers)


@given(tops, shapes, st.integers(0, 2**32 - 1))
def test_encoded_integers_are_counted_without_decoding(top: int, shape: tuple[int, ...], seed: int) -> None:
    integers = random_integers(top, shape, seed)
    counted = codes.count_encoded(*codes.encode(integers), integers.size)
    assert sorted(counted[counted > 0]) == sorted(np.unique(integers, return_counts=True)[1])


def test_bits_that_fill_the_last_byte_are_not_counted_whatever_they_are() -> None:
    assert codes.count_encoded(bytes([0b11_01_01_00]), "codes2", 3).tolist() == [1, 2, 0, 0]


def test_ternary_weights_take_a_quarter_byte_and_skewed_ones_less() -> None:
    even = np.tile([-1, 0, 1], 4000)
    assert len(codes.encode(even).data) <= 3000
    skewed = (np.random.default_rng(0).random(12_000) < 0.05).astype(np.int32)
    data, encoding = codes.encode(skewed)
    assert encoding == "codes2+huffman"
    assert len(data) * 8 / 12_000 < 0.4  # entropy 0.286; a coder of bytes pays at least 1/4 bit per 2-bit code


@pytest.mark.parametrize("sigma", [0.6, 1.5, 5.0, 40.0])
def test_huffman_coded_gaussian_weights_come_close_to_their_entropy(sigma: float) -> None:
    rng = np.random.default_rng(1)
    integers = np.round(rng.normal(0, sigma, 200_000)).clip(-127, 127).astype(np.int32)
    share = np.unique(integers, return_counts=True)[1] / 200_000
    bits = len(codes.encode(integers).data) * 8 / 200_000
    assert bits <= -(share * np.log2(share)).sum() * 1.03 + 0.01


def test_entropy_of_a_fair_coin_is_one_bit_and_of_a_constant_none() -> None:
    assert codes.entropy_bits(codes.count(np.array([0, 1, 0, 1]))) == 1.0
    constant = codes.entropy_bits(codes.count(np.zeros(9, dtype=np.int32)))
    assert (constant, math.copysign(1, constant)) == (0.0, 1.0)


@given(
    st.binary(max_size=200), st.sampled_from(["codes2", "codes4+huffman", "codes16", "codes3", "x", "codes8+huffman"])
)
def test_damaged_payloads_raise_value_error_only(payload: bytes, encoding: str) -> None:
    try:
        codes.decode(payload, encoding, (5, 7))
    except ValueError:
        with pytest.raises(ValueError):  # noqa: PT011  # counting refuses what decoding refuses
            codes.count_encoded(payload, encoding, 35)
        return
    assert len(payload) in (9, 35, 70) or "huffman" in encoding
    assert codes.count_encoded(payload, encoding, 35).sum() == 35


def test_a_decompression_bomb_is_stopped_at_the_declared_size() -> None:
    data, encoding = codes.encode(np.zeros(10_000_000, dtype=np.int32))
    with pytest.raises(ValueError, match="does not end where the shape says"):
        codes.decode(data, encoding, (10,))


def test_layers_of_nearly_nothing_but_zeros_take_nearly_no_bytes() -> None:
    integers = np.zeros(200_000, dtype=np.int32)
    integers[::5000] = 9  # a byte-wise Huffman code alone would spend a bit on each weight
    data, encoding = codes.encode(integers)
    assert len(data) * 8 / 200_000 < 0.05
    assert np.array_equal(codes.decode(data, encoding, (200_000,)), integers)


def test_integers_are_counted_block_by_block_and_none_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "_BLOCK", 4)
    integers = np.array([-1, 2, 0, -1, 0, 0, 2, -1, 0, 0, 2])
    assert codes.count(integers).tolist() == [3, 5, 0, 3]  # of −1, 0, 1, 2
    assert codes.count(integers, low=-2, high=2).tolist() == [0, 3, 5, 0, 3]
