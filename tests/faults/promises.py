"""One promise per fault: what csq says, what stays whole, and the bytes that --resume ends in."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from csqcli import pipeline
from csqcli.exporting import run as exports
from csqcli.system import files
from csqcli.system.lock import LOCK_FILE
from csqcli.training import deliver
from csqcli.training.loop import Trainer
from tests.faults.hooks import at_step, both, die, dying_between_the_renames, nan_at, told_to_stop
from tests.faults.runs import (
    FINISHED,
    FORMS,
    MODEL,
    SAVES,
    SHORT,
    STATES,
    STEPS,
    Ended,
    Hook,
    Run,
    check_folder,
    csq,
    refused,
)

PLAIN = ("search", *SHORT)
STREAMED = (
    *("search", "plain_models:group_norm_cnn", "--no-pretrained", "--target-bits", "3", "--epochs", "2", "--quiet"),
    *("--set", "input_size=72", "--set", "batch_size=4", "--set", "threads=1"),
)  # images of more than 64 pixels are read again every epoch


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

    def told_to_stop(self, folder: Path) -> str:
        """SIGTERM and Ctrl-C save the step; a second signal that comes while it is saved leaves a whole state all the same."""
        folder.mkdir()
        for one, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
            run = folder / one.name
            ended = csq(*PLAIN, "-o", run, hook=at_step(1, 3, told_to_stop(one)))
            assert (ended.code, ended.err.count("\n")) == (code, 1), ended
            assert ended.err.startswith("csq: stopped and saved ("), ended
            assert "--resume" in ended.err
            state = torch.load(run / STATES[0], weights_only=True)
            assert f"epoch {state['epoch'] + 1}, batch {state['batch']}" in ended.err
            self._goes_on(run)
        for number, (second, gap) in enumerate(((signal.SIGINT, 0.0), (signal.SIGTERM, 0.01))):
            run = folder / str(number)
            twice = told_to_stop(signal.SIGTERM, second, gap=gap)
            ended = csq(*PLAIN, *SAVES, "-o", run, hook=at_step(1, 3, twice))
            assert ended.code in (130, 143), ended
            assert ended.err.count("\n") == 1, ended
            assert ended.err.startswith(("csq: stopped and saved (", "csq: interrupted; ")), ended
            assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]
            assert [name for name in STATES if (run / name).exists()]
            self._goes_on(run, *PLAIN, *SAVES, wanted=self.saving)
        return "one line that says how to go on; --resume ends in the same bytes"

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
        command = (*STREAMED, "--data", images, "--set", "workers=0", "--set", "csq.harden_at=0.9")
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


def _flipped(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)
