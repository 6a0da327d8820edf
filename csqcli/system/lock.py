"""One run per output folder, by a lock that cannot outlive its holder."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from csqcli.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)  # what POSIX lets a lock answer when another process has it


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder/.lock`` while the body runs. UserError when another process holds it, saying which.

    A POSIX record lock: the kernel releases it when the process ends, however it ends, and worker processes do not
    inherit it. A file system without locks (and Windows) goes without.
    """
    if fcntl is None:
        yield
        return
    path = folder / LOCK_FILE
    handle = _acquire(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock goes: after that, the file may be another run's
        os.close(handle)


def _acquire(path: Path) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"cannot be written ({error.strerror})", where=str(path.parent)) from None
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                holder = os.read(handle, 200).decode(errors="replace")
                os.close(handle)
                raise UserError(
                    f"another run is writing here ({holder or 'just started'})",
                    where=str(path.parent),
                    hint="wait for it, stop it, or choose another --output",
                ) from None
            return handle  # no locks here
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                with contextlib.suppress(OSError):  # a full disk: the name is for people only
                    os.truncate(handle, 0)
                    os.write(handle, f"pid {os.getpid()} on {socket.gethostname()}".encode())
                return handle
        os.close(handle)  # the last holder removed the file between our open and our lock
