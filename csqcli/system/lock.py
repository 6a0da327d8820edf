"""One writer per folder or file, by a lock that cannot outlive its holder."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from csqcli.errors import UserError
from csqcli.system.files import open_regular

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)  # what POSIX lets a lock answer when another process has it


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder/.lock`` while the body runs. UserError when another process holds it, saying which."""
    with _held(folder / LOCK_FILE, writes=folder, hint="wait for it, stop it, or choose another --output"):
        yield


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold a lock file beside ``path`` while the body writes it. UserError when another process does, saying which."""
    lock = path.with_name(f".{path.name.lstrip('.')}{LOCK_FILE}")
    with _held(lock, writes=path, hint="wait for it, or choose another name"):
        yield


@contextlib.contextmanager
def _held(lock: Path, *, writes: Path, hint: str) -> Iterator[None]:
    """A POSIX record lock: the kernel releases it when the process ends, however it ends, and worker processes do not
    inherit it. A file system without locks (and Windows) goes without.
    """
    if fcntl is None:
        yield
        return
    handle = _acquire(lock, writes=writes, hint=hint)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # before the lock goes: after that, the file may be another run's
        os.close(handle)


def _acquire(lock: Path, *, writes: Path, hint: str) -> int:
    while True:
        try:
            handle = open_regular(lock, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UserError(f"cannot be written ({error.strerror})", where=str(writes)) from None
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                holder = os.read(handle, 200).decode(errors="replace")
                os.close(handle)
                what = f"another run is writing here ({holder or 'just started'})"
                raise UserError(what, where=str(writes), hint=hint) from None
            return handle  # no locks here
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(lock), os.fstat(handle)):
                with contextlib.suppress(OSError):  # a full disk: the name is for people only
                    os.truncate(handle, 0)
                    os.write(handle, f"pid {os.getpid()} on {socket.gethostname()}".encode())
                return handle
        os.close(handle)  # the last holder removed the file between our open and our lock
