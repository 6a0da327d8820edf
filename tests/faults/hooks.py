"""What happens to a run while it trains."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import torch

from csqcli.training import run_folder
from csqcli.training.loop import Trainer
from tests.faults.runs import Hook


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


def told_to_stop(
    first: signal.Signals, second: signal.Signals | None = None, *, gap: float = 0.0
) -> Callable[[Trainer], None]:
    """Signals from another process, as Ctrl-C and schedulers send them: one before the next step, one so many seconds later."""

    def action(_: Trainer) -> None:
        run = os.getpid()
        (asked, ask), (sent, send) = os.pipe(), os.pipe()
        if os.fork() == 0:
            os.read(asked, 1)  # until the run is out of fork(), whose handlers no other process would have it run
            os.kill(run, first)
            os.write(send, b".")
            if second is not None:
                time.sleep(gap)
                os.kill(run, second)
            os._exit(0)
        os.write(ask, b".")
        os.read(sent, 1)

    return action


def dying_between_the_renames() -> None:
    """SIGKILL once the last state has become the previous one and no new one is there yet."""
    original = os.replace

    def replace(source: object, target: object) -> None:
        original(source, target)  # type: ignore[arg-type]
        if str(target).endswith(run_folder.PREVIOUS_FILE):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace  # type: ignore[assignment]


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
