"""A CSV that names images and their classes, or one for each split."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from csqcli.data.registry import data_source
from csqcli.errors import UserError

if TYPE_CHECKING:
    from csqcli.data.splits import DataSet

_PATH = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img")
_LABEL = ("label", "class", "target", "category", "class_name")
_SPLIT = ("split", "set", "fold", "subset")


def _recognises(path: Path) -> bool:
    if not path.is_dir():
        return path.is_file() and path.suffix.lower() == ".csv"
    if not any(path.glob("*.csv")):
        return False
    from csqcli.data.class_folders import role_of

    folders = [entry.name for entry in path.iterdir() if entry.is_dir()]
    return {"train", "val"} <= set(_by_role(path)) and not any(map(role_of, folders))


def _by_role(folder: Path) -> dict[str, Path]:
    """The CSVs in a folder that are called like a split: ``train.csv``, ``valid.csv``. UserError where two are called alike."""
    from csqcli.data.class_folders import role_of

    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.csv")):
        role = role_of(file.stem)
        if role is None:
            continue
        if role in found:
            raise UserError(
                f"both are called like the {role} split", where=f"{found[role]} and {file}", hint="rename one"
            )
        found[role] = file
    return found


@data_source(
    "csv:FILE", "lines of path,label and perhaps split; or a folder of train.csv and val.csv", recognises=_recognises
)
def table(text: str, *, train: bool) -> DataSet:
    """The images that a CSV names, relative to its folder. Without a column ``split`` all are training images, or those of the
    split that the file is called after where a folder holds one for each."""
    import torch

    from csqcli.data.class_folders import role_of
    from csqcli.data.splits import NO_IMAGES, DataSet, Images

    files = _by_role(Path(text)) if Path(text).is_dir() else {"train": Path(text)}
    if not files or not all(file.is_file() for file in files.values()):
        raise UserError(
            "no such file", where=text, hint="give a CSV of path,label, or a folder of train.csv and val.csv"
        )
    root = os.path.join(text if Path(text).is_dir() else os.path.dirname(text), "")
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "val": [], "test": []}
    missing: list[tuple[int, str]] = []
    for of_file, file in files.items():
        for line, path, label, split in _rows(str(file)):
            role = role_of(split) if split is not None else of_file
            if role is None:
                raise UserError(f"line {line}: `{split}` is no split", where=str(file), hint="write train, val or test")
            where = path if os.path.isabs(path) else root + path
            rows[role].append((where, label))
            if not os.path.isfile(where):
                missing.append((line, where))
    if missing:
        line, first = missing[0]
        hint = f"call the columns {_PATH[0]} and {_LABEL[0]} if line 1 is a heading" if line == 1 else ""
        raise UserError(f"{len(missing)} of its images are not there (first: {first})", where=text, hint=hint)
    classes = _classes(
        {label for name in ("train", "val") for _, label in rows[name]} or {label for _, label in rows["test"]}
    )
    lacking = {label for _, label in rows["val"]} - {label for _, label in rows["train"]}
    if train and rows["train"] and lacking:
        raise UserError(f"class `{min(lacking)}` has no training images", where=text)

    def images(name: str) -> Images | None:
        numbers = {label: number for number, label in enumerate(classes)}
        if not rows[name] or any(label not in numbers for _, label in rows[name]):
            return None
        return Images(
            torch.tensor([numbers[label] for _, label in rows[name]]), paths=[path for path, _ in rows[name]], root=root
        )

    return DataSet(text, classes, images("val") or NO_IMAGES, images("train") if train else None, images("test"))


def _rows(text: str) -> Iterator[tuple[int, str, str, str | None]]:
    """Line number, path, label and split; the columns are told by a heading, or are the first two."""
    try:
        with open(text, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            first = next(reader, [])
            heading = [cell.strip().lower() for cell in first]
            columns = [
                next((heading.index(name) for name in names if name in heading), None)
                for names in (_PATH, _LABEL, _SPLIT)
            ]
            path, label, split = columns
            if (path is None) != (label is None):
                what, names = ("path", _PATH) if path is None else ("label", _LABEL)
                raise UserError(
                    f"no column for the {what} among {', '.join(heading)}",
                    where=text,
                    hint=f"call it one of {', '.join(names)}",
                )
            if path is None or label is None:
                path, label, split = 0, 1, None
                file.seek(0)
                reader = csv.reader(file)
            for row in reader:
                if not row:
                    continue
                if len(row) <= max(path, label, split or 0) or not row[path].strip():
                    raise UserError(
                        f"line {reader.line_num}: {len(row)} fields", where=text, hint="path,label is expected"
                    )
                if not row[label].strip():
                    raise UserError(
                        f"line {reader.line_num}: no label", where=text, hint="name the class of every image"
                    )
                yield (
                    reader.line_num,
                    row[path].strip(),
                    row[label].strip(),
                    row[split].strip() if split is not None else None,
                )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot be read as CSV ({error})", where=text) from None


def _classes(labels: set[str]) -> list[str]:
    """Labels in order: by number where all are whole numbers, else by name."""
    numbers = all(label.isdecimal() for label in labels)
    return sorted(labels, key=lambda label: (int(label) if numbers else 0, label))  # "1" and "01" are two classes
