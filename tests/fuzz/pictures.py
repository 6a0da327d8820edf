"""Image files: every format that csq reads and some that it must not, damaged and mistaken for each other."""

from __future__ import annotations

import io
import random
import struct

import numpy as np
from PIL import Image

from tests.fuzz.values import mutate_bytes

_MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB", "YCbCr"],
    "JPEG": ["L", "RGB", "CMYK"],
    "GIF": ["L", "P"],
    "BMP": ["1", "L", "P", "RGB"],
    "PPM": ["1", "L", "RGB", "I;16"],
    "WEBP": ["RGB", "RGBA"],
    "EPS": ["L", "RGB"],
    "PDF": ["RGB"],
    "TGA": ["RGB"],
    "ICO": ["RGB"],
}


def picture(rng: random.Random) -> tuple[str, bytes]:
    """A format's name and an image in it, damaged two times out of three."""
    kind = rng.choice(list(_MODES))
    mode = rng.choice(_MODES[kind])
    pixels = np.frombuffer(rng.randbytes(16 * 16 * 3), np.uint8).reshape(16, 16, 3)
    image = Image.fromarray(pixels)
    if mode in ("I", "F", "I;16"):
        image = image.convert("I" if mode == "I;16" else mode)
        image = image.convert("I;16") if mode == "I;16" else image
    else:
        image = image.convert("RGBA").convert(mode) if mode in ("LA", "RGBA") else image.convert(mode)
    out = io.BytesIO()
    more = {"exif": _orientation(rng)} if kind in ("JPEG", "PNG", "WEBP", "TIFF") and rng.random() < 0.4 else {}
    image.save(out, kind, **more)
    data = out.getvalue()
    change = rng.randrange(3)
    if change == 0:
        return kind, data
    if change == 1:
        return kind, mutate_bytes(data, rng)
    return kind, _sized(data, kind, rng)


def _orientation(rng: random.Random) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535])
    return exif


def _sized(data: bytes, kind: str, rng: random.Random) -> bytes:
    """The same pixels under a header that says there are many more."""
    side = rng.choice([0, 1, 30_000, 2**16 - 1, 2**31 - 1])
    if kind == "PNG":
        return data[:16] + struct.pack(">II", side, rng.choice([1, side])) + data[24:]
    if kind == "GIF":
        return data[:6] + struct.pack("<HH", side % 2**16, side % 2**16) + data[10:]
    if kind == "BMP":
        return data[:18] + struct.pack("<ii", side, side) + data[26:]
    if kind == "PPM":
        return data.replace(b"16 16", f"{side} {side}".encode(), 1)
    return data[: len(data) // 2] + data[: len(data) // 2]
