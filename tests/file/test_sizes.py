"""Sizes and bit operations of a file, against numbers that were worked out by hand."""

from __future__ import annotations

import pytest

from csqcli.file import sizes
from csqcli.file.manifest import ActivationEntry, LayerRecord


def record(name: str, shape: list[int], mask: str, stored: int, entropy: float, macs: int | None) -> LayerRecord:
    weights = shape[0] * shape[1]
    bits = mask.count("1")
    return LayerRecord(
        name=name, shape=shape, weights=weights, mask=mask, bits=bits, stored_bits=stored, entropy_bits=entropy,
        scale=1.0, encoding="codes8", packed_bytes=weights, macs=macs,
    )  # fmt: skip


LAYERS = [
    record("a.weight", [10, 6], "01010000", 4, 1.5, 600),  # digits of 2^2 and 2^0: −5 … 5, which sign and 3 bits hold
    record("b.weight", [10, 2], "00000000", 0, 0.0, None),
    record("c.weight", [10, 2], "11100000", 4, 2.5, 200),
]


@pytest.mark.parametrize(
    ("mask", "dense"), [("00000000", 0), ("10000000", 2), ("10100000", 4), ("00010001", 6), ("11111111", 9)]
)
def test_a_dense_layout_takes_a_sign_and_the_span_of_a_mask(mask: str, dense: int) -> None:
    assert sizes.stored_bits(mask) == dense


def test_of_a_basis_a_dense_layout_takes_a_bit_a_plane() -> None:
    assert sizes.stored_bits("11100000", basis=True) == 3


def test_sizes_are_means_over_weights_and_not_over_layers() -> None:
    found = sizes.sizes(LAYERS, float_bytes=400)
    assert found.paper_compression == pytest.approx(32 / 1.8)  # (60·2 + 20·0 + 20·3) / 100 planes
    assert found.stored_bits_per_weight == pytest.approx(3.2)  # (60·4 + 20·4) / 100
    assert found.entropy_bits_per_weight == pytest.approx(1.4)  # (60·1.5 + 20·2.5) / 100


def test_bit_operations_count_planes_by_input_bits_and_the_rest_of_the_network_in_float() -> None:
    rounded = [ActivationEntry(module="c", bits=4, signed=False, scale=0.1)]
    found = sizes.compute(LAYERS, rounded, input_size=[3, 8, 8], macs=1000)
    assert found.quantized_macs == 800
    assert found.bops == 600 * 2 * 32 + 200 * 3 * 4 + 200 * 32 * 32  # a's input is float, c's has 4 bits
