"""A folder of images, one folder per class, in ``train/`` and ``val/``."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from csqcli.data.registry import data_source
from csqcli.errors import UserError

if TYPE_CHECKING:
    from csqcli.data.splits import DataSet, Images

log = logging.getLogger(__name__)

VALIDATION_NAMES = ("val", "valid", "validation", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_LITTER = {"thumbs.db", "desktop.ini"}  # of file managers; hidden files likewise are nobody's images


@dataclass
class _Split:
    """What the class folders of one split hold."""

    root: Path
    images: dict[str, list[str]] = field(default_factory=dict)  # class -> paths, sorted
    empty: list[str] = field(default_factory=list)  # class folders without an image
    others: list[Path] = field(default_factory=list)  # files that are no images by their names


@data_source("folder:DIR", "class folders in train/ and val/")
def folder(text: str, *, train: bool) -> DataSet:
    """The images below ``train/CLASS/`` and ``val/CLASS/`` (or valid/, validation/, test/), classes in sorted order.

    Hidden folders and folders without images are no classes. Files that are no images by their names are counted and named
    in one line of the log.
    """
    from csqcli.data.splits import DataSet

    root, where = Path(text), text
    if not root.is_dir():
        raise UserError("no such folder", where=where)
    val_root = next((root / name for name in VALIDATION_NAMES if (root / name).is_dir()), None)
    if val_root is None:
        raise UserError("no validation split", where=where, hint=f"expected one of {', '.join(VALIDATION_NAMES)}/")
    val = _listed(val_root)
    classes = list(val.images)
    if not train:
        _tell([val])
        return DataSet(where, classes, _images(val), None)
    if not (root / "train").is_dir():
        raise UserError("no training split", where=where, hint="expected train/")
    training = _listed(root / "train")
    _check_same_classes(training, val, where)
    if len(classes) == 1:
        hint = "a classifier needs two or more folders of images, one per class"
        raise UserError(f"one class only ({classes[0]})", where=str(training.root), hint=hint)
    _tell([training, val])
    return DataSet(where, classes, _images(val), _images(training))


def _listed(root: Path) -> _Split:
    """All images of a split. Raises UserError where there are no class folders or no images in them."""
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError("no class folders", where=str(root), hint="expected one folder of images per class")
    split = _Split(root)
    for name in names:
        paths = []
        for folder_, _, files in sorted(os.walk(root / name, followlinks=True)):
            if any(part.startswith(".") for part in Path(folder_).relative_to(root / name).parts):
                continue  # .ipynb_checkpoints holds second copies
            for file in sorted(files):
                if file.lower().endswith(SUFFIXES) and not file.startswith("._"):
                    paths.append(os.path.join(folder_, file))
                elif not file.startswith(".") and file.lower() not in _LITTER:
                    split.others.append(Path(folder_, file))
        if paths:
            split.images[name] = paths
        else:
            split.empty.append(name)
    if not split.images:
        raise UserError("no images", where=str(root), hint=f"looked for {', '.join(SUFFIXES)}{_others(split.others)}")
    return split


def _check_same_classes(training: _Split, val: _Split, where: str) -> None:
    """A class with images in one split only is an error, also where the other split has an empty folder for it."""
    for split, other, kind in ((training, val, "training"), (val, training, "validation")):
        lacking = [name for name in split.empty if name in other.images]
        if lacking:
            hint = f"add some to {split.root / lacking[0]}, or remove the class from {other.root}"
            raise UserError(f"class `{lacking[0]}` has no {kind} images", where=where, hint=hint)
    if training.images.keys() != val.images.keys():
        odd = sorted(training.images.keys() ^ val.images.keys())
        raise UserError(
            f"{training.root.name}/ has {len(training.images)} classes, {val.root.name}/ has {len(val.images)} "
            f"(first that differs: {odd[0]})",
            where=where,
        )


def _images(split: _Split) -> Images:
    import torch

    from csqcli.data.splits import Images

    labels = [label for label, paths in enumerate(split.images.values()) for _ in paths]
    return Images(torch.tensor(labels), paths=[path for paths in split.images.values() for path in paths])


def _tell(splits: list[_Split]) -> None:
    """Say once what was passed over."""
    empty = [str(split.root / name) for split in splits for name in split.empty]
    if empty:
        log.warning("%d folders hold no images and are no classes (first: %s)", len(empty), empty[0])
    others = [path for split in splits for path in split.others]
    if others:
        log.warning("%d files passed over%s", len(others), _others(others))


def _others(files: list[Path]) -> str:
    """``: 3 .heic, 1 .txt (first: …)`` for files that are no images by their names; empty where there are none."""
    if not files:
        return ""
    kinds = Counter(path.suffix.lower() or "without suffix" for path in files).most_common(4)
    return f": {', '.join(f'{count} {kind}' for kind, count in kinds)} (first: {files[0]})"
