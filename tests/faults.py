"""Faults done to csq on purpose, and what must still be true afterwards.

``python -m tests.faults --cycles 50 --seed 0`` (about 3 minutes on two cores) runs all of them; ``--every-operation``
kills a search before and after each of its file operations in turn. tests/test_faults.py runs a few of each.

Every run is a fork of this process, which has imported everything: a cycle takes half a second instead of six.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from csqcli import checkpoint_file, cli, files, pipeline
from csqcli.export import run as _export  # noqa: F401  # imported here, so that no fork has to

Hook = Callable[[], None]
MODEL, STATES = pipeline.MODEL_FILE, (pipeline.RESUME_FILE, pipeline.PREVIOUS_FILE)
SHORT = ("--recipe", "digits", "--target-bits", "1.5", "--epochs", "3", "--quiet")
SAVES = ("--set", "save_every_minutes=0.0003")  # every 18 ms, so that kills fall into saves too
SEARCH = ("search", *SHORT, *SAVES, "--finetune-epochs", "2")
FORMS = ("bit-packed", "int8-packed", "state-dict")
OPERATIONS = ("replace", "unlink", "fsync", "mkdir", "truncate", "open")


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
            import traceback

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


def dying_at(operation: int, *, after: bool) -> Hook:
    """SIGKILL to oneself at the so-manyth file operation, before it is done or just after."""

    def hook() -> None:
        calls = itertools.count()

        def deadly(original: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **more: object) -> object:
                mine = next(calls) == operation
                if mine and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    return original(*arguments, **more)
                finally:
                    if mine:
                        os.kill(os.getpid(), signal.SIGKILL)

            return call

        for name in OPERATIONS:
            setattr(os, name, deadly(getattr(os, name)))

    return hook


def count_operations(*arguments: object) -> int:
    """File operations of a run that is left alone."""
    read, write = os.pipe()
    seen = itertools.count()

    def hook() -> None:
        for name in OPERATIONS:
            original = getattr(os, name)
            setattr(os, name, lambda *a, _original=original, **k: (next(seen), _original(*a, **k))[1])
        original_exit = os._exit
        os._exit = lambda code: (os.write(write, str(next(seen)).encode()), original_exit(code))  # type: ignore[assignment]

    ended = csq(*arguments, hook=hook)
    assert ended.code == 0, ended
    os.close(write)
    with os.fdopen(read) as pipe:
        return int(pipe.read())


def check_folder(folder: Path) -> None:
    """What must be true of a run's folder at any moment: each file is whole or absent, a saved state never lost."""
    if (folder / MODEL).exists():
        checkpoint_file.read(folder / MODEL)  # checks the integers' SHA-256
    for name in ("report.json", "metrics.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            for text in [(folder / name).read_text()] if name == "report.json" else open(folder / name):
                json.loads(text)
    for name in STATES:
        if (folder / name).exists():
            assert files.is_intact(folder / name), name


class Kill:
    """How the next run is killed: after a random time, or at a random file operation."""

    def __init__(self, rng: random.Random, seconds: float, operations: int) -> None:
        self.after_seconds = rng.uniform(0, seconds) if rng.random() < 0.5 else None
        self.operation, self.late = rng.randrange(operations), rng.random() < 0.5

    def run(self, *arguments: object, watch: Callable[[], None]) -> Ended:
        """``watch`` is called over and over while the run lives."""
        started = time.perf_counter()
        hook = dying_at(self.operation, after=self.late) if self.after_seconds is None else None
        process = Run(*arguments, hook=hook)
        while process.alive():
            if self.after_seconds is not None and time.perf_counter() - started > self.after_seconds:
                process.kill()
                break
            watch()
            time.sleep(0.002)
        ended = process.wait()
        assert ended.code in (0, -signal.SIGKILL) or "holds a finished run" in ended.err, ended
        return ended


class KillCycles:
    """kill -9 of search, finetune and export, at random moments, until each is done: then the same bytes as unbroken."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.rng = work, random.Random(seed)
        self.kills = self.finished_first = 0
        self.source, finetuned = work / "source" / MODEL, work / "finetuned"
        self.lengths = {"search": self._measure(*SEARCH, "-o", self.source.parent)}
        self.lengths["finetune"] = self._measure(*self._finetune(), "-o", finetuned)
        self.lengths["export"] = self._measure(*self._export("bit-packed", work / "exported.safetensors"))
        self.wanted = {"search": self.source.read_bytes(), "finetune": (finetuned / MODEL).read_bytes()}
        self.state_dict = checkpoint_file.read(self.source).state_dict()

    def _finetune(self) -> tuple[object, ...]:
        return ("finetune", self.source, "--data", "digits", "--epochs", 3, "--quiet", *SAVES)

    def _export(self, form: str, output: Path) -> tuple[object, ...]:
        return ("export", self.source, f"--{form}", "-o", output, "--force")

    def _measure(self, *arguments: object) -> tuple[float, int]:
        """Seconds and file operations of a run that is left alone."""
        started = time.perf_counter()
        operations = count_operations(*arguments)
        return time.perf_counter() - started, operations

    def cycle(self, number: int) -> str:
        """One command killed at least once, gone on with until it is done, and compared."""
        kind = ("search", "finetune", "export", "search over a finished run")[number % 4]
        before = self.kills
        for attempt in itertools.count():  # until one did not end before it was killed
            target = self.work / f"cycle{number}.{attempt}"
            if kind == "export":
                self._export_killed(target)
            elif kind == "finetune":
                self._train_killed(kind, self._finetune(), target)
            elif kind == "search":
                self._train_killed(kind, SEARCH, target)
            else:
                shutil.copytree(self.work / "finetuned", target)
                self._train_killed("search", SEARCH, target, old=self.wanted["finetune"])
            assert self.source.read_bytes() == self.wanted["search"]
            if self.kills > before:
                break
        return f"{kind}: {self.kills - before} kills"

    def _kill(self, kind: str, *arguments: object, watch: Callable[[], None]) -> Ended:
        ended = Kill(self.rng, *self.lengths[kind]).run(*arguments, watch=watch)
        self.kills += ended.code == -signal.SIGKILL
        self.finished_first += ended.code != -signal.SIGKILL
        return ended

    def _train_killed(self, kind: str, command: tuple[object, ...], target: Path, *, old: bytes | None = None) -> None:
        """``old``: the complete model that is in the folder already."""

        def watch() -> None:
            if old is not None:
                checkpoint_file.read(target / MODEL)  # never away, never half

        for _ in range(self.rng.randint(1, 3)):
            ended = self._kill(kind, *command, "-o", target, self._how(target, old), watch=watch)
            check_folder(target)
            watch()
            if ended.code != -signal.SIGKILL:
                break
        ended = csq(*command, "-o", target, self._how(target, old))
        assert ended.code == 0 or "holds a finished run" in ended.err, ended
        assert (target / MODEL).read_bytes() == self.wanted[kind], f"{target}: other bytes than the unbroken run's"
        check_folder(target)
        left = sorted(path.name for path in target.iterdir())
        assert left == ["metrics.jsonl", MODEL, "recipe.yaml", "report.json"], left

    def _how(self, target: Path, old: bytes | None) -> str:
        """What a person would type: --resume, or --force again when the killed run had saved nothing yet."""
        unfinished = any((target / name).exists() for name in STATES)
        replaced = (target / MODEL).exists() and (target / MODEL).read_bytes() != old
        return "--force" if old is not None and not unfinished and not replaced else "--resume"

    def _export_killed(self, target: Path) -> None:
        target.mkdir()
        output = target / "exported.safetensors"
        command = self._export(self.rng.choice(FORMS), output)
        if existed := self.rng.random() < 0.5:
            shutil.copy(self.source, output)

        def whole() -> None:
            if existed or output.exists():
                self._same_weights(output)

        for _ in range(self.rng.randint(1, 3)):
            self._kill("export", *command, watch=whole)
            whole()
        assert csq(*command).code == 0
        self._same_weights(output)
        assert [path.name for path in target.iterdir()] == [output.name]

    def _same_weights(self, path: Path) -> None:
        if checkpoint_file.is_quantized(path):
            state = checkpoint_file.read(path).state_dict()
        else:
            from safetensors.torch import load_file

            state = load_file(path)
        assert state.keys() == self.state_dict.keys()
        assert all(torch.equal(state[name], value) for name, value in self.state_dict.items())


def every_operation(work: Path) -> str:
    """A search killed before and after each of its file operations in turn."""
    command = ("search", *SHORT, "--finetune-epochs", "1")
    assert csq(*command, "-o", work / "unbroken").code == 0
    wanted = (work / "unbroken" / MODEL).read_bytes()
    operations = count_operations(*command, "-o", work / "counted")
    for operation, after in itertools.product(range(operations), (False, True)):
        target = work / f"{operation}{'after' if after else 'before'}"
        ended = csq(*command, "-o", target, hook=dying_at(operation, after=after))
        assert ended.code == -signal.SIGKILL, ended
        if target.exists():
            check_folder(target)
        ended = csq(*command, "-o", target, "--resume")
        assert ended.code == 0 or "holds a finished run" in ended.err, ended
        assert (target / MODEL).read_bytes() == wanted, (operation, after)
        shutil.rmtree(target)
    return f"killed before and after each of {operations} file operations: the same bytes every time"


def main() -> None:
    """Run everything; exit code 1 and a traceback at the first promise that is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=50, help="kill cycles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every-operation", action="store_true", help="also kill at each file operation in turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="csq-faults-") as folder:
        work = Path(folder)
        if options.cycles:
            cycles = KillCycles(work, options.seed)
            for number in range(options.cycles):
                print(f"cycle {number + 1:>3}  {cycles.cycle(number)}", flush=True)
            print(
                f"{options.cycles} cycles, {cycles.kills} kills ({cycles.finished_first} runs ended before theirs): "
                "every complete file stayed complete, every model ended in the unbroken run's bytes"
            )
        if options.every_operation:
            (work / "operations").mkdir()
            print(every_operation(work / "operations"), flush=True)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
