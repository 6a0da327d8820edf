"""Image files → 8-bit grey or RGB pictures.

What is done with what a file may hold:

- 16-bit grey (PNG, TIFF, PGM) is scaled by its range, 65535 → 255, and rounded; 16-bit colour keeps its high bytes.
- Floating-point pixels are read from 0 to 1; others, and 32-bit integers, have no agreed white and are refused.
- Transparency is left out, as timm and torchvision do: the colours below it are what the network sees.
- CMYK, YCbCr, Lab, palettes and bi-level pictures are converted as Pillow does, without colour profiles.
- The EXIF orientation is applied: a photograph is seen as viewers show it.
- Of a file with several frames or pages, the first is read.

The format is told by the content, never by the name, and is one of :data:`FORMATS`: a PNG called ``.jpg`` is read, an
EPS called ``.png`` is not.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = (
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    "JPEG",
    "JPEG2000",
    "MPO",
    "PNG",
    "PPM",
    "TIFF",
    "WEBP",
)  # nothing that interprets
_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {  # EXIF orientation -> what makes the picture upright; ImageOps.exif_transpose writes the other tags anew, and fails there
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_VIA = {"RGBa": "RGBA", "La": "LA", "PA": "RGBA"}  # modes that Pillow converts in two steps only


class UnsupportedPixels(ValueError):
    """The file is whole, but what its numbers mean is not known."""


UNDECODABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what decoding raises for a bad file


def decode(file: str | Path | BinaryIO, mode: str) -> Image.Image:
    """The picture of a file, or of its bytes, in mode ``"L"`` or ``"RGB"``, upright.

    Raises one of :data:`UNDECODABLE` for files that cannot be decoded; :class:`UnsupportedPixels` says why.
    """
    with Image.open(file, formats=_available_formats()) as image:
        image.load()
        picture = _eight_bits(image, mode)
        turn = _TURNS.get(_orientation(image))
    return picture if turn is None else picture.transpose(turn)


def image_of_array(pixels: np.ndarray, mode: str) -> Image.Image:
    """The picture of a uint8 array [height, width, channels], one or three channels, in mode ``"L"`` or ``"RGB"``."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert(mode)


def why_undecodable(error: BaseException) -> str:
    """``cannot be decoded``, with the reason where there is one to tell."""
    if isinstance(error, UnsupportedPixels):
        return f"cannot be decoded ({error})"
    if isinstance(error, UnidentifiedImageError):
        return "cannot be decoded (not an image by its content)"
    return "cannot be decoded"


@functools.cache
def _available_formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I") and (image.mode != "I" or image.format in ("PNG", "PPM")):
        # older Pillows open 16-bit PNG as 32-bit integers, and all of them 16-bit PGM
        values = np.asarray(image).astype(np.uint32)
        return _grey((values * 255 + 32767) // 65535, mode)
    if image.mode == "I":
        raise UnsupportedPixels("32-bit integer pixels have no agreed white; save it with 8 or 16 bits")
    if image.mode == "F":
        floats = np.asarray(image)
        if not bool(((floats >= 0) & (floats <= 1)).all()):
            raise UnsupportedPixels("floating-point pixels outside 0 to 1; save it with 8 or 16 bits")
        return _grey((floats.astype(np.float64) * 255).round(), mode)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode in _VIA:
        image = image.convert(_VIA[image.mode])
    return image.convert(mode)


def _grey(values: np.ndarray, mode: str) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert(mode)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises nearly anything, and the picture is good without it
        return 1
