"""Alarm, memory limit and audit hook around a case."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fuzz.values import CANARY, SECRET

SECONDS = 5  # of the processor: a hang
MEMORY = 2**29  # bytes over the process's size before the case


class Hang(BaseException):
    """The alarm. No reader may swallow it."""


class Watch:
    """Alarm, memory and audit hook around a case."""

    def __init__(self) -> None:
        self.armed, self.folder, self.seen = False, "", list[str]()
        sys.addaudithook(self._audit)
        signal.signal(signal.SIGPROF, self._alarm)
        limit = self._status("VmSize") + 2**32
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    @contextlib.contextmanager
    def __call__(self, folder: Path) -> Iterator[None]:
        self.folder, self.seen = str(folder), []
        before = self._status("VmRSS")
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        self.armed = True
        try:
            yield
        finally:
            self.armed = False
            signal.setitimer(signal.ITIMER_PROF, 0)
        grown = self._status("VmHWM") - before
        assert grown <= MEMORY, f"{grown / 2**20:.0f} MiB more memory"
        assert not self.seen, f"side effects: {self.seen[:3]}"

    @staticmethod
    def _status(field: str) -> int:
        text = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""
        match = re.search(rf"{field}:\s+(\d+) kB", text)
        return int(match[1]) * 1024 if match else 0

    @staticmethod
    def _alarm(*_: Any) -> None:
        raise Hang(f"more than {SECONDS} s")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event == "import" and arguments[0].partition(".")[0] in (CANARY, "antigravity"):
            self.seen.append(f"import {arguments[0]}")
        elif event in (
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "subprocess.Popen",
            "socket.getaddrinfo",
        ) or (
            event == "socket.connect" and not isinstance(arguments[1], str)
        ):  # a path is a loader process of csq's own
            self.seen.append(f"{event} {arguments}")
        elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            writes = (
                bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or (arguments[1] or "r")[0] in "wax"
            )
            if path in (SECRET, "/etc/passwd") or (writes and self._outside(path)):
                self.seen.append(f"open {path} {arguments[1]}")
        elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"):
            places = [value for value in arguments[:2] if isinstance(value, (str, bytes, os.PathLike))]
            if any(self._outside(os.path.abspath(os.fsdecode(place))) for place in places):
                self.seen.append(f"{event} {places}")

    def _outside(self, path: str) -> bool:
        return not path.startswith((self.folder, "/dev/null", "/proc/self", "/dev/shm")) and "__pycache__" not in path
