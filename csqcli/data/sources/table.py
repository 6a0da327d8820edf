"""A CSV that names images and their classes, or one for each split."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from csqcli.data.registry import data_source
from csqcli.errors import UserError

if TYPE_CHECKING:
    from csqcli.data.splits import DataSet

_PATH = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img")
_LABEL = ("label", "class", "target", "category", "class_name")
_SPLIT = ("split", "set", "fold", "subset")
_SUFFIXES = (".csv", ".tsv")
_SEPARATORS = (",", "\t", ";")  # between columns, in the order in which a line without known names is tried
_BETWEEN_LABELS = ("|", ";", ",")  # of several labels in one field
_MARKS = {"0", "1", "0.0", "1.0", "true", "false"}  # what columns of one class each hold
_LOOKED_AT = 20  # lines, to tell such columns


def _recognises(path: Path) -> bool:
    if not path.is_dir():
        return path.is_file() and path.suffix.lower() in _SUFFIXES
    tables = _tables(path)
    if not tables:
        return False
    from csqcli.data.class_folders import role_of

    folders = [entry.name for entry in path.iterdir() if entry.is_dir()]
    return {"train", "val"} <= {role_of(file.stem) for file in tables} and not any(map(role_of, folders))


def _tables(folder: Path) -> list[Path]:
    """The tables of a folder, those of its most usual suffix alone."""
    return next((found for suffix in _SUFFIXES if (found := sorted(folder.glob(f"*{suffix}")))), [])


def _by_role(folder: Path) -> dict[str, Path]:
    """The CSVs in a folder that are called like a split: ``train.csv``, ``valid.csv``. UserError where two are called alike."""
    from csqcli.data.class_folders import role_of

    found: dict[str, Path] = {}
    for file in _tables(folder):
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
    "csv:FILE",
    "lines of path,label and perhaps split, FILE#PATH,LABEL where columns are called otherwise; or a folder of train.csv and val.csv",
    recognises=_recognises,
)
def table(text: str, *, train: bool) -> DataSet:
    """The images that a CSV names, relative to its folder. Without a column ``split`` all are training images, or those of the
    split that the file is called after where a folder holds one for each."""
    import torch

    from csqcli.data.class_folders import role_of
    from csqcli.data.splits import NO_IMAGES, DataSet, Images

    name, columns = _named_columns(text)
    files = _by_role(Path(name)) if Path(name).is_dir() else {"train": Path(name)}
    if not files or not all(file.is_file() for file in files.values()):
        raise UserError(
            "no such file", where=name, hint="give a CSV of path,label, or a folder of train.csv and val.csv"
        )
    root = os.path.join(name if Path(name).is_dir() else os.path.dirname(name), "")
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "val": [], "test": []}
    missing: list[tuple[int, str]] = []
    for of_file, file in files.items():
        for line, path, label, split in _rows(str(file), root, columns):
            role = role_of(split) if split is not None else of_file
            if role is None:
                raise UserError(f"line {line}: `{split}` is no split", where=str(file), hint="write train, val or test")
            where = path if os.path.isabs(path) else root + path
            rows[role].append((where, label))
            if not os.path.isfile(where):
                missing.append((line, where))
    if missing:
        line, first = missing[0]
        hint = ""
        if line == 1:
            hint = f"if line 1 is a heading, call the columns {_PATH[0]} and {_LABEL[0]}, or write csv:{name}#PATH,LABEL with its names"
        raise UserError(f"{len(missing)} of its images are not there (first: {first})", where=name, hint=hint)
    classes = _classes(
        {label for role in ("train", "val") for _, label in rows[role]} or {label for _, label in rows["test"]}
    )
    if not columns:  # who names them knows what is in them
        _check_one_label_each(classes, where=name)
    lacking = {label for _, label in rows["val"]} - {label for _, label in rows["train"]}
    if train and rows["train"] and lacking:
        raise UserError(f"class `{min(lacking)}` has no training images", where=name)

    def images(role: str) -> Images | None:
        numbers = {label: number for number, label in enumerate(classes)}
        if not rows[role] or any(label not in numbers for _, label in rows[role]):
            return None
        return Images(
            torch.tensor([numbers[label] for _, label in rows[role]]), paths=[path for path, _ in rows[role]], root=root
        )

    return DataSet(text, classes, images("val") or NO_IMAGES, images("train") if train else None, images("test"))


def _named_columns(text: str) -> tuple[str, list[str]]:
    """``FILE#PATH,LABEL`` or ``FILE#PATH,LABEL,SPLIT``: the file, and the columns' names; none where the text has none."""
    name, sign, columns = text.rpartition("#")
    if not sign or os.path.exists(text):
        return text, []
    names = [column.strip().lower() for column in columns.split(",")]
    if len(names) not in (2, 3) or not all(names):
        raise UserError(f"`{columns}` does not name the columns", where=name, hint=f"write {name}#PATH,LABEL")
    return name, names


@dataclass(frozen=True)
class _Columns:
    """Where in a line the fields are. ``split`` is None where no column says it."""

    path: int
    label: int
    split: int | None
    separator: str
    has_heading: bool


def _rows(text: str, root: str, names: Sequence[str]) -> Iterator[tuple[int, str, str, str | None]]:
    """Line number, path, label and split; the columns are told by ``names``, by a heading, or are the first two."""
    try:
        with open(text, encoding="utf-8-sig", newline="") as file:
            head = "".join(itertools.islice(file, _LOOKED_AT))
            columns = _columns(head, text, root, names)
            path, label, split = columns.path, columns.label, columns.split
            file.seek(0)
            reader = csv.reader(file, delimiter=columns.separator)
            if columns.has_heading:
                next(reader, None)
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


def _columns(head: str, text: str, root: str, names: Sequence[str]) -> _Columns:
    """The columns by the first lines of a file. UserError where they cannot be told, or would be taken for what they are not."""
    from csqcli.data.class_folders import role_of

    separator = _separator(head, names)
    # blank cells count: a heading may end with a separator
    lines = list(csv.reader(io.StringIO(head, newline=""), delimiter=separator))
    first = [cell.strip() for cell in lines[0]] if lines else []
    heading = [cell.lower() for cell in first]
    if names:
        unknown = [name for name in names if name not in heading]
        if unknown:
            raise UserError(f"no column `{unknown[0]}` among {', '.join(first)}", where=text)
        path, label, *split = (heading.index(name) for name in names)
        return _Columns(path, label, split[0] if split else _place(_SPLIT, heading), separator, True)
    found_path, found_label, found_split = (_place(known, heading) for known in (_PATH, _LABEL, _SPLIT))
    if found_path is not None and found_label is not None:
        return _Columns(found_path, found_label, found_split, separator, True)
    is_heading = found_split is not None and not any(os.path.isfile(os.path.join(root, cell)) for cell in first)
    if found_path is not None or found_label is not None or is_heading:
        marks = [] if found_label is not None else _marked(lines, apart_from=(found_path, found_split))
        if marks:
            what = f"{', '.join(first[place] for place in marks[:3])}{', …' if marks[3:] else ''}: one column per class, as it looks"
            hint = f"csq takes one label per image: write the name of its class into one column, `{_LABEL[0]}`"
            raise UserError(what, where=text, hint=hint)
        what, known = ("path", _PATH) if found_path is None else ("label", _LABEL)
        hint = f"call it one of {', '.join(known)}, or write csv:{text}#PATH,LABEL with the names that they have"
        raise UserError(f"no column for the {what} among {', '.join(heading)}", where=text, hint=hint)
    if len(first) > 2 and role_of(first[2]) is not None:
        what = (
            f"line 1: `{first[2]}` in the third column is called like a split, and no heading says what the columns are"
        )
        raise UserError(what, where=text, hint=f"add the heading {separator.join(('path', 'label', 'split'))}")
    return _Columns(0, 1, None, separator, False)


def _place(known: Sequence[str], heading: Sequence[str]) -> int | None:
    return next((heading.index(name) for name in known if name in heading), None)


def _separator(head: str, names: Sequence[str]) -> str:
    """That which makes known names of the first line, or else the first that is in it."""
    line = head.partition("\n")[0]

    def known(separator: str) -> int:
        cells = {cell.strip().strip('"').lower() for cell in line.split(separator)}
        return sum(not cells.isdisjoint(group) for group in ([[name] for name in names] or (_PATH, _LABEL, _SPLIT)))

    most = max(map(known, _SEPARATORS))
    likely = [separator for separator in _SEPARATORS if known(separator) == most]
    return next((separator for separator in likely if separator in line), ",")


def _marked(lines: Sequence[Sequence[str]], *, apart_from: Sequence[int | None]) -> list[int]:
    """All other columns than those named, where they are several and hold nothing but 0 and 1."""
    places = [place for place in range(len(lines[0])) if place not in apart_from]
    rows = [row for row in lines[1:] if len(row) == len(lines[0])]
    marks = {row[place].strip().lower() for row in rows for place in places}
    return places if len(places) > 1 and marks and marks <= _MARKS else []


def _check_one_label_each(classes: Sequence[str], *, where: str) -> None:
    """UserError for labels that are several in one field: most of what a separator takes apart stands in other labels too."""
    for separator in _BETWEEN_LABELS:
        parts = {label: {part.strip() for part in label.split(separator)} - {""} for label in classes}
        joined = [label for label in classes if separator in label]
        counts: dict[str, int] = {}
        for part in itertools.chain.from_iterable(parts.values()):
            counts[part] = counts.get(part, 0) + 1
        shared = {label: [part for part in sorted(parts[label]) if counts[part] > 1] for label in joined}
        # names with synonyms (`projectile, missile`) are written with commas, and share one now and then
        least = {label: len(parts[label]) if separator == "," else 1 for label in joined}
        recurring = [label for label in joined if len(shared[label]) >= max(least[label], 1)]
        if joined and 2 * len(recurring) >= len(joined):
            label = recurring[0]
            part = shared[label][0]
            other = next(name for name in classes if name != label and part in parts[name])
            what = f"label `{label}` is several labels, as it looks: `{part}` is in `{other}` too"
            hint = (
                f"csq takes one label per image; where the whole is one class, name the columns: csv:{where}#PATH,LABEL"
            )
            raise UserError(what, where=where, hint=hint)


def _classes(labels: set[str]) -> list[str]:
    """Labels in order: by number where all are whole numbers, else by name."""
    numbers = all(label.isdecimal() for label in labels)
    return sorted(labels, key=lambda label: (int(label) if numbers else 0, label))  # "1" and "01" are two classes
