"""One entry of a LiteRT file's metadata, found without LiteRT: a bounded walk through four of its flatbuffer tables.

Tables and vectors are found by 32-bit offsets that anybody may have written: every read is checked against the file's
size, and nothing but the tables on the way is read.
"""

from __future__ import annotations

import struct
from typing import IO

IDENTIFIER = b"TFL3"
_BUFFERS, _METADATA = 4, 6  # fields of Model
_NAME, _BUFFER = 0, 1  # fields of Metadata
_DATA = 0  # field of Buffer
_MAX_ENTRIES = 2**16  # of a vector of metadata; LiteRT's own tools write a handful
_MAX_NAME = 2**10


class _Reader:
    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size = file, size

    def bytes_at(self, position: int, count: int) -> bytes:
        if position < 0 or count > self.size - position:
            raise ValueError("an offset beyond the file")
        self.file.seek(position)
        found = self.file.read(count)
        if len(found) != count:
            raise ValueError("the file ends early")
        return found

    def number(self, position: int) -> int:
        return int(struct.unpack("<I", self.bytes_at(position, 4))[0])

    def follow(self, position: int) -> int:
        return position + self.number(position)

    def field(self, table: int, index: int) -> int | None:
        """Where a table's field stands; None where it has its default."""
        vtable = table - struct.unpack("<i", self.bytes_at(table, 4))[0]
        length = struct.unpack("<H", self.bytes_at(vtable, 2))[0]
        if 4 + 2 * index + 2 > length:
            return None
        offset = struct.unpack("<H", self.bytes_at(vtable + 4 + 2 * index, 2))[0]
        return table + offset if offset else None

    def entries(self, vector: int) -> range:
        """Positions of the offsets in a vector of tables."""
        count = self.number(vector)
        if 4 * count > self.size - vector - 4:
            raise ValueError("a vector that ends beyond the file")
        return range(vector + 4, vector + 4 + 4 * count, 4)


def metadata_span(file: IO[bytes], size: int, key: str) -> tuple[int, int] | None:
    """Where the content of the metadata entry ``key`` begins and ends in the file; None where it has no such entry.

    ValueError for a file that is no LiteRT model, that is damaged, or that names the entry twice.
    """
    reader = _Reader(file, size)
    if size < 8 or reader.bytes_at(4, 4) != IDENTIFIER:
        raise ValueError("it does not begin as one")
    model = reader.follow(0)
    metadata, buffers = reader.field(model, _METADATA), reader.field(model, _BUFFERS)
    if metadata is None or buffers is None:
        return None
    entries = reader.entries(reader.follow(metadata))
    if len(entries) > _MAX_ENTRIES:
        raise ValueError(f"{len(entries):,} entries of metadata")
    places = reader.entries(reader.follow(buffers))
    found: list[tuple[int, int]] = []
    for position in entries:
        entry = reader.follow(position)
        name = reader.field(entry, _NAME)
        if name is None:
            continue
        text = reader.follow(name)
        if (length := reader.number(text)) > _MAX_NAME or reader.bytes_at(text + 4, length) != key.encode():
            continue
        at = reader.field(entry, _BUFFER)
        number = reader.number(at) if at is not None else 0
        if number >= len(places):
            raise ValueError("metadata in a buffer that does not exist")
        data = reader.field(reader.follow(places[number]), _DATA)
        if data is None:
            raise ValueError("metadata without bytes")
        vector = reader.follow(data)
        length = reader.number(vector)
        if length > size - vector - 4:
            raise ValueError("metadata that ends beyond the file")
        found.append((vector + 4, vector + 4 + length))
    if len(found) > 1:
        raise ValueError(f"two entries named {key}")
    return found[0] if found else None
