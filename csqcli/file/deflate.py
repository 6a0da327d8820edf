"""Raw DEFLATE (RFC 1951) for payloads and manifests; inflating is bounded."""

from __future__ import annotations

import zlib


def deflate(data: bytes, *, strategy: int = zlib.Z_DEFAULT_STRATEGY, memory_level: int = 9) -> bytes:
    """Deflated at the highest level. ``strategy``: zlib's, e.g. ``Z_HUFFMAN_ONLY``; a block has 2^(6 + memory_level) symbols."""
    coder = zlib.compressobj(level=9, method=zlib.DEFLATED, wbits=-15, memLevel=memory_level, strategy=strategy)
    return coder.compress(data) + coder.flush()


def deflate_mixed(data: bytes) -> bytes:
    """As :func:`deflate`, for data whose statistics change on the way: the smallest of several block lengths and matchings."""
    options = ((strategy, level) for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED) for level in range(5, 10))
    return min((deflate(data, strategy=strategy, memory_level=level) for strategy, level in options), key=len)


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
