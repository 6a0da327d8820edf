"""A run's folder: one run at a time, nothing finished overwritten, nothing ever half-written."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from csqcli.data.splits import DataSet
from csqcli.errors import UserError
from csqcli.recipe.resolve import to_yaml
from csqcli.recipe.schema import SHIPPED_FORMS, Recipe
from csqcli.system import distributed, files
from csqcli.system.device import pick_device
from csqcli.system.interrupt import Signals
from csqcli.system.limits import read_json
from csqcli.system.lock import locked
from csqcli.system.run_files import (
    FLOAT_FILE,
    LATENCY_FILE,
    LATENT_FILE,
    METRICS_FILE,
    MODEL_FILE,
    PREVIOUS_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    RESUME_FILE,
)
from csqcli.training.inputs import Inputs, check_same, inputs_of
from csqcli.training.latencies import Latencies
from csqcli.training.run_state import HISTORY_VALUES, RunState, read_state
from csqcli.training.trackers import Trackers

_REPORT_BYTES = 2**28  # a scale per channel and a line per epoch
log = logging.getLogger(__name__)


class RunFolder:
    """A run's folder: locked, refuses finished runs, keeps the resume state, writes everything atomically, on one process.

    Two generations of the state are kept, each under its SHA-256, so that a damaged one costs time and not the run.
    """

    def __init__(
        self,
        path: Path,
        recipe: Recipe,
        images: DataSet,
        *,
        force: bool,
        resume: bool,
        source: str = "",
        teacher: str = "",
    ) -> None:
        """``source``: hash of a model file that the run starts from; ``teacher``: of float weights that it follows."""
        self.path, self.recipe, self.force, self.resume = path, recipe, force, resume
        self.shard, self.device = distributed.start(pick_device(recipe.device))
        self.inputs = inputs_of(recipe, images, self.shard, source_sha256=source, teacher_sha256=teacher)
        self.states = [path / RESUME_FILE, path / PREVIOUS_FILE]  # newest first
        self.finished: dict[str, Any] | None = None  # the report, when --resume finds this very run complete
        self._held = contextlib.ExitStack()
        self._recipe_written = False
        self._before: set[str] | None = None  # what the run that this one replaces has shipped
        self._trackers: Trackers | None = None

    @property
    def model_file(self) -> Path:
        return self.path / MODEL_FILE

    def shipped_file(self, form: str) -> Path:
        """The file of a budget in bytes, in the form that ships; where `csq export` would write it."""
        return self.model_file.with_name(f"{self.model_file.stem}-{form}.safetensors")

    @property
    def float_file(self) -> Path:
        """The weights that a float phase ended with."""
        return self.path / FLOAT_FILE

    @property
    def latent_file(self) -> Path:
        """What stood behind the rounded weights when a search ended, for others to begin with."""
        return self.path / LATENT_FILE

    def __enter__(self) -> RunFolder:
        if self.shard.is_main:
            with contextlib.ExitStack() as held:
                held.callback(_remove_empty, [self.path, *self.path.parents], kept=_existing(self.path))
                try:
                    self.path.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    what = "is a file" if self.path.is_file() else f"cannot be created ({error.strerror})"
                    raise UserError(what, where=str(self.path), hint="choose another --output") from None
                held.enter_context(locked(self.path))
                self._open()
                if self.recipe.log and self.finished is None:
                    self._trackers = Trackers(list(self.recipe.log), self.path, self.recipe.to_dict())
                    held.callback(self._trackers.close)
                self._held = held.pop_all()
        self.finished = distributed.from_main(self.finished)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:
            Signals.left_state = any(state.exists() for state in self.states)
        self._held.close()

    def _open(self) -> None:
        if self.resume and self.force:
            hint = "pass --resume to go on with the run there, or --force to start over"
            raise UserError("--resume and --force ask for opposite things", where=str(self.path), hint=hint)
        unfinished = any(state.exists() for state in self.states)
        if self.model_file.exists() and not unfinished and not self.force:
            if self.resume:
                self.finished = self._report_of_this_run()
            if self.finished is not None:
                return
            what = "a finished run" if (self.path / REPORT_FILE).exists() else f"a {MODEL_FILE} of no known run"
            hint = "choose another --output or pass --force"
            raise UserError(f"holds {what}", where=str(self.path), hint=hint)
        if unfinished and not (self.force or self.resume):
            hint = "pass --resume to go on, or --force to give its saved state up and start over"
            raise UserError("holds an unfinished run", where=str(self.path), hint=hint)
        if unfinished and self.resume:
            self._read_state()  # before anything is written: it may be another run's
        elif not (
            unfinished or self.force
        ):  # a run's files never stand alone: a state comes first and a model stays last
            for name in (RECIPE_FILE, REPORT_FILE, METRICS_FILE):
                if os.path.lexists(self.path / name):
                    hint = "choose another --output, or pass --force to replace it"
                    raise UserError(f"holds a {name} of no known run", where=str(self.path), hint=hint)
        else:  # a complete model, and what was written with it, stays until the new one takes its place
            for name in (RECIPE_FILE, METRICS_FILE) if unfinished and not self.model_file.exists() else ():
                (self.path / name).unlink(missing_ok=True)
            for state in self.states:
                state.unlink(missing_ok=True)
            self.float_file.unlink(missing_ok=True)
            self.latent_file.unlink(missing_ok=True)
            (self.path / LATENCY_FILE).unlink(missing_ok=True)
        self._before = self._shipped_before()
        for name in (
            *(MODEL_FILE, FLOAT_FILE, LATENT_FILE, LATENCY_FILE),
            *(REPORT_FILE, METRICS_FILE, RECIPE_FILE, RESUME_FILE),
        ):
            for file in files.leftovers(self.path / name):
                file.unlink(missing_ok=True)

    def _shipped_before(self) -> set[str] | None:
        """Names of the files that a finished run in this folder wrote for a budget in bytes; None where there is no such run."""
        try:
            report = read_json(files.read_regular(self.path / REPORT_FILE, limit=_REPORT_BYTES), nodes=HISTORY_VALUES)
            return _shipped_names(report) & {self.shipped_file(form).name for form in SHIPPED_FORMS}
        except (OSError, ValueError, UserError):
            return None

    def _report_of_this_run(self) -> dict[str, Any] | None:
        """The report, where it is one. UserError where it is another run's, or the model is not the one that it is about."""
        try:
            report = read_json(files.read_regular(self.path / REPORT_FILE, limit=_REPORT_BYTES), nodes=HISTORY_VALUES)
            then = Inputs.model_validate(report.get("inputs"))
        except (OSError, ValueError, UserError):
            return None
        check_same(then, self.inputs, where=str(self.path))
        if report.get("model_sha256") != files.sha256(self.model_file):
            what = f"is not the model that this run wrote: its SHA-256 is not that in {REPORT_FILE}"
            raise UserError(what, where=str(self.model_file), hint="put it back, or pass --force to run again")
        return report

    def load_state(self) -> RunState | None:
        """The last saved state, on every process; None when nothing was saved yet. UserError where the run's inputs, as far
        as they are known by now, are not those of its start."""
        state = self._read_state() if self.shard.is_main else None
        return distributed.from_main(state)  # type: ignore[no-any-return]

    def _read_state(self) -> RunState | None:
        damaged: list[Path] = []
        for path in filter(Path.exists, self.states):
            state = read_state(path)
            if state is None:
                damaged.append(path)
                continue
            check_same(state.inputs, self.inputs, where=str(self.path))
            for other in damaged:  # or the next save would move it over this one
                aside = other.with_name(f"{other.name}.damaged")
                other.replace(aside)
                log.warning("%s: is damaged, kept as %s; going on from %s", other, aside.name, path.name)
            return state
        if damaged:
            hint = "no whole state is left; pass --force to start over"
            raise UserError("is damaged", where=" and ".join(map(str, damaged)), hint=hint)
        return None

    def save_state(self, state: RunState) -> None:
        """Keep ``state`` as the newest, on the main process."""
        if self.shard.is_main:
            state.write(*self.states)
            self._write_recipe()

    def _write_recipe(self) -> None:
        """recipe.yaml, once there is something that it belongs to: a start that fails leaves nothing behind."""
        if not self._recipe_written:
            files.write_text(self.path / RECIPE_FILE, to_yaml(self.recipe))
            self._recipe_written = True

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        if self.shard.is_main:
            files.write_text(self.path / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in history))
            if self._trackers is not None:
                self._trackers.send(history)

    def write_latencies(self, latencies: Latencies) -> None:
        """Those that a budget in milliseconds counted with, as `--latency-table` takes them."""
        if self.shard.is_main:
            files.write_text(self.path / LATENCY_FILE, latencies.model_dump_json(indent=1) + "\n")

    def write_report(self, report: dict[str, Any]) -> None:
        if self.shard.is_main:
            self._write_recipe()
            facts = {"model_sha256": files.sha256(self.model_file), "inputs": self.inputs.model_dump(mode="json")}
            content = report | facts
            files.write_text(self.path / REPORT_FILE, json.dumps(content, indent=2) + "\n")
            self._remove_older(report)

    def _remove_older(self, report: dict[str, Any]) -> None:
        """Remove what the run before this one (--force) wrote and this one did not; name what was exported from its model."""
        if not report.get("history"):
            (self.path / METRICS_FILE).unlink(missing_ok=True)
        before, self._before = self._before, None
        if before is None:
            return
        own = _shipped_names(report)
        for file in sorted(self.path.glob(f"{self.model_file.stem}-*")):
            if file.name in own:
                continue
            if file.name in before:
                file.unlink()
            elif file.suffix in (".safetensors", ".onnx", ".tflite"):
                log.warning("%s: was exported from the model that this run replaced; export it again", file)

    def finish(self) -> None:
        """The run is complete: its resume state is no longer needed."""
        if self.shard.is_main:
            for state in reversed(self.states):
                state.unlink(missing_ok=True)
        distributed.stop()


def _shipped_names(report: Any) -> set[str]:
    """Names of the files that a report's budgets are about; a report.json that anybody wrote may hold anything else."""
    budgets = report.get("budgets") if isinstance(report, dict) else None
    names = [budget.get("file") for budget in budgets if isinstance(budget, dict)] if isinstance(budgets, list) else []
    return {name for name in names if isinstance(name, str)}


def _existing(path: Path) -> set[Path]:
    return {folder for folder in (path, *path.parents) if folder.exists()}


def _remove_empty(folders: Iterable[Path], *, kept: set[Path]) -> None:
    """Remove the folders that hold nothing, innermost first, but those that were there before."""
    for folder in folders:
        if folder in kept:
            return
        try:
            folder.rmdir()
        except OSError:  # not empty, or never made
            return
