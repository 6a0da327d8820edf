"""Faults done to csq on purpose, and what must still be true afterwards.

``python -m tests.faults --cycles 50 --seed 0`` (about 2 minutes on two cores) runs all of them; ``--every-operation``
kills a search before and after each of its file operations in turn. tests/test_faults.py runs a few of each.

Every run is a fork of this process, which has imported everything: a cycle takes half a second instead of six.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from csqcli import pipeline
from csqcli.cli import app as cli
from csqcli.exporting import run as exports  # imported here, so that no fork has to
from csqcli.file import header
from csqcli.file import io as file_io
from csqcli.system import files
from csqcli.system.lock import LOCK_FILE
from csqcli.training import deliver, run_folder
from csqcli.training.loop import Trainer

sys.path.insert(0, str(Path(__file__).parent))  # plain_models

Hook = Callable[[], None]
MODEL, STATES = run_folder.MODEL_FILE, (run_folder.RESUME_FILE, run_folder.PREVIOUS_FILE)
SHORT = ("--recipe", "digits", "--target-bits", "1.5", "--epochs", "3", "--quiet")
SAVES = ("--set", "save_every_minutes=0.0003")  # every 18 ms, so that kills fall into saves too
SEARCH = ("search", *SHORT, *SAVES, "--finetune-epochs", "2")
PLAIN = ("search", *SHORT)
STEPS = 20  # per epoch of the digits recipe
STREAMED = (
    *("search", "plain_models:group_norm_cnn", "--no-pretrained", "--target-bits", "3", "--epochs", "2", "--quiet"),
    *("--set", "input_size=72", "--set", "batch_size=4", "--set", "threads=1"),
)  # images of more than 64 pixels are read again every epoch
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
        return ("finetune", self.source, "--data", "digits", "--epochs", 3, "--quiet", *SAVES)

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


def at_step(epoch: int, batch: int, action: Callable[[Trainer], None]) -> Hook:
    """``action`` right after that training step (both counted from 0 and 1, as the saved states do)."""

    def hook() -> None:
        original = Trainer.run_epoch

        def run_epoch(self: Trainer, number: int, **more: object) -> dict[str, object]:
            on_step = self.on_step
            assert on_step is not None

            def then(at: int, done: int, losses: object) -> None:
                on_step(at, done, losses)
                if (at, done) == (epoch, batch):
                    action(self)

            self.on_step = then
            try:
                return original(self, number, **more)  # type: ignore[arg-type]
            finally:
                self.on_step = on_step

        Trainer.run_epoch = run_epoch  # type: ignore[method-assign, assignment]

    return hook


def die(_: Trainer) -> None:
    """What the out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def dying_between_the_renames() -> None:
    """SIGKILL once the last state has become the previous one and no new one is there yet."""
    original = os.replace

    def replace(source: object, target: object) -> None:
        original(source, target)  # type: ignore[arg-type]
        if str(target).endswith(run_folder.PREVIOUS_FILE):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace  # type: ignore[assignment]


class Faults:
    """One fault each: what csq says, what stays whole, and that --resume ends in the unbroken run's bytes."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.wanted = self._unbroken("unbroken", *PLAIN)

    def _unbroken(self, name: str, *command: object, hook: Hook | None = None) -> bytes:
        ended = csq(*command, "-o", self.work / name, hook=hook)
        assert ended.code == 0, ended
        return (self.work / name / MODEL).read_bytes()

    def _goes_on(self, folder: Path, *command: object, wanted: bytes | None = None, hook: Hook | None = None) -> Ended:
        """--resume ends in the bytes of the unbroken run, and leaves nothing behind."""
        check_folder(folder)
        ended = csq(*(command or PLAIN), "-o", folder, "--resume", hook=hook)
        assert ended.code == 0, ended
        assert (folder / MODEL).read_bytes() == (wanted or self.wanted)
        assert sorted(path.name for path in folder.iterdir()) == FINISHED
        return ended

    def file_size_limit(self, folder: Path) -> str:
        """Every write beyond 8 kB fails: of a state, of the model, of an export."""

        def limit(_: object = None) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))

        refused(csq(*PLAIN, "-o", folder, hook=at_step(1, 3, limit)), "resume.pt: cannot be written (File too large)")
        assert (folder / STATES[0]).exists()
        self._goes_on(folder)
        before = (folder / MODEL).read_bytes()
        last = at_step(2, STEPS, lambda _: setattr(deliver, "recalibrate_batchnorm", lambda *a, **k: limit()))
        refused(csq(*PLAIN, "-o", folder, "--force", hook=last), f"{MODEL}", "cannot be written")
        assert (folder / MODEL).read_bytes() == before
        self._goes_on(folder)
        for form in FORMS:
            output = folder.with_suffix(".safetensors")
            refused(csq("export", folder / MODEL, f"--{form}", "-o", output, hook=limit), "cannot be written")
            assert not [path for path in folder.parent.iterdir() if path.name.endswith((".safetensors", ".tmp"))]
        return "the last good state, model and export stay; --resume ends in the same bytes"

    def disk_full(self, folder: Path) -> str:
        """A real full disk, then a read-only one, where mounting is allowed."""
        folder.mkdir()
        if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "csq", folder]).returncode:
            return "not run: mounting is not allowed here; file_size_limit stands for it"
        try:
            run = folder / "run"

            def fill(_: Trainer) -> None:
                free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
                (folder / "ballast").write_bytes(bytes(free - 8192))

            refused(csq(*PLAIN, "-o", run, hook=at_step(1, 3, fill)), "resume.pt", "No space left on device")
            check_folder(run)
            refused(csq(*PLAIN, "-o", run, "--resume"), "No space left on device")
            export = ("export", self.work / "unbroken" / MODEL, "--int8-packed", "-o", folder / "x.safetensors")
            refused(csq(*export), "cannot be written", "No space left on device")
            (folder / "ballast").unlink()
            self._goes_on(run)
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
            refused(csq(*PLAIN, "-o", run, "--force"), "cannot be written (Read-only file system)")
            refused(csq(*PLAIN, "-o", folder / "other"), "cannot be created (Read-only file system)")
            refused(csq(*export), "Read-only file system")
            assert (run / MODEL).read_bytes() == self.wanted
        finally:
            subprocess.run(["umount", folder], check=True)
        return "No space left on device, Read-only file system: one line, states and models whole, --resume goes on"

    def read_only_output(self, folder: Path) -> str:
        shutil.copytree(self.work / "unbroken", folder)
        folder.chmod(0o555)

        def nobody() -> None:  # root may write anywhere; and only nobody's part of Python is readable to nobody
            for module, name in ((pipeline, "search"), (exports, "export_file")):
                original = getattr(module, name)
                setattr(module, name, lambda *a, _o=original, **k: (os.geteuid() or os.setuid(65534), _o(*a, **k))[1])

        export = ("export", folder / MODEL, "--bit-packed")
        refused(csq(*PLAIN, "-o", folder, "--force", hook=nobody), "cannot be written (Permission denied)")
        refused(csq(*PLAIN, "-o", folder / "inside", hook=nobody), "cannot be created (Permission denied)")
        refused(csq(*export, hook=nobody), "Permission denied")
        folder.chmod(0o755)
        assert sorted(path.name for path in folder.iterdir()) == FINISHED
        return "one line; nothing in the folder changed"

    def two_runs(self, folder: Path) -> str:
        gate = folder.with_suffix(".gate")

        def wait(_: Trainer) -> None:
            while not gate.exists():
                time.sleep(0.01)

        first = Run(*PLAIN, "-o", folder, hook=at_step(1, 3, wait))
        while not (folder / STATES[0]).exists():
            time.sleep(0.01)
        for how in ("--resume", "--force"):
            refused(csq(*PLAIN, "-o", folder, how), f"another run is writing here (pid {first.pid} on ")
        gate.touch()
        assert first.wait().code == 0
        assert (folder / MODEL).read_bytes() == self.wanted
        assert sorted(path.name for path in folder.iterdir()) == FINISHED
        assert csq(*PLAIN, "-o", folder, "--force", hook=at_step(1, 3, die)).code == -signal.SIGKILL
        assert (folder / LOCK_FILE).exists()  # but nobody holds it
        self._goes_on(folder)
        return "the second is told the pid of the first; a killed holder's lock is free"

    def damaged_state(self, folder: Path) -> str:
        def killed(name: str) -> list[Path]:
            target = folder / name
            assert csq(*PLAIN, *SAVES, "-o", target, hook=at_step(2, 5, die)).code == -signal.SIGKILL
            return [target / state for state in STATES]

        damages: dict[str, Callable[[Path], object]] = {
            "one flipped bit": lambda path: path.write_bytes(_flipped(path.read_bytes())),
            "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
            "emptied": lambda path: os.truncate(path, 0),
            "text": lambda path: path.write_text("no state"),
        }
        for name, damage in damages.items():
            newest, previous = killed(name)
            damage(newest)
            assert not files.is_intact(newest)
            said = self._damaged_goes_on(newest.parent)
            assert newest.with_name(f"{newest.name}.damaged").exists()
            assert f"{newest}: is damaged, kept as {newest.name}.damaged; going on from {previous.name}" in said
        newest, previous = killed("newest lost")
        newest.unlink()
        assert "damaged" not in self._damaged_goes_on(newest.parent)
        newest, previous = killed("damaged and killed")
        damages["emptied"](newest)
        again = csq(*PLAIN, *SAVES, "-o", newest.parent, "--resume", hook=dying_between_the_renames)
        assert again.code == -signal.SIGKILL
        assert previous.exists()
        self._damaged_goes_on(newest.parent)
        newest, previous = killed("both")
        for path in (newest, previous):
            damages["one flipped bit"](path)
        refused(csq(*PLAIN, *SAVES, "-o", newest.parent, "--resume"), "is damaged", "pass --force to start over")
        assert all(path.exists() for path in (newest, previous))
        newest, _ = killed("other settings")
        refused(csq(*PLAIN, *SAVES, "-o", newest.parent, "--resume", "--seed", 1), "was started with other settings")
        self._goes_on(newest.parent, *PLAIN, *SAVES, wanted=self.saving)
        return f"{', '.join(damages)}: the previous state takes over and ends in the same bytes; both: --force is asked for"

    @functools.cached_property
    def saving(self) -> bytes:
        """As ``wanted``, of a run that saves all the time (the recipe in the file says so)."""
        return self._unbroken("saving", *PLAIN, *SAVES)

    def _damaged_goes_on(self, folder: Path) -> str:
        ended = csq(*PLAIN, *SAVES, "-o", folder, "--resume")
        assert ended.code == 0, ended
        assert (folder / MODEL).read_bytes() == self.saving
        kept = {f"{name}.damaged" for name in STATES}  # never deleted
        assert sorted({path.name for path in folder.iterdir()} - kept) == FINISHED
        return ended.err

    def vanished_images(self, folder: Path) -> str:
        images, run = self._images(folder), folder / "run"
        command = (*STREAMED, "--data", images, "--set", "workers=0")
        wanted = self._unbroken(f"{folder.name}/whole", *command)
        for number, (split, words) in enumerate((("train", "training images cannot be read"), ("val", "cannot be"))):
            away = images / f"{split}.away"
            run = folder / f"run{number}"
            ended = csq(*command, "-o", run, hook=at_step(1, 3, lambda _, s=split, a=away: (images / s).rename(a)))
            refused(ended, words)
            away.rename(images / split)
            state = torch.load(run / STATES[0], weights_only=True)
            hardens = 10  # of the second epoch: the step that evaluates, and half of a step is never saved
            assert (state["epoch"], state["batch"]) == (1, 3 if split == "train" else hardens - 1)
            self._goes_on(run, *command, wanted=wanted)
        refused(csq(*STREAMED, "--data", images / "nothing", "-o", folder / "none"), "no such file or folder")
        return (
            "training stops at the lost batch, evaluation before its step; both saved, --resume ends in the same bytes"
        )

    def dead_worker(self, folder: Path) -> str:
        images = self._images(folder)
        command = (*STREAMED, "--data", images, "--set", "workers=1")
        wanted = self._unbroken(f"{folder.name}/whole", *command)

        def kill(which: Callable[[set[int]], set[int]]) -> Callable[[Trainer], None]:
            def act(_: Trainer) -> None:
                for pid in which({process.pid or 0 for process in multiprocessing.active_children()}):
                    os.kill(pid, signal.SIGKILL)

            return act

        def training(pids: set[int]) -> set[int]:
            return {max(pids)}

        def validation(pids: set[int]) -> set[int]:  # started first
            return {min(pids)}

        for epoch, batch, which, saved in (
            (1, 3, set, 3),  # both at once
            (1, 3, training, 3),
            (0, 12, training, 0),  # nothing left to do in this epoch: missed in the next
            (1, 12, validation, 12),  # missed in the evaluation
        ):
            run = folder / f"{epoch}, {batch}, {which.__name__}"
            ended = csq(*command, "-o", run, hook=at_step(epoch, batch, kill(which)))
            refused(ended, "a loader process died", "lower data.workers, then --resume")
            state = torch.load(run / STATES[0], weights_only=True)
            assert (state["epoch"], state["batch"] >= saved) == (1, True), (state["epoch"], state["batch"])
            self._goes_on(run, *command, wanted=wanted)
        return "one line that names data.workers, the last step saved; --resume ends in the same bytes"

    def _images(self, folder: Path) -> Path:
        rng = np.random.default_rng(0)
        for split, count in (("train", 24), ("val", 3)):
            for label in ("a", "b"):
                (folder / "images" / split / label).mkdir(parents=True)
                for number in range(count):
                    pixels = rng.integers(0, 255, (80, 80)).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / "images" / split / label / f"{number}.png")
        return folder / "images"

    def nan_loss(self, folder: Path) -> str:
        folder.mkdir()
        for name, words in (
            ("loss", "the loss became nan in epoch 2"),
            ("weight", "NaN or infinite numbers by epoch 2"),
        ):
            run = folder / name
            refused(
                csq(*PLAIN, "-o", run, hook=nan_at(1, 3 if name == "loss" else STEPS, what=name)), words, "rollback"
            )
            assert not (run / MODEL).exists()
            self._goes_on(run)
        rollback = (*PLAIN, "--set", "optimizer.on_nonfinite=rollback")
        once = nan_at(1, 3, above_lr=0.03)
        wanted = self._unbroken(f"{folder.name}/rolled", *rollback, hook=once)
        assert wanted != self.wanted
        assert csq(*rollback, "-o", folder / "killed", hook=both(once, at_step(2, 3, die))).code == -signal.SIGKILL
        self._goes_on(folder / "killed", *rollback, wanted=wanted, hook=once)
        for first in (0, 1):
            refused(csq(*rollback, "-o", folder / f"always{first}", hook=nan_at(first, 3)), "after 3 rollbacks")
            assert not (folder / f"always{first}" / MODEL).exists()
            check_folder(folder / f"always{first}")
        stopped = folder / "stopped"
        refused(csq(*PLAIN, "-o", stopped, hook=once), "--resume --set optimizer.on_nonfinite=rollback")
        assert csq(*rollback, "-o", stopped, "--resume", hook=once).code == 0
        assert (stopped / MODEL).read_bytes() == wanted
        return (
            "stop, or back to the last state at half the rate, thrice at most; killed after a rollback: the same bytes"
        )

    def out_of_memory(self, folder: Path) -> str:
        def cuda(_: Trainer) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        asks: list[Callable[[Trainer], object]] = [lambda _: torch.empty(1 << 58), lambda _: bytearray(1 << 60), cuda]
        for number, ask in enumerate(asks):
            run = folder / str(number)
            refused(
                csq(*PLAIN, "-o", run, hook=at_step(1, 3, ask)), "out of memory; free some, or lower data.batch_size"
            )
            self._goes_on(run)
        return "torch's, Python's and CUDA's are one line; --resume ends in the same bytes"

    def clock_jumps(self, folder: Path) -> str:
        def hook() -> None:
            jumps = itertools.cycle((1e9, -1e9, 0.0, 4e9, 1.0))
            time.time = lambda: next(jumps)  # type: ignore[assignment]
            time.time_ns = lambda: int(1e9 * next(jumps))

        assert self._unbroken(folder.name, *PLAIN, hook=hook) == self.wanted
        return "time.time may go where it likes: the same bytes"


FAULTS = [name for name, value in vars(Faults).items() if callable(value) and not name.startswith("_")]


def both(*hooks: Hook) -> Hook:
    return lambda: [hook() for hook in hooks] and None  # type: ignore[func-returns-value, return-value]


def nan_at(epoch: int, batch: int, *, what: str = "loss", above_lr: float = 0.0) -> Hook:
    """A NaN loss at that step (from 1), or a NaN weight after it, while the peak learning rate is above a limit."""

    def poison(trainer: Trainer) -> None:
        if trainer.optimizer.base.defaults["lr"] > above_lr:
            trainer.optimizer.method.state_dict()["latents"][0].view(-1)[0] = torch.nan

    if what == "weight":
        return at_step(epoch, batch, poison)

    def hook() -> None:
        original = Trainer._loss

        def loss(self: Trainer, *arguments: torch.Tensor) -> torch.Tensor:
            found = original(self, *arguments)
            here = self.optimizer.step_count == epoch * self.steps_per_epoch + batch - 1
            return found * torch.nan if here and self.optimizer.base.defaults["lr"] > above_lr else found

        Trainer._loss = loss  # type: ignore[method-assign, assignment]

    return hook


def _flipped(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def main() -> None:
    """Run everything; a line for each, exit code 1 when a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=50, help="kill cycles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=FAULTS, default=FAULTS, help="these other faults")
    parser.add_argument("--every-operation", action="store_true", help="also kill at each file operation in turn")
    parser.add_argument("--json", type=Path, help="write {fault: traceback or nothing} here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    outcome: dict[str, str] = {}

    def run(name: str, fault: Callable[[], str]) -> None:
        outcome[name] = ""
        try:
            print(f"ok      {name}: {fault()}", flush=True)
        except Exception:
            outcome[name] = traceback.format_exc()
            print(f"FAILED  {name}: {outcome[name]}", flush=True)

    with tempfile.TemporaryDirectory(prefix="csq-faults-") as folder:
        work = Path(folder)
        work.chmod(0o755)  # read_only_output runs as nobody
        if options.cycles:
            run("kill -9", lambda: kill_cycles(work / "kills", options.cycles, options.seed))
        if options.every_operation:
            run("kill -9 at every file operation", lambda: every_operation(work / "operations"))
        if options.only:
            (work / "faults").mkdir()
            faults = Faults(work / "faults")
            for name in options.only:
                run(name, lambda name=name: getattr(faults, name)(work / "faults" / name))  # type: ignore[misc]
    print(f"{time.perf_counter() - started:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(outcome))
    sys.exit(any(outcome.values()))


if __name__ == "__main__":
    main()
