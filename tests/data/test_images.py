"""Every kind of pixel that an image file may hold comes out as the picture that a viewer shows."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from csqcli.data.images import UNDECODABLE, decode, why_undecodable
from csqcli.data.loaders import LoaderSettings, make_loader
from csqcli.data.specs import open_data
from csqcli.errors import UserError
from csqcli.models.networks import CIFAR_CONFIG

LARGE = {"input_size": (3, 72, 72), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "crop_pct": 0.9}
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # 0 to 255


def _read(path: Path, mode: str = "L") -> np.ndarray:
    return np.asarray(decode(path, mode))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_by_their_range(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / f"ramp.{suffix}")  # 65535 / 255 = 257
    assert (_read(tmp_path / f"ramp.{suffix}") == RAMP).all()
    assert (_read(tmp_path / f"ramp.{suffix}", "RGB") == RAMP[..., None]).all()
    near = np.array([[128, 129, 65534]], dtype=np.uint16)  # 128 / 257 -> 0, 129 / 257 -> 1, 254.996 -> 255
    Image.fromarray(near).save(tmp_path / f"near.{suffix}")
    assert _read(tmp_path / f"near.{suffix}").tolist() == [[0, 1, 255]]


def test_big_endian_tiff_is_read_as_it_was_meant(tmp_path: Path) -> None:
    values = RAMP.astype(np.uint16) * 257
    tags = [(256, 16), (257, 16), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 16), (279, 512)]
    directory = struct.pack(">H", len(tags)) + b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    header = struct.pack(">2sHI", b"MM", 42, 8 + 512)
    (tmp_path / "big.tif").write_bytes(header + values.astype(">u2").tobytes() + directory + bytes(4))
    assert (_read(tmp_path / "big.tif") == RAMP).all()


def test_float_pixels_run_from_0_to_1_and_others_are_refused(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.float32) / 255).save(tmp_path / "unit.tif")
    assert (_read(tmp_path / "unit.tif") == RAMP).all()
    for name, bad in (("wide", 255.0), ("negative", -0.5), ("nan", float("nan"))):
        pixels = RAMP.astype(np.float32) / 255
        pixels[3, 3] = bad
        Image.fromarray(pixels).save(tmp_path / f"{name}.tif")
        with pytest.raises(ValueError, match="floating-point pixels outside 0 to 1"):
            decode(tmp_path / f"{name}.tif", "L")


def test_32_bit_integers_are_refused_with_the_reason(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.int32) * 2**22).save(tmp_path / "int.tif")
    with pytest.raises(ValueError, match="32-bit integer pixels have no agreed white"):
        decode(tmp_path / "int.tif", "RGB")


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("form", ["RGBA", "LA", "P with bytes", "P with an index", "RGB with a colour"])
def test_transparency_is_left_out_and_the_colours_stay(tmp_path: Path, form: str, mode: str) -> None:
    grey = Image.fromarray(RAMP)
    alpha = Image.fromarray(RAMP.T.copy())
    path = tmp_path / "x.png"
    if form == "RGBA":
        Image.merge("RGBA", (grey, grey, grey, alpha)).save(path)
    elif form == "LA":
        Image.merge("LA", (grey, alpha)).save(path)
    elif form.startswith("P"):
        grey.convert("P").save(path, transparency=bytes(range(256)) if "bytes" in form else 7)
    else:
        grey.convert("RGB").save(path, transparency=(7, 7, 7))
    wanted = RAMP if mode == "L" else np.repeat(RAMP[..., None], 3, 2)
    assert (_read(path, mode) == wanted).all()


def test_cmyk_and_ycbcr_and_one_bit_become_the_colours_they_stand_for(tmp_path: Path) -> None:
    inks = np.zeros((8, 24, 4), np.uint8)
    inks[:, :8] = (0, 255, 255, 0)  # magenta and yellow: red
    inks[:, 8:16] = (0, 0, 0, 255)  # black
    Image.fromarray(inks, mode="CMYK").save(tmp_path / "inks.jpg", quality=100)
    Image.fromarray(inks, mode="CMYK").save(tmp_path / "inks.tif")
    for name in ("inks.jpg", "inks.tif"):
        found = _read(tmp_path / name, "RGB")[4, 4::8].astype(int)
        assert (abs(found - [[255, 0, 0], [0, 0, 0], [255, 255, 255]]) <= 3).all()
    Image.fromarray(RAMP > 99).save(tmp_path / "bits.png")
    assert (_read(tmp_path / "bits.png") == np.where(RAMP > 99, 255, 0)).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied_once(tmp_path: Path, suffix: str, orientation: int) -> None:
    # the numbers stand for where row 0 and column 0 of the file are in the scene (EXIF 2.3, table 6)
    upright = np.zeros((40, 24), np.uint8)
    upright[:20, :12], upright[:20, 12:], upright[20:, :12] = 255, 170, 85
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).convert("RGB").save(path, exif=exif, quality=100)
    found = _read(path).astype(int)
    assert found.shape == (40, 24)
    assert abs(found[10::20, 6::12] - upright[10::20, 6::12]).max() < 12


def test_a_picture_is_turned_upright_whatever_else_is_wrong_in_its_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a camera of no name", 6
    text, fraction = struct.pack(">HHI", 0x010F, 2, 20), struct.pack(">HHI", 0x010F, 5, 1)  # tag, type, count
    damaged = exif.tobytes().replace(text, fraction)
    assert damaged != exif.tobytes()
    Image.new("RGB", (24, 40)).save(tmp_path / "x.jpg", exif=damaged)
    with Image.open(tmp_path / "x.jpg") as image, pytest.raises(AttributeError):
        ImageOps.exif_transpose(image)  # Pillow's own way gives such a picture up
    assert _read(tmp_path / "x.jpg").shape == (24, 40)


def test_of_several_frames_the_first_is_read(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (10, 200)]
    for suffix in ("gif", "tif", "webp", "png"):
        frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
        assert abs(_read(tmp_path / f"x.{suffix}", "RGB").astype(int) - 10).max() < 4


def test_the_format_is_told_by_the_content_and_must_be_an_image(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.jpg")
    assert (_read(tmp_path / "x.jpg") == RAMP).all()
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n8 8 scale\n"
    (tmp_path / "eps.png").write_bytes(eps)
    with pytest.raises(UNDECODABLE) as caught:
        decode(tmp_path / "eps.png", "RGB")
    assert why_undecodable(caught.value) == "cannot be decoded (not an image by its content)"


def test_damaged_exif_does_not_matter(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "x.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert (_read(tmp_path / "x.png") == RAMP).all()


@pytest.mark.parametrize("config", [CIFAR_CONFIG, LARGE], ids=["in memory", "streamed"])
def test_why_an_image_cannot_be_decoded_reaches_the_user(image_folder: Path, config: dict, caplog) -> None:
    Image.fromarray(RAMP.astype(np.int32)).save(image_folder / "train" / "dark" / "int.tif")
    Image.fromarray(RAMP.astype(np.int32)).save(image_folder / "val" / "dark" / "int.tif")
    opened = open_data(str(image_folder))
    list(make_loader(opened.train, config, LoaderSettings(training=True, batch_size=13)).epoch(0))
    reason = "cannot be decoded (32-bit integer pixels have no agreed white; save it with 8 or 16 bits)"
    assert f"int.tif: {reason}, skipped" in caplog.text
    with pytest.raises(UserError) as caught:
        list(make_loader(opened.val, config, LoaderSettings(training=False, batch_size=4)).epoch(0))
    assert f"int.tif: {reason}; repair or remove this" in caught.value.line()


def test_sixteen_bit_photographs_are_not_pure_white_in_a_batch(image_folder: Path) -> None:
    for path in sorted((image_folder / "val").rglob("*.png")):
        grey = np.asarray(Image.open(path).convert("L"))
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    opened = open_data(str(image_folder))
    images, labels = next(make_loader(opened.val, LARGE, LoaderSettings(training=False, batch_size=9)).epoch(0))
    levels = (images.mean(dim=(1, 2, 3)) * 0.5 + 0.5) * 255
    assert (levels[labels == 0] - 190).abs().max() < 15  # bright
    assert (levels[labels == 1] - 60).abs().max() < 15  # dark


def test_grey_palette_and_cmyk_images_become_rgb(image_folder: Path) -> None:
    Image.new("L", (20, 20), 10).save(image_folder / "val" / "dark" / "grey.png")
    Image.new("CMYK", (20, 20)).save(image_folder / "val" / "dark" / "cmyk.jpg")
    Image.new("P", (20, 20)).save(image_folder / "val" / "dark" / "palette.png")
    opened = open_data(str(image_folder))
    loader = make_loader(opened.val, LARGE, LoaderSettings(training=False, batch_size=9))
    assert next(iter(loader.epoch(0)))[0].shape == (9, 3, 72, 72)
