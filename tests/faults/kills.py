"""kill -9 at random moments and file operations, and at each file operation in turn."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from csqcli.file import header
from csqcli.file import io as file_io
from tests.faults.runs import (
    FINISHED,
    FORMS,
    MODEL,
    SAVES,
    SHORT,
    STATES,
    STEPS,
    Ended,
    Run,
    check_folder,
    count_operations,
    csq,
    dying_at,
)

SEARCH = ("search", *SHORT, *SAVES, "--finetune-epochs", "2")


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
        assert ended.code in (0, -signal.SIGKILL), ended
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
        self.state_dict = file_io.read(self.source).state_dict()

    def _finetune(self) -> tuple[object, ...]:
        few = ("--epochs", 3, "--set", f"max_steps={STEPS}", "--quiet")
        return ("finetune", self.source, "--data", "digits", *few, *SAVES)

    def _export(self, form: str, output: Path) -> tuple[object, ...]:
        return ("export", self.source, f"--{form}", "-o", output, "--force")

    def _measure(self, *arguments: object) -> tuple[float, int]:
        """Seconds and file operations of a run that is left alone."""
        started = time.perf_counter()
        operations = count_operations(*arguments)
        return time.perf_counter() - started, operations

    def cycle(self, number: int) -> str:
        """One command killed at least once, gone on with until it is done, and compared; which it was."""
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
        return kind

    def _kill(self, kind: str, *arguments: object, watch: Callable[[], None]) -> Ended:
        ended = Kill(self.rng, *self.lengths[kind]).run(*arguments, watch=watch)
        self.kills += ended.code == -signal.SIGKILL
        self.finished_first += ended.code != -signal.SIGKILL
        return ended

    def _train_killed(self, kind: str, command: tuple[object, ...], target: Path, *, old: bytes | None = None) -> None:
        """``old``: the complete model that is in the folder already."""

        def watch() -> None:
            if old is not None:  # never away, never half
                file_io.read(self._as_it_is(target / MODEL))

        for _ in range(self.rng.randint(1, 3)):
            ended = self._kill(kind, *command, "-o", target, self._how(target, old), watch=watch)
            check_folder(target)
            watch()
            if ended.code != -signal.SIGKILL:
                break
        ended = csq(*command, "-o", target, self._how(target, old))
        assert ended.code == 0, ended
        assert (target / MODEL).read_bytes() == self.wanted[kind], f"{target}: other bytes than the unbroken run's"
        check_folder(target)
        assert sorted(path.name for path in target.iterdir()) == FINISHED

    def _as_it_is(self, path: Path) -> Path:
        """A copy of what the file holds now: safetensors opens a name twice, and the run may replace it in between."""
        copy = self.work / "seen.safetensors"
        copy.write_bytes(path.read_bytes())
        return copy

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
                self._same_weights(self._as_it_is(output))

        for _ in range(self.rng.randint(1, 3)):
            self._kill("export", *command, watch=whole)
            whole()
        assert csq(*command).code == 0
        self._same_weights(output)
        assert [path.name for path in target.iterdir()] == [output.name]

    def _same_weights(self, path: Path) -> None:
        if header.is_quantized(path):
            state = file_io.read(path).state_dict()
        else:
            from safetensors.torch import load_file

            state = load_file(path)
        assert state.keys() == self.state_dict.keys()
        assert all(torch.equal(state[name], value) for name, value in self.state_dict.items())


def kill_cycles(work: Path, cycles: int, seed: int) -> str:
    """So many cycles of :class:`KillCycles`."""
    killer = KillCycles(work, seed)
    kinds = Counter(killer.cycle(number) for number in range(cycles))
    return (
        f"{killer.kills} kills in {cycles} cycles ({', '.join(f'{n} {kind}' for kind, n in kinds.items())}), "
        f"{killer.finished_first} runs ended before theirs: complete files stayed complete, all ended in the same bytes"
    )


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
        assert ended.code == 0, ended
        assert (target / MODEL).read_bytes() == wanted, (operation, after)
        shutil.rmtree(target)
    return f"killed before and after each of {operations} file operations: the same bytes every time"
