"""Tables of images in parquet and Arrow files, read row by row. Needs pyarrow."""

from __future__ import annotations

import bisect
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from csqcli.data.class_folders import Role
from csqcli.data.splits import NO_IMAGES, DataSet, Images
from csqcli.errors import UserError
from csqcli.system.limits import MAX_CLASSES, read_json

log = logging.getLogger(__name__)

_LARGE_GROUP = 2**26  # bytes of a parquet row group, all of which is read for one row
_FEATURES, _VALUES = b"huggingface", 2**20  # the schema's key under which `datasets` describes columns; values in it


class TableReader:
    """The image column of tables, by ``FILE#ROW``."""

    def __init__(self, column: str) -> None:
        self.column = column
        self._open: tuple[int, dict[str, _Column]] = (0, {})

    def read(self, path: str) -> bytes:
        """The image's bytes. OSError where the file does not give them."""
        file, _, row = path.rpartition("#")
        if self._open[0] != os.getpid():  # loader processes open their own
            self._open = os.getpid(), {}
        try:
            if file not in self._open[1]:
                self._open[1][file] = _Column(file, self.column)
            value = self._open[1][file].row(int(row))
        except pa.ArrowException as error:
            raise OSError(f"{path}: {error}") from None
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise OSError(f"{path}: no encoded image in this row")
        return content

    def size(self, path: str) -> int:
        return os.stat(path.rpartition("#")[0]).st_size

    def __getstate__(self) -> dict[str, object]:
        return {"column": self.column, "_open": (0, {})}


class _Column:
    """One column of one file. Arrow is mapped into memory; of parquet the last row group stays decoded."""

    def __init__(self, file: str, name: str) -> None:
        self.name = name
        self.parquet = pq.ParquetFile(file) if file.endswith(".parquet") else None
        self.values: Any = None
        self.group, self.starts = -1, [0]
        if self.parquet is None:
            self.values = _arrow(file).column(name)
        else:
            metadata = self.parquet.metadata
            rows = (metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
            self.starts = [0, *itertools.accumulate(rows)]

    def row(self, number: int) -> Any:
        if self.parquet is not None:
            group = bisect.bisect_right(self.starts, number) - 1
            if group != self.group:
                self.values = self.parquet.read_row_group(group, columns=[self.name], use_threads=False).column(0)
                self.group = group
            number -= self.starts[group]
        return self.values[number].as_py()


def data_set(files: Mapping[Role, Sequence[Path]], root: Path, label: str | None, *, where: str) -> DataSet:
    """The splits that the files hold. UserError, naming the columns, where image or label cannot be told."""
    try:
        first = _schema(next(iter(files.values()))[0])
        features = _features(first)
        image = _image_column(first, features, where)
        label = _label_column(first, features, label, where)
        columns = {role: [_labels(file, label) for file in paths] for role, paths in files.items()}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"cannot be read ({error})", where=where) from None
    flat = {role: list(itertools.chain.from_iterable(parts)) for role, parts in columns.items()}
    names = features.get(label, {}).get("names")
    classes = list(map(str, names)) if isinstance(names, list) else _classes(flat.values(), where)
    numbers = {name: number for number, name in enumerate(classes)}
    reader = TableReader(image)
    splits = {}
    for role, values in flat.items():
        known = [value if isinstance(value, int) else numbers.get(value, -1) for value in values]
        if role == "test" and any(not 0 <= number < len(classes) for number in known):
            continue  # competitions keep the labels of theirs
        paths = [
            f"{file}#{row}" for file, part in zip(files[role], columns[role], strict=True) for row in range(len(part))
        ]
        splits[role] = Images(torch.tensor(known), paths=paths, root=os.path.join(root, ""), reader=reader)
    for path in itertools.chain.from_iterable(files.values()):
        _warn_of_large_groups(path)
    return DataSet(where, classes, splits.get("val", NO_IMAGES), splits.get("train"), splits.get("test"))


def _schema(file: Path) -> pa.Schema:
    return pq.read_schema(file) if file.suffix == ".parquet" else _arrow(str(file)).schema


def _arrow(file: str) -> pa.Table:
    """A memory-mapped table; `datasets` writes streams, others write files."""
    source = pa.memory_map(file)
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()


def _labels(file: Path, column: str) -> list[Any]:
    table = pq.read_table(file, columns=[column]) if file.suffix == ".parquet" else _arrow(str(file))
    values: list[Any] = table.column(column).to_pylist()
    odd = next((row for row, value in enumerate(values) if not isinstance(value, (int, str))), None)
    if odd is not None:
        raise ValueError(f"row {odd} of {file.name} has no label")
    return values


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What `datasets` says of the columns; nothing where somebody else wrote the file."""
    stated = (schema.metadata or {}).get(_FEATURES)
    if stated is None:
        return {}
    features = read_json(stated, nodes=_VALUES).get("info", {}).get("features", {})
    return {name: entry for name, entry in features.items() if isinstance(entry, dict)}


def _image_column(schema: pa.Schema, features: Mapping[str, Any], where: str) -> str:
    images = [name for name, entry in features.items() if entry.get("_type") == "Image" and name in schema.names]
    if not images:
        images = [field.name for field in schema if _is_encoded(field.type)]
    if len(images) != 1:
        what = f"{len(images)} columns of encoded images among {', '.join(schema.names)}"
        raise UserError(what, where=where, hint="one is expected")
    return images[0]


def _is_encoded(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _label_column(schema: pa.Schema, features: Mapping[str, Any], wanted: str | None, where: str) -> str:
    if wanted is not None:
        if wanted not in schema.names:
            raise UserError(f"no column `{wanted}` among {', '.join(schema.names)}", where=where)
        return wanted
    classes = [name for name, entry in features.items() if entry.get("_type") == "ClassLabel" and name in schema.names]
    usual = [name for name in ("label", "labels", "cls", "class", "target") if name in schema.names]
    found = classes if len(classes) == 1 else usual[:1]
    if not found:
        what = f"which of {', '.join(classes or schema.names)} is the label is not clear"
        raise UserError(what, where=where, hint=f"write {where}#COLUMN")
    return found[0]


def _classes(splits: Any, where: str) -> list[str]:
    values = {value for split in splits for value in split}
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    if not all(isinstance(value, int) for value in values):
        raise UserError("labels are numbers and texts", where=where)
    if max(values) >= MAX_CLASSES:
        what = f"a label is {max(values):,}, of at most {MAX_CLASSES:,} classes"
        raise UserError(what, where=where, hint="number classes from 0")
    return [str(number) for number in range(max(values) + 1)]


def _warn_of_large_groups(path: Path) -> None:
    if path.suffix != ".parquet":
        return
    metadata = pq.read_metadata(path)
    largest = max((metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups)), default=0)
    if largest > _LARGE_GROUP:
        what = "%s: row groups of %d MiB, each read whole for one image; write it with row_group_size=100, or as Arrow"
        log.warning(what, path, largest >> 20)
