"""A folder of images, one folder per class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from csqcli.data.registry import data_source
from csqcli.errors import UserError

if TYPE_CHECKING:
    from csqcli.data.splits import DataSet


@data_source("folder:DIR", "class folders in train/ and val/, by any usual name, or in DIR itself")
def folder(text: str, *, train: bool) -> DataSet:
    """The images below ``train/CLASS/`` and ``val/CLASS/``; see `csqcli.data.class_folders`."""
    from csqcli.data.class_folders import data_set

    if not Path(text).is_dir():
        raise UserError("no such folder", where=text)
    for split in ("train", "val") if train else ("val",):
        if has_archive_of_imagenet(Path(text), split) and not Path(text, split).is_dir():
            call = f"from torchvision.datasets import ImageNet; ImageNet({text!r}, {split!r})"
            what = f"holds ImageNet's archives, and {split} is not unpacked yet"
            raise UserError(what, where=text, hint=f'torchvision does it: python -c "{call}"')
    return data_set(Disk(text), text, train=train)


def has_archive_of_imagenet(root: Path, split: str) -> bool:
    """Whether a split lies there as ImageNet's site gives it, and torchvision takes it."""
    return (root / f"ILSVRC2012_img_{split}.tar").is_file()


class Disk:
    """A folder of the file system, links followed."""

    reader = None

    def __init__(self, folder: str) -> None:
        self.root = os.path.join(folder, "")

    def folders(self, path: str) -> list[str]:
        return sorted(entry.name for entry in os.scandir(self.root + path) if entry.is_dir())

    def files(self, path: str) -> Iterator[str]:
        for folder, _, files in sorted(os.walk(self.root + path, followlinks=True)):
            below = folder[len(self.root) :].replace(os.sep, "/")
            yield from (f"{below}/{file}" for file in sorted(files))
