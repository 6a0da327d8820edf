"""Runs of a sweep in processes of their own: on this machine, or on others through submitit.

Each is ``csq sweep-run FOLDER KEY``, which reads all it needs from the sweep's folder; the folder must be visible to every machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from csqcli.errors import UserError, install
from csqcli.sweeping.plan import START, Member
from csqcli.system.progress import Display, counted

_POLL_SECONDS = 0.2
_LAST_BYTES = 4096  # of a log, in which its last line is looked for


class Job(Protocol):
    """A command that was started somewhere."""

    def ended(self) -> str | None:
        """None while it runs, "" when it ended well, else what went wrong, in one line."""

    def stop(self) -> None:
        """Ask it to save and end."""

    def wait(self) -> None:
        """Return when it has."""


class Launcher(Protocol):
    """A place where commands run."""

    poll_seconds: float

    def start(self, command: Sequence[str], *, name: str, log: Path, slot: int) -> Job: ...


@dataclass
class _Process:
    process: subprocess.Popen[bytes]
    log: Path

    def ended(self) -> str | None:
        code = self.process.poll()
        if code is None or code == 0:
            return None if code is None else ""
        return last_line(self.log) or f"ended with exit code {code}"

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        self.process.wait()


@dataclass
class LocalProcesses:
    """Processes on this machine, each with its share of the cores, and a GPU of its own where there are several."""

    jobs: int
    poll_seconds: float = _POLL_SECONDS

    def start(self, command: Sequence[str], *, name: str, log: Path, slot: int) -> Job:
        env = os.environ | environment(slot, self.jobs, cores=os.cpu_count() or 1, set_already=os.environ, gpus=_gpus())
        with open(log, "ab") as out:
            # a session of its own: Ctrl-C reaches this process alone, which asks each run to save, once
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
            )
        return _Process(process, log)


def environment(
    slot: int, jobs: int, *, cores: int, set_already: Mapping[str, str], gpus: Sequence[str]
) -> dict[str, str]:
    """Variables of the process in a slot: cores are shared out unless the user did; GPUs go round."""
    found = {} if "OMP_NUM_THREADS" in set_already else {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    if len(gpus) > 1:
        found["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return found


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


@dataclass
class Submitit:
    """Jobs of submitit: on a Slurm cluster, or (for trying out) in processes here, which it calls local."""

    folder: Path  # of its own files
    settings: Mapping[str, Any] = field(default_factory=dict)
    cluster: str = "slurm"
    poll_seconds: float = 5.0

    def __post_init__(self) -> None:
        try:
            import submitit
        except ImportError:
            hint = install("slurm")
            raise UserError("needs the package submitit", where="--launcher slurm", hint=hint) from None
        try:
            self._executor = submitit.AutoExecutor(folder=self.folder, cluster=self.cluster)
            self._executor.update_parameters(**self.settings)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            where = "--launcher-set" if self.settings else "--launcher slurm"
            raise UserError(str(error).strip().partition("\n")[0], where=where) from None
        self._as_function = submitit.helpers.CommandFunction

    def start(self, command: Sequence[str], *, name: str, log: Path, slot: int) -> Job:
        self._executor.update_parameters(name=f"csq-{name}")
        return _Submitted(self._executor.submit(self._as_function(list(command), verbose=False)))


@dataclass
class _Submitted:
    job: Any

    def ended(self) -> str | None:
        if not self.job.done():
            return None
        error = self.job.exception()
        return "" if error is None else (last_line(Path(self.job.paths.stderr)) or str(error).strip().splitlines()[-1])

    def stop(self) -> None:
        self.job.cancel()

    def wait(self) -> None:
        """A cluster ends a job in its own time; whoever goes on meanwhile is told that the run's folder is held."""


def run_elsewhere(
    members: Sequence[Member],
    folder: Path,
    launcher: Launcher,
    *,
    jobs: int,
    display: Display,
    known: Sequence[str] = (),
) -> None:
    """Every run, at most ``jobs`` at a time, each after the one that it begins with; ``known`` are done already.

    After a failure what runs goes on to its end, nothing new that needs it begins, and the first failure is raised as
    UserError. An interruption asks each run to save, and waits for it.
    """
    needs: dict[str, set[str]] = {START: set()}
    needs |= {member.key: {START} | ({member.begins_with} if member.begins_with else set()) for member in members}
    waiting, done, failed = dict(needs), set(known), dict[str, str]()
    running: dict[str, tuple[int, Job]] = {}
    for key in known:
        waiting.pop(key, None)
    said_at = time.monotonic()
    try:
        while waiting or running:
            free = [slot for slot in range(jobs) if slot not in {slot for slot, _ in running.values()}]
            ready = [key for key, wanted in waiting.items() if wanted <= done]
            for key, slot in zip(ready, free, strict=False):
                del waiting[key]
                command = [sys.executable, "-m", "csqcli", "sweep-run", str(folder), key]
                running[key] = slot, launcher.start(command, name=key, log=log_of(folder, key), slot=slot)
                display.say(f"started {key}")
            for key, (_, job) in list(running.items()):
                outcome = job.ended()
                if outcome is None:
                    continue
                del running[key]
                if outcome:
                    failed[key] = outcome
                    display.say(f"failed {key}: {outcome}")
                else:
                    done.add(key)
                    display.say(f"finished {key}, {len(done)} of {len(needs)}")
            if not running and not any(wanted <= done for wanted in waiting.values()):
                break  # what is left waits for one that failed
            if time.monotonic() - said_at >= display.log_every:
                said_at = time.monotonic()
                for key in running:
                    display.say(f"{key}: {last_line(log_of(folder, key)) or 'begins'}")
            time.sleep(launcher.poll_seconds)
    except KeyboardInterrupt:
        display.say(f"{counted(len(running), 'run')} asked to save and stop")
        for _, job in running.values():
            job.stop()
        for _, job in running.values():
            job.wait()
        raise
    if failed:
        key, line = next(iter(failed.items()))
        what = line.removeprefix("csq: error: ")
        raise UserError(f"{counted(len(failed), 'run')} failed: {what}", where=key, hint="the same command goes on")


def log_of(folder: Path, key: str) -> Path:
    """Where a run in a process of its own writes what it says."""
    return folder / f"{key}.log"


def last_line(path: Path) -> str:
    """The last line of a log; empty where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _LAST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
