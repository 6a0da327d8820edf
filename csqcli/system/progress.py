"""What a person sees while training: live bars on a terminal, plain lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from csqcli.errors import printable


class Display:
    """Progress on stderr, so that stdout carries results only."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.quiet = quiet
        self._live: Progress | None = None
        self._target: float | None = None
        self._read_at, self._loss = 0.0, ""

    def say(self, text: str) -> None:
        """One line; names of files and classes cannot steer the terminal."""
        if not self.quiet:
            self.console.print(printable(text), highlight=False, soft_wrap=True, markup=False)

    @contextlib.contextmanager
    def training(
        self, epochs: int, steps_per_epoch: int, *, first_epoch: int = 0, target_bits: float | None = None
    ) -> Iterator[None]:
        """Bars for epochs and steps while the body runs."""
        self._target = target_bits
        if self.quiet or not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as live:
            self._epochs = live.add_task("epochs", total=epochs, completed=first_epoch, numbers="")
            self._steps = live.add_task("steps", total=steps_per_epoch, numbers="")
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def on_step(self, step: int, losses: Sequence[Any]) -> None:
        """After every training step, counted from 1 within its epoch. Reads the last loss a few times a second only."""
        if self._live is None:
            return
        now = time.monotonic()
        if now - self._read_at > 0.5:  # reading a loss waits for the device
            self._read_at, self._loss = now, f"loss {float(losses[-1]):.3f}"
        self._live.update(self._steps, completed=step, numbers=self._loss)

    def on_epoch(self, line: dict[str, Any]) -> None:
        """After every epoch, with its metrics line."""
        self.say(f"epoch {line['epoch']:>3}  {summary(line, self._target)}")
        if self._live is not None:
            bits = f"  bits {line['mean_bits']:.3f}" if "mean_bits" in line else ""
            self._live.update(self._epochs, completed=line["epoch"], numbers=f"top-1 {line['val_top1']:.2f}{bits}")


def summary(line: dict[str, Any], target_bits: float | None) -> str:
    """The numbers of one metrics line, short."""
    parts = [f"loss {line['train_loss']:.4f}", f"top-1 {line['val_top1']:.2f} %"]
    if "mean_bits" in line:
        aim = f" → {target_bits:g}" if target_bits is not None else ""
        parts.append(f"bits {line['mean_bits']:.3f}{aim}")
    if "beta" in line:
        parts.append(f"β {line['beta']:.3g}")
    parts += [f"lr {line['lr']:.3g}", f"{line['images_per_second']:.0f} img/s"]
    return "  ".join(parts)
