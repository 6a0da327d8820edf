"""A zip or tar of class folders, read where it lies: nothing is unpacked, and every image is reached by itself."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from csqcli.data.registry import data_source
from csqcli.errors import UserError

if TYPE_CHECKING:
    from csqcli.data.archives import ArchiveReader
    from csqcli.data.splits import DataSet

_SUFFIXES = (
    ".zip",
    ".tar",
    ".tar.gz",
    ".tgz",
    ".tar.bz2",
    ".tar.xz",
    ".tar.zst",
)  # the packed ones are told what to do


def _recognises(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(_SUFFIXES)


@data_source("archive:FILE", "a zip or tar of class folders, read without unpacking", recognises=_recognises)
def archive(text: str, *, train: bool) -> DataSet:
    """The images of an archive's class folders; see `csqcli.data.class_folders`."""
    from csqcli.data.archives import ArchiveReader
    from csqcli.data.class_folders import data_set

    reader = ArchiveReader([Path(text)])
    if any(name.endswith(".cls") for name in reader.members):
        raise UserError("holds no class folders but .cls files", where=text, hint=f"for a WebDataset write wds:{text}")
    return data_set(_Members(text, reader), text, train=train)


class _Members:
    """An archive's members as folders and files, in the order in which a walk of the disk would meet them."""

    def __init__(self, name: str, reader: ArchiveReader) -> None:
        self.root, self.reader = f"{name}/", reader
        paths = [path[len(self.root) :] for path in reader.members]
        self._files = sorted((tuple(path.split("/")[:-1]), path.rpartition("/")[2]) for path in paths)
        self._folders: dict[str, set[str]] = {"": set()}
        for parts in {parts for parts, _ in self._files}:
            for depth in range(len(parts)):
                self._folders.setdefault("/".join(parts[: depth + 1]), set())
                self._folders["/".join(parts[:depth])].add(parts[depth])

    def folders(self, path: str) -> list[str]:
        return sorted(self._folders[path])

    def files(self, path: str) -> Iterator[str]:
        parts = tuple(path.split("/")) if path else ()
        found = []
        for number in range(bisect.bisect_left(self._files, (parts, "")), len(self._files)):
            folder, name = self._files[number]
            if folder[: len(parts)] != parts:
                break
            found.append(("/".join(folder), name))
        yield from ("/".join(pair) for pair in sorted(found))
