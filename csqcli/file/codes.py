"""Integers to bytes and back: byte-aligned codes, Huffman-coded where that is smaller. NumPy only.

A layer's integers become one code each, offset to be non-negative: four 2-bit codes per byte when |Q| ≤ 1, two nibbles
when |Q| ≤ 7, a byte when |Q| ≤ 127, two bytes (low, then high plane) beyond. Because codes never straddle bytes, a
byte-wise Huffman coder (DEFLATE restricted to Huffman codes, from the standard library) reaches within about a percent
of the integers' entropy; packing densely first would hide the statistics from it.
"""

from __future__ import annotations

import math
import zlib
from typing import NamedTuple

import numpy as np

from csqcli.file.deflate import deflate, inflate

WIDTHS = {2: 1, 4: 7, 8: 127, 16: 32767}  # code width in bits -> largest |Q| that it holds
_BLOCK = 2**20  # integers or bytes counted at a time; NumPy's bincount takes eight bytes for each


class Encoded(NamedTuple):
    """One layer's integers as bytes, and the name of their encoding: ``"codes4"`` or ``"codes4+huffman"``."""

    data: bytes
    encoding: str


def code_width(largest: int) -> int:
    """The narrowest code width in bits for |Q| ≤ ``largest``. ValueError beyond 16 bits."""
    for width, top in WIDTHS.items():
        if largest <= top:
            return width
    raise ValueError(f"|Q| = {largest} needs more than 16 bits")


def encode(integers: np.ndarray) -> Encoded:
    """The smallest encoding of one layer's integers (any shape, |Q| ≤ 32767).

    Wider codes than necessary are tried too: their Huffman tables are smaller, which counts in small layers. So are
    runs: a Huffman code spends at least one bit on each byte, even where nearly all weights are zero.
    """
    values = integers.reshape(-1).astype(np.int32)
    narrowest = code_width(int(np.abs(values).max(initial=0)))
    options: dict[str, bytes] = {}
    for width in (width for width in WIDTHS if width == narrowest or narrowest < width < 16):
        raw = _codes(values, width)
        deflated = [deflate(raw, strategy=strategy) for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)]
        options |= {f"codes{width}": raw, f"codes{width}+huffman": min(deflated, key=len)}
    encoding = min(options, key=lambda name: len(options[name]))
    return Encoded(options[encoding], encoding)


def _codes(values: np.ndarray, width: int) -> bytes:
    """Offset codes of ``width`` bits, several to a byte from its low end; 16-bit codes as low bytes, then high bytes."""
    codes = (values + WIDTHS[width]).astype(np.uint16 if width == 16 else np.uint8)
    if width == 16:
        return np.concatenate([codes & 0xFF, codes >> 8]).astype(np.uint8).tobytes()
    per_byte = 8 // width
    codes = np.pad(codes, (0, -len(codes) % per_byte)).reshape(-1, per_byte)
    packed = np.zeros(len(codes), dtype=np.uint8)
    for position in range(per_byte):
        packed |= codes[:, position] << np.uint8(width * position)
    return packed.tobytes()


def packed_bytes(weights: int, width: int) -> int:
    """Bytes of ``weights`` codes of ``width`` bits before Huffman coding."""
    return 2 * weights if width == 16 else math.ceil(weights * width / 8)


def decode(data: bytes, encoding: str, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of :func:`encode`: int8 (int16 for 16-bit codes) of ``shape``.

    Raises ValueError when the bytes do not hold exactly the integers that the shape implies; a Huffman-coded payload
    is never inflated beyond that size.
    """
    weights = math.prod(shape)
    packed, width = _packed(data, encoding, weights)
    if width == 16:
        codes = packed[:weights].astype(np.int32) | (packed[weights:].astype(np.int32) << 8)
    else:
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        codes = ((packed[:, None] >> shifts) & (2**width - 1)).reshape(-1)[:weights].astype(np.int32)
    return (codes - WIDTHS[width]).astype(np.int16 if width == 16 else np.int8).reshape(shape)


def _packed(data: bytes, encoding: str, weights: int) -> tuple[np.ndarray, int]:
    """The codes' bytes (uint8) without their Huffman code, and the width of a code. ValueError as in :func:`decode`."""
    codes_name, _, huffman = encoding.partition("+")
    width = int(codes_name.removeprefix("codes")) if codes_name.removeprefix("codes").isdecimal() else 0
    if not codes_name.startswith("codes") or width not in WIDTHS or huffman not in ("", "huffman"):
        raise ValueError(f"unknown encoding `{encoding}`")
    expected = packed_bytes(weights, width)
    raw = inflate(data, expected) if huffman else data
    if len(raw) != expected:
        raise ValueError(f"{len(raw)} bytes of codes, {expected} expected for {weights} weights")
    return np.frombuffer(raw, dtype=np.uint8), width


def count_encoded(data: bytes, encoding: str, weights: int) -> np.ndarray:
    """How often each integer occurs in an encoded layer, without decoding it. ValueError as in :func:`decode`."""
    packed, width = _packed(data, encoding, weights)
    if width == 16:
        return count(decode(data, encoding, (weights,)))
    per_byte = 8 // width
    by_byte = count(packed, low=0, high=255)
    counts = np.zeros(2**width, dtype=np.int64)
    for position in range(per_byte):
        np.add.at(counts, (np.arange(256) >> (width * position)) & (2**width - 1), by_byte)
    for position in range(weights % per_byte or per_byte, per_byte):  # what fills the last byte
        counts[(int(packed[-1]) >> (width * position)) & (2**width - 1)] -= 1
    return counts


def nonzero_encoded(data: bytes, encoding: str, shape: tuple[int, ...]) -> np.ndarray:
    """Where an encoded layer's integers are not 0: bool of ``shape``. ValueError as in :func:`decode`."""
    weights = math.prod(shape)
    packed, width = _packed(data, encoding, weights)
    if width == 16:
        return decode(data, encoding, shape) != 0
    byte = np.arange(256)
    table = np.stack([(byte >> shift) & (2**width - 1) != WIDTHS[width] for shift in range(0, 8, width)], axis=1)
    return table[packed].reshape(-1)[:weights].reshape(shape)


def count(integers: np.ndarray, *, low: int | None = None, high: int | None = None) -> np.ndarray:
    """How often each integer from ``low`` to ``high`` occurs; unset, those are the least and the greatest one."""
    flat = integers.reshape(-1)
    low = int(flat.min(initial=0)) if low is None else low
    high = int(flat.max(initial=0)) if high is None else high
    counts = np.zeros(high - low + 1, dtype=np.int64)
    for start in range(0, flat.size, _BLOCK):
        counts += np.bincount(flat[start : start + _BLOCK].astype(np.int64) - low, minlength=len(counts))
    return counts


def entropy_bits(counts: np.ndarray) -> float:
    """Empirical entropy in bits per weight of integers that occur so often: what an ideal order-0 coder would need."""
    counts = counts[counts > 0]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0  # + 0.0 turns −0.0 into 0.0
