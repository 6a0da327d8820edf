"""csq in forked processes, what it may say, and what must be true of a run's folder at any moment."""

from __future__ import annotations

import builtins
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from csqcli.cli import app as cli
from csqcli.exporting import run as _exports  # noqa: F401  # imported here, so that no fork has to
from csqcli.file import io as file_io
from csqcli.system import files
from csqcli.training import run_folder
from tests import commands

sys.path.insert(0, str(Path(__file__).parents[1]))  # plain_models
commands.make_once()

Hook = Callable[[], None]
MODEL, STATES = run_folder.MODEL_FILE, (run_folder.RESUME_FILE, run_folder.PREVIOUS_FILE)
STEPS = 8  # per epoch
SHORT = ("--recipe", "digits", "--target-bits", "1.5", "--epochs", "3", "--set", f"max_steps={STEPS}", "--quiet")
SAVES = ("--set", "save_every_minutes=0.0003")  # every 18 ms, so that kills fall into saves too
FINISHED = ["metrics.jsonl", MODEL, "recipe.yaml", "report.json"]
FORMS = ("bit-packed", "int8-packed", "state-dict")
OPERATIONS = ("replace", "unlink", "fsync", "mkdir", "truncate", "open", "sendfile")


@dataclass
class Ended:
    """How a run ended: exit code (negative: the signal that killed it) and what it said."""

    code: int
    out: str
    err: str


class Run:
    """``csq ARGUMENTS`` in a forked process. ``hook`` runs there first."""

    def __init__(self, *arguments: object, hook: Hook | None = None) -> None:
        self.said = [Path(tempfile.mkstemp(prefix="csq-faults-")[1]) for _ in range(2)]
        self.pid = os.fork()
        if self.pid == 0:
            self._child([str(argument) for argument in arguments], hook)

    def _child(self, arguments: list[str], hook: Hook | None) -> None:
        code = 99
        try:
            for number, path in enumerate(self.said, 1):
                os.dup2(os.open(path, os.O_WRONLY), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
            sys.argv = ["csq", *arguments]
            if hook is not None:
                hook()
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def alive(self) -> bool:
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        return False

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Ended:
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        out, err = (path.read_text() for path in self.said)
        for path in self.said:
            path.unlink()
        return Ended(status, out, err)


def csq(*arguments: object, hook: Hook | None = None) -> Ended:
    """Run to the end."""
    return Run(*arguments, hook=hook).wait()


def refused(ended: Ended, *words: str) -> None:
    """Exit code 2 and one line that holds ``words``."""
    assert ended.code == 2, ended
    lines = [line for line in ended.err.splitlines() if line.startswith("csq: error: ")]
    assert len(lines) == 1, ended.err
    assert "Traceback" not in ended.err, ended.err
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


def at_operations(act: Callable[[int, bool], object]) -> None:
    """``act(number, False)`` before each of this process's file operations that change something, True after it."""
    numbers = itertools.count()

    def watched(original: Callable[..., object], changes: Callable[..., bool]) -> Callable[..., object]:
        def call(*arguments: object, **more: object) -> object:
            if not changes(*arguments, **more):
                return original(*arguments, **more)
            number = next(numbers)
            act(number, False)
            try:
                return original(*arguments, **more)
            finally:
                act(number, True)

        return call

    for name in OPERATIONS:
        setattr(os, name, watched(getattr(os, name), lambda *_, **__: True))
    for module in (builtins, io):
        setattr(module, "open", watched(open, lambda _, mode="r", *__, **___: mode.strip("rbt") != ""))  # noqa: B010


def dying_at(operation: int, *, after: bool) -> Hook:
    """SIGKILL to oneself at the so-manyth file operation, before it is done or just after."""

    def act(number: int, late: bool) -> None:
        if (number, late) == (operation, after):
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: at_operations(act)


def count_operations(*arguments: object) -> int:
    """File operations of a run that is left alone."""
    count = multiprocessing.Value("i", 0)

    def act(number: int, _: bool) -> None:
        count.value = number + 1  # type: ignore[attr-defined]

    ended = csq(*arguments, hook=lambda: at_operations(act))
    assert ended.code == 0, ended
    return count.value  # type: ignore[attr-defined, no-any-return]


def check_folder(folder: Path) -> None:
    """What must be true of a run's folder at any moment: each file is whole or absent, a saved state never lost."""
    if (folder / MODEL).exists():
        file_io.read(folder / MODEL)  # checks the integers' SHA-256
    for name in ("report.json", "metrics.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            for text in [(folder / name).read_text()] if name == "report.json" else open(folder / name):
                json.loads(text)
    for name in STATES:
        if (folder / name).exists():
            assert files.is_intact(folder / name), name
