"""ImageNet as Kaggle ships it: training images in WordNet folders, validation images in one folder beside a CSV."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING

from csqcli.data.registry import data_source
from csqcli.errors import UserError

if TYPE_CHECKING:
    from csqcli.data.splits import DataSet

_SOLUTION = "LOC_val_solution.csv"
_IMAGES = Path("ILSVRC", "Data", "CLS-LOC")  # below the folder that the archive is unpacked in


def _solution(root: Path) -> Path | None:
    """The validation labels: in the folder itself, or above it where the folder of the images was given."""
    folders = (root, *root.absolute().parents[:3])
    return next((folder / _SOLUTION for folder in folders if (folder / _SOLUTION).is_file()), None)


def _images(root: Path) -> Path:
    return root / _IMAGES if (root / _IMAGES).is_dir() else root


def _recognises(root: Path) -> bool:
    val = _images(root) / "val"
    return val.is_dir() and _solution(root) is not None and not any(entry.is_dir() for entry in os.scandir(val))


@data_source("imagenet:DIR", "ImageNet as Kaggle ships it", recognises=_recognises)
def imagenet(text: str, *, train: bool) -> DataSet:
    """``ILSVRC/Data/CLS-LOC/train/n01440764/…`` and ``…/val/*.JPEG`` with the labels of ``LOC_val_solution.csv``."""
    import torch

    from csqcli.data.class_folders import data_set
    from csqcli.data.sources.folder import Disk
    from csqcli.data.splits import DataSet, Images

    root = _images(Path(text))
    solution = _solution(Path(text))
    if solution is None or not (root / "val").is_dir():
        hint = f"expected {_IMAGES}/val and {_SOLUTION}; class folders are given by their bare path"
        raise UserError("not ImageNet as Kaggle ships it", where=text, hint=hint)
    try:
        with open(solution, encoding="utf-8", newline="") as file:
            rows = [(row["ImageId"], row["PredictionString"].split()[0]) for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, AttributeError, IndexError, TypeError) as error:
        raise UserError(f"not Kaggle's labels ({error!r})", where=str(solution)) from None
    if train:
        training = data_set(Disk(str(root / "train")), text, train=True)
        classes = training.classes
    else:
        training, classes = None, sorted({label for _, label in rows})
    numbers = {label: number for number, label in enumerate(classes)}
    odd = next((label for _, label in rows if label not in numbers), None)
    if odd is not None:
        raise UserError(f"class `{odd}` has no training images", where=text)
    here = os.path.join(root, "val", "")
    names = [f"{here}{image}.JPEG" for image, _ in rows]
    lacking = [name for name in names if not os.path.isfile(name)]
    if lacking or not names:
        first = f" (first: {lacking[0]})" if lacking else ""
        raise UserError(f"{len(lacking) or 'all'} of the images in {_SOLUTION} are not there{first}", where=text)
    labels = torch.tensor([numbers[label] for _, label in rows])
    val = Images(labels, paths=names, root=os.path.join(root, ""))
    return DataSet(text, classes, val, training.train if training is not None else None)
