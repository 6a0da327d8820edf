"""Limits on what comes out of a file that anybody may have made: JSON, YAML, archives, constructor arguments.

Everything here raises ValueError; the reader that calls it makes one line of it that names the file.
"""

from __future__ import annotations

import json
import math
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

MAX_DEPTH = 32  # of nested lists and mappings
MAX_TEXT = 4096  # characters of a string
MAX_CLASSES = 10**6  # outputs of a classifier that csq builds or reads, and so of labels
BASE_BYTES, EXPANSION = 2**26, 2**10  # a file may unpack to 64 MiB, and to 1024 times its own size
_UNSAFE = (
    "Cc",
    "Cs",
    "Zl",
    "Zp",
)  # Unicode's categories of control characters, surrogates, line and paragraph separators
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # would reorder a line
_MAX_ARGUMENT = 2**16  # of an integer that a model's constructor is given
_LOADS_WEIGHTS = ("checkpoint_path", "pretrained", "weights", "cache_dir")  # arguments, or how they begin


def is_safe_text(text: str) -> bool:
    """Whether a name may be stored and shown: UTF-8 text without control, bidirectional or line-breaking characters.

    Joiners, no-break spaces and soft hyphens are letters' business and allowed; surrogates stand for bytes that are no
    UTF-8, as in names of folders, and are not.
    """
    return text.isprintable() or not any(unicodedata.category(c) in _UNSAFE or c in _BIDI for c in text)


def check_tree(value: Any, *, nodes: int) -> None:
    """A tree of mappings, lists, safe texts (tabs and line breaks too), 64-bit integers, finite floats, booleans and nulls, of at most so
    many ``nodes``. Aliases count each time they are met, so what is small as a graph and huge as a tree is refused too.
    """
    pending, left = [(value, 0)], nodes
    while pending:
        item, depth = pending.pop()
        if isinstance(item, str):
            if len(item) > MAX_TEXT or not (is_safe_text(item) or is_safe_text(item.translate({9: " ", 10: " "}))):
                raise ValueError(f"a text that is too long or holds control characters: {item[:40]!r}")
        elif isinstance(item, int):
            if not -(2**63) <= item < 2**63:
                raise ValueError("an integer beyond 64 bits")
        elif isinstance(item, float):
            if not math.isfinite(item):
                raise ValueError(f"a number that is {item}")
        elif isinstance(item, (list, dict)):
            parts = [*item, *item.values()] if isinstance(item, dict) else item
            left -= len(parts)
            if left < 0:
                raise ValueError(f"more than {nodes:,} values")
            if depth == MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH}")
            pending.extend((part, depth + 1) for part in parts)
        elif item is not None:
            raise ValueError(f"a {type(item).__name__}")


def read_json(text: str | bytes, *, nodes: int) -> dict[str, Any]:
    """A JSON object without NaN, infinities, repeated keys, or more than :func:`check_tree` allows."""
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    check_tree(value, nodes=nodes)
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"a number that is {name}")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def check_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """A constructor's keyword arguments describe an architecture: no way to weights, nothing that only costs memory."""
    check_tree(arguments, nodes=1000)
    for name in arguments:
        if not name.isidentifier():
            key, colon, value = name.partition(":")
            hint = f"; put a blank after the colon: {key}: {value}" if colon and key.isidentifier() else ""
            raise ValueError(f"`{name}` is no name of an argument{hint}")
        if name.startswith(_LOADS_WEIGHTS):
            raise ValueError(f"`{name}` would load weights; the architecture's arguments cannot")
    pending: list[Any] = [arguments]
    while pending:
        item = pending.pop()
        if isinstance(item, int) and abs(item) > _MAX_ARGUMENT:
            raise ValueError(f"an integer beyond {_MAX_ARGUMENT:,}")
        pending += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return arguments


def check_unpacked(size: int, *, file_bytes: int) -> None:
    """``size`` bytes may come out of a file of ``file_bytes``."""
    if size > BASE_BYTES + EXPANSION * file_bytes:
        raise ValueError(f"{file_bytes:,} bytes declare {size:,}")


def check_archive(path: Path) -> None:
    """torch.save stores its zip entries as they are, one beside the other: no entry unpacks, none lie on each other."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("compressed entries, which torch.save does not write")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("entries larger than the file")
