"""One phase of a run, trained to its end: it goes on from a saved state, saves, stops when told to, and rolls back."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from csqcli.data.loaders import Unavailable
from csqcli.errors import UserError, machine_fault
from csqcli.quant.hard_layer import HardLayer
from csqcli.quant.layers import Layer
from csqcli.recipe.schema import Recipe
from csqcli.system import distributed
from csqcli.system.interrupt import Interrupted, StopRequest
from csqcli.system.run_files import RESUME_FILE
from csqcli.training import sizing
from csqcli.training.loop import NonFinite, Trainer, is_finite
from csqcli.training.run import Run
from csqcli.training.run_state import MAX_ROLLBACKS, RunState
from csqcli.training.setup import make_trainer

Phase = Literal["float", "search", "finetune"]
_ASK_EVERY = 8  # steps after which several processes ask each other whether one was told to stop
log = logging.getLogger(__name__)


def train(
    run: Run, phase: Phase, recipe: Recipe, layers: Sequence[Layer], *, start: Sequence[HardLayer] | None = None
) -> Trainer:
    """Train a phase to its end; from non-finite numbers back to the last state, where the recipe says so."""
    while True:
        trainer = make_trainer(run, _slowed(recipe, run.record.rollbacks), layers, start=start)
        try:
            _Epochs(run, phase, trainer).run_all()
        except NonFinite as error:
            _roll_back(run, error)
        else:
            return trainer


@dataclass
class _Epochs:
    """The epochs of a phase, and what may interrupt them."""

    run: Run
    phase: Phase
    trainer: Trainer
    saved_at: float = field(default_factory=time.monotonic)
    last: tuple[int, int, Sequence[Any]] | None = None  # epoch, batches done and losses after the last step
    steps_done: int = 0  # of the optimizer, then

    def run_all(self) -> None:
        run, trainer = self.run, self.trainer
        first, batch, losses = self._take_up()
        if run.record.history:
            run.folder.write_metrics(run.record.history)  # without what came after the state
        several = run.shard.world > 1  # whose launcher and scheduler may each send the signal
        bars = run.display.training(
            trainer.epochs,
            trainer.steps_per_epoch,
            first_epoch=first,
            first_step=batch,
            later_epochs=run.epochs_after(self.phase),
            target_bits=run.target_bits,
        )
        with StopRequest(patient=several) as self.request, bars:
            trainer.on_step = self._after_step
            for epoch in range(first, trainer.epochs):
                try:
                    line = {"phase": self.phase, **trainer.run_epoch(epoch, start=batch, losses=losses)}
                except Unavailable:
                    if self.last is not None and not self._in_hardening_step():  # raised between two steps
                        self._save(*self.last)
                    raise
                batch, losses, self.last = 0, (), None
                run.record.history.append(line)
                self._save(epoch + 1)
                run.folder.write_metrics(run.record.history)
                run.display.on_epoch(line)

    def _take_up(self) -> tuple[int, int, Sequence[float]]:
        """Epoch, batch and the losses of that epoch so far to begin with: those of the saved state, if there is one."""
        state = self.run.saved
        if state is None:
            if self.run.recipe.optimizer.on_nonfinite == "rollback":
                self._save(0)  # something to roll back to
            return 0, 0, ()
        restore(self.run, self.trainer, state)
        self.run.display.say(f"resumed {self.phase} at epoch {state.epoch + 1}, batch {state.batch + 1}")
        self.run.saved = None
        return state.epoch, state.batch, state.losses

    def _after_step(self, epoch: int, batch: int, losses: Sequence[Any]) -> None:
        run = self.run
        run.display.on_step(batch, losses)
        if run.ships is not None:
            sizing.refit(run, self.trainer)  # before a state is saved: it belongs to this step
        run.tell_planes(self.trainer.optimizer.method)
        self.last, self.steps_done = (epoch, batch, losses), self.trainer.optimizer.step_count
        stop = self.request.signum
        if run.shard.world > 1:  # all stop after the same step
            asks = batch % _ASK_EVERY == 0 or batch == self.trainer.steps_per_epoch
            stop = distributed.all_reduce_max(stop or 0, run.device) or None if asks else None
        optimizer = self.trainer.optimizer
        evaluates = (
            optimizer.step_count + 1 == optimizer.harden_at_step
        )  # the next step does: lost images end it half-way
        if stop is not None or evaluates or time.monotonic() - self.saved_at > 60 * run.recipe.save_every_minutes:
            self._save(epoch, batch, losses)
        if stop is not None:
            distributed.wait_for_all(run.device)  # a launcher may end the others once one has left
            distributed.stop()
            raise Interrupted(stop, f"{self.phase}, epoch {epoch + 1}, batch {batch}")

    def _in_hardening_step(self) -> bool:
        """Whether the last step began to harden and did not end: its weights are those of no saved moment."""
        return self.trainer.optimizer.step_count != self.steps_done

    def _save(self, epoch: int, batch: int = 0, losses: Sequence[Any] = ()) -> None:
        """Save the state after so many epochs and batches. NonFinite instead of a state that holds NaN or infinities."""
        run, cuda = self.run, self.run.device.type == "cuda"
        state = RunState.model_construct(
            inputs=run.folder.inputs,
            phase=self.phase,
            epoch=epoch,
            batch=batch,
            losses=[float(loss) for loss in losses],
            model=run.model.state_dict(),
            optimizer=self.trainer.optimizer.state_dict(),
            activations=run.activations.state_dict() if run.activations is not None else {},
            rng=torch.get_rng_state(),
            device_rng=torch.cuda.get_rng_state(run.device) if cuda else None,
            record=run.record,
        )
        trained = {
            name: value
            for name, value in state.model.items()
            if name not in run.unbounded or not bool(value.isinf().all())
        }
        bad = not all(is_finite(part) for part in (state.losses, trained, state.optimizer, state.activations))
        if batch == 0:  # all processes are here
            bad = distributed.sum_counts([bad], run.device)[0] > 0
        elif bad and run.shard.world > 1:
            return  # the others learn it at the end of the epoch
        if bad:
            raise NonFinite(f"{self.phase} reached NaN or infinite numbers by epoch {epoch + bool(batch)}")
        run.folder.save_state(state)
        self.saved_at = time.monotonic()


def restore(run: Run, trainer: Trainer, state: RunState) -> None:
    """Put a saved state back. UserError for one that this run cannot have saved."""
    where = str(run.folder.path / RESUME_FILE)
    hint = "its folder is untouched: keep it and report this, or pass --force to start over"
    own = run.model.state_dict()
    odd = [name for name in own.keys() ^ state.model.keys()]
    odd += [name for name in own.keys() & state.model.keys() if own[name].shape != state.model[name].shape]
    if odd or state.batch > trainer.steps_per_epoch or state.epoch > trainer.epochs:
        what = f"tensor {sorted(odd)[0]}" if odd else f"epoch {state.epoch + 1}, batch {state.batch}"
        raise UserError(f"does not fit this run ({what})", where=where, hint=hint)
    run.model.load_state_dict(state.model)
    try:  # a state is sealed, so what fails here was either forged below its first level or is a mistake of csq's own
        trainer.optimizer.load_state_dict(state.optimizer)
        if run.activations is not None:
            run.activations.load_state_dict(state.activations)
        torch.set_rng_state(state.rng)
        if run.device.type == "cuda" and state.device_rng is not None:
            torch.cuda.set_rng_state(state.device_rng, run.device)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        if machine_fault(error) is not None:
            raise
        raise UserError(f"does not fit this run ({error})", where=where, hint=hint) from error
    if run.record.accuracy.soft_top1 is not None:
        trainer.optimizer.before_harden = None


def _roll_back(run: Run, error: NonFinite) -> None:
    if run.recipe.optimizer.on_nonfinite == "stop":
        error.hint = (
            "--resume --set optimizer.on_nonfinite=rollback goes on from the last saved state at half the rate; "
            "or start anew with a lower optimizer.lr or with optimizer.clip_grad_norm"
        )
        raise error
    if run.record.rollbacks == MAX_ROLLBACKS:
        error.what += f", after {MAX_ROLLBACKS} rollbacks"
        error.hint = "start anew with a lower optimizer.lr or with optimizer.clip_grad_norm"
        raise error
    state = run.folder.load_state()
    assert state is not None  # a run that may roll back saves before its first step
    state.record.rollbacks += 1
    run.folder.save_state(state)
    run.take(state)
    run.model.load_state_dict(state.model)
    if run.shard.is_main:
        log.warning("%s; back to the last saved state, learning rates × %g", error.what, 0.5**state.record.rollbacks)


def _slowed(recipe: Recipe, rollbacks: int) -> Recipe:
    """The recipe at the learning rates that are left after so many rollbacks."""
    slowed = recipe.model_copy(deep=True)
    slowed.optimizer.lr = slowed.optimizer.peak_lr * 0.5**rollbacks
    return slowed
