"""Integers to bytes and back: byte-aligned codes, Huffman-coded where that is smaller.

A layer's integers become one code each, offset to be non-negative: four 2-bit codes per byte when |Q| ≤ 1, two nibbles
when |Q| ≤ 7, a byte when |Q| ≤ 127, two bytes (low, then high plane) beyond. Because codes never straddle bytes, a
byte-wise Huffman coder (DEFLATE restricted to Huffman codes, from the standard library) reaches within about a percent
of the integers' entropy; packing densely first would hide the statistics from it.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

WIDTHS = {2: 1, 4: 7, 8: 127, 16: 32767}  # code width in bits -> largest |Q| that it holds


def code_width(largest: int) -> int:
    """The narrowest code width in bits for |Q| ≤ ``largest``."""
    for width, top in WIDTHS.items():
        if largest <= top:
            return width
    raise ValueError(f"|Q| = {largest} needs more than 16 bits")


_ENCODED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # integers -> (their version, what encode returned)


def encode(integers: Tensor) -> tuple[Tensor, str]:
    """Bytes (uint8, 1-D) and the encoding's name (``"codes4"`` or ``"codes4+huffman"``) for one layer's integers.

    Wider codes than necessary are tried too: their Huffman tables are smaller, which counts in small layers. So are
    runs: a Huffman code spends at least one bit on each byte, even where nearly all weights are zero. The last result for
    a tensor is kept while the tensor lives: a run describes, tries and writes the same integers.
    """
    version, done = _ENCODED.get(integers, (None, None))
    if done is None or version != integers._version:
        done = _encode(integers)
        _ENCODED[integers] = integers._version, done
    return done


def _encode(integers: Tensor) -> tuple[Tensor, str]:
    values = integers.flatten().cpu().numpy().astype(np.int32)
    narrowest = code_width(int(np.abs(values).max(initial=0)))
    options: dict[str, bytes] = {}
    for width in (width for width in WIDTHS if width == narrowest or narrowest < width < 16):
        raw = _codes(values, width)
        squeezed = [_deflate(raw, strategy) for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)]
        options |= {f"codes{width}": raw, f"codes{width}+huffman": min(squeezed, key=len)}
    encoding = min(options, key=lambda name: len(options[name]))
    return torch.frombuffer(bytearray(options[encoding]), dtype=torch.uint8), encoding


def _deflate(data: bytes, strategy: int) -> bytes:
    coder = zlib.compressobj(level=9, method=zlib.DEFLATED, wbits=-15, memLevel=9, strategy=strategy)
    return coder.compress(data) + coder.flush()


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


def decode(data: Tensor, encoding: str, shape: tuple[int, ...]) -> Tensor:
    """Inverse of :func:`encode`: int8 (int16 for 16-bit codes) of ``shape``.

    Raises ValueError when the bytes do not hold exactly the integers that the shape implies; a Huffman-coded payload
    is never inflated beyond that size.
    """
    codes_name, _, huffman = encoding.partition("+")
    width = int(codes_name.removeprefix("codes")) if codes_name.removeprefix("codes").isdecimal() else 0
    if not codes_name.startswith("codes") or width not in WIDTHS or huffman not in ("", "huffman"):
        raise ValueError(f"unknown encoding `{encoding}`")
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"codes of type {data.dtype} and shape {list(data.shape)}")
    weights = math.prod(shape)
    expected = packed_bytes(weights, width)
    raw = data.cpu().numpy().tobytes()
    if huffman:
        raw = inflate(raw, expected)
    if len(raw) != expected:
        raise ValueError(f"{len(raw)} bytes of codes, {expected} expected for shape {list(shape)}")
    packed = np.frombuffer(raw, dtype=np.uint8)
    if width == 16:
        codes = packed[:weights].astype(np.int32) | (packed[weights:].astype(np.int32) << 8)
    else:
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        codes = ((packed[:, None] >> shifts) & (2**width - 1)).reshape(-1)[:weights].astype(np.int32)
    values = (codes - WIDTHS[width]).astype(np.int16 if width == 16 else np.int8)
    return torch.from_numpy(values).view(shape)


def inflate(data: bytes, expected: int, *, exact: bool = True) -> bytes:
    """Raw DEFLATE undone, never beyond ``expected`` bytes.

    Raises ValueError for a stream that is longer, damaged or (``exact``) shorter.
    """
    decoder = zlib.decompressobj(wbits=-15)
    try:
        raw = decoder.decompress(data, expected + 1)
    except zlib.error as error:
        raise ValueError(f"damaged deflated payload ({error})") from None
    if len(raw) > expected or not decoder.eof or decoder.unused_data or (exact and len(raw) != expected):
        raise ValueError("deflated payload does not end where the shape says")
    return raw


def entropy_bits(integers: Tensor) -> float:
    """Empirical entropy of the integers in bits per weight: what an ideal order-0 coder would need."""
    _, counts = torch.unique(integers, return_counts=True)
    share = counts.double() / counts.sum()
    return float(-(share * share.log2()).sum()) + 0.0  # + 0.0 turns −0.0 into 0.0
