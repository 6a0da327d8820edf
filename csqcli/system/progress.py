"""What a person sees while csq works: live bars on a terminal, plain lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import contextlib
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from csqcli.errors import printable

LOG_EVERY = 60.0  # seconds between two lines of a step that goes on, where nothing can be drawn
_GAP = "  "
_REDRAWN_EVERY = 0.5  # seconds; reading a loss waits for the device


def counted(number: int, noun: str) -> str:
    """``1 image``, ``1,297 images``, ``2 classes``."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


class _Pace:
    """Mean seconds of one unit of work. The first unit of a stretch pays for warming up and is not counted."""

    def __init__(self) -> None:
        self.units, self.seconds = 0, 0.0
        self._last: float | None = None

    def begin(self) -> None:
        self._last = None

    def tick(self, now: float) -> None:
        if self._last is not None:
            self.units, self.seconds = self.units + 1, self.seconds + now - self._last
        self._last = now

    @property
    def mean(self) -> float | None:
        return self.seconds / self.units if self.units else None


class _Done(MofNCompleteColumn):
    """``3/20``, and nothing for a step that is not counted."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total is not None else Text()


class Display:
    """Progress on stderr, so that stdout carries results only."""

    def __init__(
        self,
        *,
        quiet: bool = False,
        console: Console | None = None,
        log_every: float = LOG_EVERY,
        names_steps: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``log_every`` seconds a line of the step that goes on, where stderr is no terminal; there, ``names_steps`` also
        names each step when it begins."""
        self.console = console or Console(stderr=True)
        self.quiet, self.log_every, self.names_steps, self.clock = quiet, log_every, names_steps, clock
        self._live: Progress | None = None
        self._in_training = False
        self._target: float | None = None
        self._said_at = self._drawn_at = clock()
        self._training, self._evaluating = _Pace(), _Pace()
        self._left = self._evaluations = self._evaluation_batches = (
            0  # of the run: steps; evaluations, each of so many batches
        )

    def say(self, text: str, *, whole: bool = False) -> None:
        """One line; names of files and classes cannot steer the terminal.

        On a terminal a long one is broken between words; one that is to be copied stays ``whole``.
        """
        if self.quiet:
            return
        self._said_at = self.clock()
        for part in [printable(text)] if whole or self._columns is None else _broken(printable(text), self._columns):
            self.console.print(part, highlight=False, soft_wrap=True, markup=False)

    @property
    def _columns(self) -> int | None:
        """Columns of the terminal; None where there is none, and a line may be of any length."""
        return self.console.width if self.console.is_terminal else None

    @contextlib.contextmanager
    def step(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Name a slow step while the body runs. What it yields is told how many of ``total`` are done."""
        if self.quiet:
            yield lambda done: None
            return
        if not self.console.is_terminal:
            if self.names_steps and not self._in_training:
                self.say(f"{name} …")
            started = self._said_at = self.clock()

            def line(done: int) -> None:
                if self.clock() - self._said_at >= self.log_every:
                    left = (self.clock() - started) / done * (total - done) if total and done else None
                    self.say(f"{name}: {_share(done, total)}{f', {duration(left)} left' if left is not None else ''}")

            yield line
            return
        with self._bars() as live:
            task = live.add_task(name, total=total, numbers="")
            yield lambda done: live.update(task, completed=done)
            live.remove_task(task)

    @contextlib.contextmanager
    def evaluation(self, name: str, batches: int) -> Iterator[Callable[[int], None]]:
        """As :meth:`step`, and its speed is part of the estimate for the whole run."""
        self._evaluating.begin()
        self._evaluation_batches = batches
        with self.step(name, batches) as tell:

            def told(done: int) -> None:
                self._evaluating.tick(self.clock())
                tell(done)

            yield told
        self._evaluations = max(self._evaluations - 1, 0)

    @contextlib.contextmanager
    def _bars(self) -> Iterator[Progress]:
        """The live display: a new one, or that which is there already."""
        if self._live is not None:
            yield self._live
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            _Done(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as self._live:
            try:
                yield self._live
            finally:
                self._live = None

    @contextlib.contextmanager
    def training(
        self,
        epochs: int,
        steps_per_epoch: int,
        *,
        first_epoch: int = 0,
        first_step: int = 0,
        later_epochs: int = 0,
        target_bits: float | None = None,
    ) -> Iterator[None]:
        """Bars for epochs and steps while the body runs, or a line every ``log_every`` seconds.

        ``later_epochs`` are those of the run's further phases; the time left is the whole run's.
        """
        self._target, self._of_epochs, self._of_steps, self._epoch = target_bits, epochs, steps_per_epoch, first_epoch
        epochs_left = epochs - first_epoch + later_epochs
        self._left = epochs_left * steps_per_epoch - first_step
        self._evaluations = epochs_left + 2  # those of the soft and of the delivered model
        self._training.begin()
        self._said_at = self.clock()
        self._in_training = True
        try:
            with self._training_bars(epochs, steps_per_epoch, first_epoch, first_step):
                yield
        finally:
            self._in_training = False

    @contextlib.contextmanager
    def _training_bars(self, epochs: int, steps_per_epoch: int, first_epoch: int, first_step: int) -> Iterator[None]:
        if self.quiet or not self.console.is_terminal:
            yield
            return
        with self._bars() as live:
            self._epochs = live.add_task("epochs", total=epochs, completed=first_epoch, numbers="")
            self._steps = live.add_task("steps", total=steps_per_epoch, completed=first_step, numbers="")
            yield

    def time_left(self) -> float | None:
        """Seconds until the whole run ends, from the steps and evaluations so far; None before there were two steps."""
        if self._training.mean is None:
            return None
        return self._left * self._training.mean + self._evaluations * self._evaluation_batches * (
            self._evaluating.mean or 0.0
        )

    def on_step(self, step: int, losses: Sequence[Any]) -> None:
        """After every training step, counted from 1 within its epoch. Reads the last loss a few times a second at most."""
        now = self.clock()
        self._training.tick(now)
        self._left = max(self._left - 1, 0)
        if self.quiet:
            return
        if self._live is not None:
            if now - self._drawn_at >= _REDRAWN_EVERY:
                self._drawn_at = now
                self._live.update(self._steps, completed=step, numbers=f"loss {float(losses[-1]):.3f}")
                self._live.update(self._epochs, numbers=self._left_text())
        elif now - self._said_at >= self.log_every:
            self.say(
                f"epoch {self._epoch + 1:>3} of {self._of_epochs}, step {step} of {self._of_steps}  "
                f"loss {float(losses[-1]):.4f}  {self._left_text()}"
            )

    def on_epoch(self, line: dict[str, Any]) -> None:
        """After every epoch, with its metrics line."""
        self._epoch = line["epoch"]
        self._training.begin()  # the evaluation is no part of the next step
        left = self._left_text() if self._epoch < self._of_epochs else ""
        parts = [(f"epoch {self._epoch:>3} of {self._of_epochs}", 0), *summary(line, self._target)]
        self.say(fitted([*parts, *([(left, 0)] if left else [])], self._columns))
        if self._live is not None:
            self._live.update(self._epochs, completed=self._epoch)
            self._live.update(self._steps, completed=0)

    def _left_text(self) -> str:
        left = self.time_left()
        return f"about {duration(left)} left" if left is not None else ""


def _share(done: int, total: int | None) -> str:
    return f"{done:,} of {total:,}" if total else f"{done:,}"


def summary(line: dict[str, Any], target_bits: float | None) -> list[tuple[str, int]]:
    """The numbers of one metrics line, short, each with its rank: how early it is left out where columns are few, 0 never."""
    parts = [(f"loss {line['train_loss']:.4f}", 1), (f"top-1 {line['val_top1']:.2f} %", 0)]
    if "mean_bits" in line:
        parts.append((_bits(line["mean_bits"], target_bits), 0))
    return [*parts, (f"lr {line['lr']:.3g}", 3), (f"{line['images_per_second']:.0f} img/s", 2)]


def fitted(parts: Sequence[tuple[str, int]], columns: int | None) -> str:
    """Parts with their ranks, in order, in so many columns: those of the highest rank are left out first."""
    kept = list(parts)
    while columns is not None and len(_GAP.join(text for text, _ in kept)) > columns:
        last = max(kept, key=lambda part: part[1])
        if last[1] == 0:
            break
        kept.remove(last)
    return _GAP.join(text for text, _ in kept)


def _broken(text: str, columns: int) -> list[str]:
    """``text`` in lines of at most so many columns, but for longer words."""
    options = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
    return textwrap.wrap(text, max(columns, 20), subsequent_indent=_GAP, **options) or [""]  # type: ignore[arg-type]


def planes_fixed(planes: Sequence[int], mean_bits: float, target_bits: float | None) -> str:
    """``planes fixed: 12 layers at 3, 1 layer at 5; bits 2.00 of 2``."""
    kinds = [f"{counted(list(planes).count(k), 'layer')} at {k}" for k in sorted(set(planes))]
    return f"planes fixed: {', '.join(kinds)}; {_bits(mean_bits, target_bits)}"


def _bits(mean: float, target: float | None) -> str:
    """``bits 1.99 of 2``; above the target, to which a search comes down in its course, ``bits 8.00, target 2``."""
    if target is None:
        return f"bits {mean:.2f}"
    return f"bits {mean:.2f} of {target:g}" if round(mean, 2) <= target else f"bits {mean:.2f}, target {target:g}"
