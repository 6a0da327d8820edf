"""Zip and tar files of class folders: read where they lie, member by member, and never trusted."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from csqcli.data.archives import ArchiveReader
from csqcli.data.loaders import LoaderSettings, make_loader
from csqcli.data.specs import open_data
from csqcli.errors import UserError

LARGE = {"input_size": (3, 72, 72), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "crop_pct": 0.9}


def packed(folder: Path, kind: str) -> Path:
    return Path(shutil.make_archive(str(folder), kind, folder.parent, folder.name))  # one folder around everything


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_archive_gives_the_pixels_of_its_folder(image_folder: Path, kind: str, workers: int) -> None:
    def batches(source: Path) -> list[torch.Tensor]:
        settings = LoaderSettings(training=True, batch_size=4, augment="imagenet", workers=workers)
        loader = make_loader(open_data(str(source)).train, LARGE, settings)
        found = [images for epoch in (0, 1) for images, _ in loader.epoch(epoch)]
        loader.close()
        return found

    archive = packed(image_folder, kind)
    for ours, theirs in zip(batches(archive), batches(image_folder), strict=True):
        assert torch.equal(ours, theirs)
    assert open_data(str(archive)).classes == ["bright", "dark"]
    assert open_data(f"archive:{archive}", train=False).train is None


def test_an_archive_has_the_order_and_listing_of_its_folder(image_folder: Path) -> None:
    for name in ("more/deep", "more-", "more"):
        (image_folder / "train" / "dark" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(image_folder / "val" / "dark" / "0.png", image_folder / "train" / "dark" / name / "z.png")
    folder, archive = open_data(str(image_folder)).train, open_data(str(packed(image_folder, "zip"))).train
    below = [path.removeprefix(f"{image_folder}/") for path in folder.paths]
    assert [path.partition(".zip/images/")[2] for path in archive.paths] == below


@pytest.mark.parametrize("name", ["../train/dark/x.png", "/etc/x.png", "train\\dark\\x.png", "train/da\x07rk/x.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_member_s_name_never_leads_elsewhere(tmp_path: Path, name: str, kind: str) -> None:
    archive = tmp_path / f"photographs.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(name, b"x")
    else:
        with tarfile.open(archive, "w") as file:
            entry = tarfile.TarInfo(name)
            entry.size = 1
            file.addfile(entry, io.BytesIO(b"x"))
    with pytest.raises(UserError, match="is no path below a folder; make the archive anew"):
        open_data(str(archive))


def test_links_and_devices_in_a_tar_are_no_images(image_folder: Path) -> None:
    os.symlink("/etc/passwd", image_folder / "train" / "dark" / "link.png")
    os.mkfifo(image_folder / "train" / "dark" / "pipe.png")
    assert len(open_data(str(packed(image_folder, "tar"))).train) == 12


@pytest.mark.parametrize(("kind", "how"), [("gztar", "gzip"), ("bztar", "bzip2"), ("xztar", "xz")])
def test_a_tar_packed_as_a_whole_says_what_can_be_read_instead(image_folder: Path, kind: str, how: str) -> None:
    with pytest.raises(UserError, match=f"is packed by {how} as a whole; unpack it, or pack it as .zip or plain .tar"):
        open_data(str(packed(image_folder, kind)))


def test_a_bomb_a_lie_and_a_cut_member_are_refused_without_being_unpacked(image_folder: Path) -> None:
    archive = image_folder.parent / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("train/a/bomb.png", bytes(2**20))
        file.writestr("train/b/fine.png", b"fine")
    reader = ArchiveReader([archive])
    assert reader.read(f"{archive}/train/b/fine.png") == b"fine"
    bomb = f"{archive}/train/a/bomb.png"
    for lie in ({"size": 10}, {"size": 2**40}, {"crc": 1}, {"offset": 3}, {"stored": 5}):
        reader.members[bomb] = ArchiveReader([archive]).members[bomb]._replace(**lie)
        with pytest.raises(OSError, match=r"other bytes|no image|no member|invalid"):
            reader.read(bomb)


@pytest.mark.parametrize("name", ["noise.zip", "noise.tar"])
def test_what_is_no_archive_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bytes(range(256)) * 8)
    with pytest.raises(UserError, match=f"{name}: cannot be read as a zip or tar"):
        open_data(str(tmp_path / name))


def test_encrypted_members_and_names_that_occur_twice_are_refused(tmp_path: Path) -> None:
    twice = tmp_path / "twice.tar"
    with tarfile.open(twice, "w") as file:
        for _ in range(2):
            file.addfile(tarfile.TarInfo("train/a/0.png"))
    with pytest.raises(UserError, match=r"holds `train/a/0.png` twice"):
        open_data(str(twice))
    locked = tmp_path / "locked.zip"
    with zipfile.ZipFile(locked, "w") as file:
        file.writestr("train/a/0.png", b"x")
    content = bytearray(locked.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag "encrypted" of the central directory
    locked.write_bytes(content)
    with pytest.raises(UserError, match=r"`train/a/0.png` is encrypted"):
        open_data(str(locked))


def test_a_damaged_image_in_an_archive_is_named_by_its_member(image_folder: Path) -> None:
    (image_folder / "val" / "dark" / "0.png").write_bytes(b"no image")
    archive = packed(image_folder, "zip")
    with pytest.raises(UserError, match=r"images.zip/images/val/dark/0.png: cannot be decoded"):
        list(make_loader(open_data(str(archive)).val, LARGE, LoaderSettings(training=False, batch_size=4)).epoch(0))


def webdataset(folder: Path, *, labels: bool = True, dark: bytes = b"1") -> Path:
    """The fixture's images as shards of four: train-0000.tar …, val-0000.tar …, an image beside its .cls."""
    out = folder.parent / "shards"
    out.mkdir()
    for split in ("train", "val"):
        images = sorted((folder / split).rglob("*.png"))
        for number in range(0, len(images), 4):
            with tarfile.open(out / f"{split}-{number // 4:04}.tar", "w") as shard:
                for path in images[number : number + 4]:
                    key = f"{path.parent.name}{path.stem}"
                    shard.add(path, f"{key}.png")
                    text = dark if path.parent.name == "dark" else b"0"
                    entry = tarfile.TarInfo(f"{key}.cls")
                    entry.size = len(text)
                    if labels:
                        shard.addfile(entry, io.BytesIO(text))
    return out


def test_webdataset_shards_are_read_in_any_order(image_folder: Path) -> None:
    shards = webdataset(image_folder)
    for source in (str(shards), f"wds:{shards}"):
        opened = open_data(source)
        assert (len(opened.train), len(opened.val), opened.classes) == (12, 6, ["0", "1"])
    folder = open_data(str(image_folder))
    assert opened.train.labels.tolist() == folder.train.labels.tolist()
    for index in (11, 0, 5):
        assert opened.train.pil(index, 3).tobytes() == folder.train.pil(index, 3).tobytes()
    (shards / "classnames.txt").write_text("bright\ndark\n")
    assert open_data(str(shards)).classes == ["bright", "dark"]


def test_a_shard_alone_and_one_without_labels_say_what_is_wanted(image_folder: Path) -> None:
    shards = webdataset(image_folder)
    with pytest.raises(UserError, match=r"holds no class folders but .cls files; for a WebDataset write wds:"):
        open_data(str(shards / "val-0000.tar"))
    assert len(open_data(f"wds:{shards / 'val-0000.tar'}", train=False).val) == 4
    shutil.rmtree(shards)
    with pytest.raises(UserError, match=r"bright0.png` has no .cls beside it"):
        open_data(str(webdataset(image_folder, labels=False)))


@pytest.mark.parametrize("label", [b"200000000", b"99999999999999999999"])
def test_a_class_number_that_no_classifier_has_is_refused(image_folder: Path, label: bytes) -> None:
    """It would ask for a list of so many names."""
    with pytest.raises(UserError, match=r"darkd?.*\.cls: is class [\d,]+ of at most 1,000,000"):
        open_data(str(webdataset(image_folder, dark=label)))
