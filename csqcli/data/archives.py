"""Zip and tar files as a place to read single members from. What a member is called is a key here and never a path."""

from __future__ import annotations

import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from csqcli.errors import UserError
from csqcli.system.limits import is_safe_text

MAX_MEMBER = 2**28  # bytes of one image, unpacked; no photograph is larger
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a zip member; its last two fields are the lengths of what follows


class Member(NamedTuple):
    """Where the bytes of one file stand."""

    archive: int
    offset: int  # of its data; of its local header in a zip
    stored: int  # bytes in the archive
    size: int  # bytes unpacked
    crc: int | None = None  # of a zip's member
    deflated: bool = False


class ArchiveReader:
    """The regular files of archives, by ``ARCHIVE/MEMBER``; each is read by itself, wherever in the archive it stands."""

    def __init__(self, archives: Sequence[Path]) -> None:
        """UserError for what is no zip or plain tar, and for members whose names lead elsewhere or occur twice."""
        self.archives = list(archives)
        self.members: dict[str, Member] = {}
        for number, path in enumerate(self.archives):
            for name, member in _listed(path, number):
                key = f"{path}/{name}"
                if key in self.members:
                    raise UserError(f"holds `{name}` twice", where=str(path), hint="make the archive anew")
                self.members[key] = member

    def size(self, path: str) -> int:
        return self.members[path].size

    def read(self, path: str) -> bytes:
        """The bytes of a member. OSError where the archive does not hold them as it says."""
        member = self.members[path]
        if member.size > MAX_MEMBER:
            raise OSError(f"{path}: {member.size:,} bytes are no image")
        with open(
            self.archives[member.archive], "rb"
        ) as file:  # its own handle: loader processes would move a shared one
            file.seek(member.offset)
            if member.crc is not None:
                header = file.read(_LOCAL_HEADER.size)
                if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
                    raise OSError(f"{path}: no member stands there")
                *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
                file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
            content = file.read(member.stored)
        if member.deflated:
            try:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, member.size + 1)
            except zlib.error as error:
                raise OSError(f"{path}: {error}") from None
        if len(content) != member.size or (member.crc is not None and zlib.crc32(content) != member.crc):
            raise OSError(f"{path}: other bytes than the archive says")
        return content


def _listed(path: Path, number: int) -> Iterator[tuple[str, Member]]:
    """Name and place of every regular file of an archive."""
    where = str(path)
    try:
        with open(path, "rb") as file:
            begin = file.read(6)
        packed = next((name for magic, name in _PACKED.items() if begin.startswith(magic)), None)
        if packed is not None:
            hint = "unpack it, or pack it as .zip or plain .tar, whose images can be reached one by one"
            raise UserError(f"is packed by {packed} as a whole", where=where, hint=hint)
        yield from (_zipped if zipfile.is_zipfile(path) else _tarred)(path, number)
    except (OSError, zipfile.BadZipFile, tarfile.TarError, NotImplementedError, ValueError, EOFError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"cannot be read as a zip or tar ({why})", where=where) from None


def _zipped(path: Path, number: int) -> Iterator[tuple[str, Member]]:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    for entry in entries:
        if entry.is_dir():
            continue
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            how = "encrypted" if entry.flag_bits & 1 else "packed by a method other than deflate"
            raise UserError(f"`{entry.filename}` is {how}", where=str(path), hint="make the archive anew")
        deflated = entry.compress_type == zipfile.ZIP_DEFLATED
        place = Member(number, entry.header_offset, entry.compress_size, entry.file_size, entry.CRC, deflated)
        yield _checked(entry.filename, path), place


def _tarred(path: Path, number: int) -> Iterator[tuple[str, Member]]:
    with tarfile.open(path, "r:") as archive:
        for entry in archive:
            if entry.isreg() and not entry.issparse():
                yield _checked(entry.name, path), Member(number, entry.offset_data, entry.size, entry.size)
            archive.members = []  # type: ignore[attr-defined]  # or it would keep them all


def _checked(name: str, path: Path) -> str:
    """A member's name with single slashes. UserError for one that would lead out of a folder or cannot be shown."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\\" in name or not parts or not is_safe_text(name):
        what = f"member {name!r} is no path below a folder"
        raise UserError(what, where=str(path), hint="make the archive anew, from inside the folder")
    return "/".join(parts)
