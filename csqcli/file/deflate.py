"""Raw DEFLATE (RFC 1951) for payloads and manifests; inflating is bounded."""

from __future__ import annotations

import zlib


def deflate(data: bytes, *, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    """Deflated at the highest level. ``strategy``: zlib's, e.g. ``Z_HUFFMAN_ONLY``."""
    coder = zlib.compressobj(level=9, method=zlib.DEFLATED, wbits=-15, memLevel=9, strategy=strategy)
    return coder.compress(data) + coder.flush()


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
