"""``--log``: the lines of metrics.jsonl to an experiment tracker too. Each is a well-known package behind the same few lines."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from csqcli.errors import UserError, install

Log = Callable[[Mapping[str, float], int], None]  # numbers by name, and the step
Close = Callable[[], None]
_STEP = "step"


class Trackers:
    """The trackers of a run. Lines that it has seen are not sent twice; a resumed run sends all of its lines again, and each tracker
    overwrites by step.

    Raises:
        UserError: from the constructor, for one whose package is missing or that cannot be opened.
    """

    def __init__(self, names: list[str], folder: Path, recipe: Mapping[str, Any]) -> None:
        self._sent = 0
        self._open = [_opened(name, folder, recipe) for name in names]

    def send(self, history: list[dict[str, Any]]) -> None:
        """Log the lines that came since the last call; a history that became shorter (a rollback) goes on from its end."""
        for line in history[self._sent :]:
            phase = line.get("phase", "search")
            numbers = {
                f"{phase}/{key}": float(value) for key, value in line.items() if _is_number(value) and key != _STEP
            }
            for log, _ in self._open:
                log(numbers, int(line[_STEP]))
        self._sent = len(history)

    def close(self) -> None:
        for _, close in self._open:
            close()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _opened(name: str, folder: Path, recipe: Mapping[str, Any]) -> tuple[Log, Close]:
    try:
        return _OPENERS[name](folder, recipe)
    except ImportError as error:
        what = f"needs the package {error.name or name}"
        raise UserError(what, where=f"--log {name}", hint=install(name)) from None


def _tensorboard(folder: Path, recipe: Mapping[str, Any]) -> tuple[Log, Close]:
    importlib.import_module("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(numbers: Mapping[str, float], step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return log, writer.close


def _trackio(folder: Path, recipe: Mapping[str, Any]) -> tuple[Log, Close]:
    trackio = importlib.import_module("trackio")
    trackio.init(project="csq", name=folder.name, config=dict(recipe), resume="allow")
    return lambda numbers, step: trackio.log(dict(numbers), step=step), trackio.finish


def _mlflow(folder: Path, recipe: Mapping[str, Any]) -> tuple[Log, Close]:
    mlflow = importlib.import_module("mlflow")
    mlflow.set_experiment("csq")
    mlflow.start_run(run_name=folder.name)
    mlflow.log_dict(dict(recipe), "recipe.json")
    return lambda numbers, step: mlflow.log_metrics(dict(numbers), step=step), mlflow.end_run


_OPENERS: dict[str, Callable[[Path, Mapping[str, Any]], tuple[Log, Close]]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
