"""Data sets that lie in a few large files: which of the files are which split."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from csqcli.data.class_folders import Role, is_hidden, role_of

_LOOKED_AT = 100  # entries of a folder, of which one must be a shard: class folders hold thousands of others
_DEPTH = 2  # folders around the shards: data/train/


def find_shards(root: Path, suffixes: tuple[str, ...]) -> dict[Role, list[Path]]:
    """The files of these kinds in ``root`` and the folders around them, by split: that in the file's name, else the folder's.

    A file whose name says nothing is of the training split. ``root`` may be a single file.
    """
    found: dict[Role, list[Path]] = {}
    for file in [root] if root.is_file() else _files(root, suffixes, _DEPTH):
        folder = role_of(file.parent.name, strict=False) if file.parent != root else None
        found.setdefault(role_of(file.stem, strict=False) or folder or "train", []).append(file)
    return found


def holds_shards(root: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a bare path is made of such files."""
    if root.is_file():
        return root.suffix.lower() in suffixes
    return next(_files(root, suffixes, _DEPTH), None) is not None


def _files(folder: Path, suffixes: tuple[str, ...], depth: int) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        first = list(itertools.islice(entries, _LOOKED_AT))
    if any(entry.name.lower().endswith(suffixes) for entry in first):
        yield from sorted(
            path for path in folder.iterdir() if path.name.lower().endswith(suffixes) and not is_hidden(path.name)
        )
    if depth and len(first) < _LOOKED_AT:
        for inner in sorted(entry.name for entry in first if entry.is_dir() and not is_hidden(entry.name)):
            yield from _files(folder / inner, suffixes, depth - 1)
