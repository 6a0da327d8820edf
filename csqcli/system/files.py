"""Writing without ever leaving a half-written file behind, and opening nothing but what the name says.

A folder may hold links that somebody else put there. What csq writes takes a name's place (the link goes, what it pointed to
stays); what csq opens in place is a regular file of one name, or refused.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from csqcli.errors import UserError

_SEAL_BYTES = 64


@contextlib.contextmanager
def replacing(path: Path, *, previous: Path | None = None) -> Iterator[Path]:
    """A sibling temporary path; on success it is fsynced and renamed over ``path``, otherwise removed.

    ``previous`` is the name that the file replaced goes on living under; between the two renames it is the only one.
    Raises UserError when the folder cannot be written or the disk is full; ``path`` is then as it was.
    """
    # named before it is made, so that no signal finds it made and not yet known
    temporary = path.with_name(f".{path.name.lstrip('.')}.{secrets.token_hex(4)}.tmp")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror or error})", where=str(path)) from None
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except KeyboardInterrupt:
            temporary.unlink(missing_ok=True)
            raise


def open_regular(path: Path, flags: int) -> int:
    """A file descriptor of a regular file that has this name only; for ``os.O_CREAT``, perhaps a new one.

    Never follows a link and never waits for the other end of a pipe. Raises OSError where the file cannot be opened, and
    UserError for links, files of several names, pipes and devices.
    """
    safe = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    if path.is_symlink():  # the error that O_NOFOLLOW gives differs between systems
        raise _not_ours(path, "a symbolic link")
    handle = os.open(path, flags | safe, 0o666)
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:  # 0: it was removed meanwhile
        return handle
    os.close(handle)
    raise _not_ours(path, "a file of several names" if stat.S_ISREG(status.st_mode) else "not a regular file")


def _not_ours(path: Path, what: str) -> UserError:
    return UserError(f"is {what}, which csq does not open", where=str(path), hint="remove it")


def read_regular(path: Path, *, limit: int) -> bytes:
    """The bytes of a regular file of one name. Raises as :func:`open_regular`, and ValueError beyond ``limit`` bytes."""
    handle = open_regular(path, os.O_RDONLY)
    with open(handle, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"more than {limit:,} bytes")
    return data


def leftovers(path: Path) -> list[Path]:
    """Temporary files of writes to ``path`` that a kill cut short, and of candidates never accepted."""
    name = glob.escape(path.name)
    return [*path.parent.glob(f".{name}.*.tmp"), *path.parent.glob(f".{name}.candidate*")]


def seal(path: Path) -> None:
    """Append the SHA-256 of the file's bytes, as 64 hex digits. Zip archives, torch.save's among them, still open."""
    digest = sha256(path)
    with open(path, "ab") as file:
        file.write(digest.encode())


def is_intact(path: Path) -> bool:
    """Whether the file ends in the SHA-256 of all before it. OSError when it cannot be read."""
    size = path.stat().st_size - _SEAL_BYTES
    if size < 0:
        return False
    with open(path, "rb") as file:
        file.seek(size)
        return file.read() == sha256(path, size=size).encode()


def sha256(*paths: Path, size: int | None = None) -> str:
    """The SHA-256, in hex digits, of files one after the other, each up to its first ``size`` bytes; read in blocks."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            left = sys.maxsize if size is None else size
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                digest.update(block)
                left -= len(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` with ``text`` (UTF-8), atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a folder be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
