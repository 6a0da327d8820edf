"""WebDataset shards on the disk: tar files in which an image and its label share a name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from csqcli.data.registry import data_source
from csqcli.data.sources.folder import has_archive_of_imagenet
from csqcli.errors import UserError
from csqcli.system.limits import MAX_CLASSES

if TYPE_CHECKING:
    from csqcli.data.archives import ArchiveReader
    from csqcli.data.splits import DataSet, Images

_SUFFIXES = (".tar",)
_NAMES = "classnames.txt"  # one class per line, where there is one
_MAX_LABEL = 32  # bytes of a .cls


def _recognises(root: Path) -> bool:
    from csqcli.data.shards import holds_shards

    archives = any(has_archive_of_imagenet(root, split) for split in ("train", "val"))
    return root.is_dir() and not archives and holds_shards(root, _SUFFIXES)


@data_source("wds:DIR", "WebDataset shards (.tar)", recognises=_recognises)
def webdataset(text: str, *, train: bool) -> DataSet:
    """Images beside ``.cls`` files of the same name, in shards whose names or folders say the split.

    The shards are indexed once and their images then read one by one, so order and resume are exact, as with folders.
    """
    from csqcli.data.shards import find_shards
    from csqcli.data.splits import NO_IMAGES, DataSet

    root = Path(text)
    found = find_shards(root, _SUFFIXES) if root.exists() else {}
    if not found:
        raise UserError("no .tar shards", where=text)
    where = root.parent if root.is_file() else root
    splits = {role: _images(files, where) for role, files in found.items() if role != "train" or train}
    classes = _classes(where, [int(images.labels.max()) + 1 for images in splits.values()])
    return DataSet(text, classes, splits.get("val", NO_IMAGES), splits.get("train"), splits.get("test"))


def _classes(root: Path, counts: list[int]) -> list[str]:
    names = root / _NAMES
    if names.is_file():
        return names.read_text(encoding="utf-8").splitlines()
    return [str(number) for number in range(max(counts, default=0))]


def _images(shards: list[Path], root: Path) -> Images:
    """The labelled images of shards, in the order of the shards and of their members' names."""
    import torch

    from csqcli.data.archives import ArchiveReader
    from csqcli.data.class_folders import SUFFIXES
    from csqcli.data.splits import Images

    reader = ArchiveReader(shards)
    labels, pictures = {}, []
    for name, member in reader.members.items():
        folder, _, file = name.rpartition("/")
        key, _, kind = file.partition(".")
        if kind == "cls":
            labels[f"{folder}/{key}"] = _label(reader, name, member.size)
        elif f".{kind.lower()}" in SUFFIXES:
            pictures.append((f"{folder}/{key}", name))
    lacking = [name for key, name in pictures if key not in labels]
    if lacking or not pictures:
        what = f"`{lacking[0]}` has no .cls beside it" if lacking else "no images"
        raise UserError(what, where=str(shards[0]), hint="expected KEY.jpg beside KEY.cls")
    numbers = torch.tensor([labels[key] for key, _ in pictures])
    return Images(numbers, paths=[name for _, name in pictures], root=os.path.join(root, ""), reader=reader)


def _label(reader: ArchiveReader, name: str, size: int) -> int:
    text = reader.read(name).strip() if size <= _MAX_LABEL else b""
    if not text.isdigit():
        raise UserError("is no class number", where=name, hint="a .cls file holds one whole number")
    number = int(text)
    if number >= MAX_CLASSES:
        raise UserError(f"is class {number:,} of at most {MAX_CLASSES:,}", where=name, hint="number classes from 0")
    return number
