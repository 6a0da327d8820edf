"""SIGINT and SIGTERM as a request to finish the step and save, instead of a place to die."""

from __future__ import annotations

import atexit
import signal
import threading
from types import FrameType
from typing import Any, ClassVar


class Interrupted(Exception):
    """Training stopped on request; its state is saved."""

    def __init__(self, signum: int, where: str) -> None:
        self.signum, self.where = signum, where
        super().__init__(where)


class StopRequest:
    """Context manager that remembers the first SIGINT or SIGTERM; a second one of either is a KeyboardInterrupt, unless ``patient``.

    Handlers stay until the end: one that is taken off while the other signal waits makes Python complain of a race.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.signum: int | None = None
        self.patient = patient
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def _remember(self, signum: int, _: FrameType | None) -> None:
        if self.signum is not None and not self.patient:
            raise KeyboardInterrupt
        self.signum = signum


class Signals:
    """Context manager around a whole command: SIGTERM is a KeyboardInterrupt, as SIGINT is, and nothing interrupts the way out."""

    # whether what was interrupted can go on from a saved state; a run's folder knows
    left_state: ClassVar[bool] = False

    def __init__(self) -> None:
        Signals.left_state = False
        self.signum: int = signal.SIGINT  # the last that interrupted
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
            signal.signal(signal.SIGTERM, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def ignore(self) -> None:
        """From here on, to the end of this context and through the interpreter's own, where a traceback would be printed."""
        for signum in self._previous:
            signal.signal(signum, signal.SIG_IGN)
            atexit.register(signal.signal, signum, signal.SIG_IGN)

    def _interrupt(self, signum: int, _: FrameType | None) -> None:
        self.signum = signum
        raise KeyboardInterrupt
