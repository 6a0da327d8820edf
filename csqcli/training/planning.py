"""What a run will take and come to, from a few of its own steps: bytes on disk, memory and time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csqcli.file import io
from csqcli.quant.layers import Layer
from csqcli.quant.measuring import logits_of
from csqcli.recipe.schema import Recipe
from csqcli.system import memory
from csqcli.training.deliver import assembled
from csqcli.training.loop import Trainer
from csqcli.training.run import Run
from csqcli.training.setup import make_trainer, method_card, step_memory

TIMED_STEPS = 6
_LEFT_OUT = 2  # first steps, which pay for allocations, workers and compilation
_EVALUATED_BATCHES = 2
_EVALUATIONS = 2  # besides one an epoch: the float model, and the file read back


class _Enough(Exception):
    """Ends the steps that are timed."""


@dataclass(frozen=True)
class Forecast:
    """What a few steps of a run, and the file that they would end in, say about all of it."""

    layers: list[dict[str, Any]]  # name, shape, weights, macs, and the planes that were found by now
    mean_bits: float
    model_bytes: int  # of model.safetensors
    memory_bytes: int  # weights, and a training step on `images_per_step`
    free_bytes: int | None
    images_per_step: int
    step_seconds: float
    steps: int  # of all phases
    evaluation_seconds: float  # of all validation images
    evaluations: int

    @property
    def seconds(self) -> float:
        """The whole run's training and evaluations."""
        return self.steps * self.step_seconds + self.evaluations * self.evaluation_seconds

    def described(self, recipe: Recipe) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "recipe": recipe.to_dict(),
            "method_why": recipe.method_why,
            "layers": self.layers,
            "target_mean_bits": recipe.quantization.target_bits,
            "mean_bits": self.mean_bits,
            "memory": {"bytes": self.memory_bytes, "free_bytes": self.free_bytes, "images": self.images_per_step},
            "time": {
                "step_seconds": self.step_seconds,
                "steps": self.steps,
                "evaluation_seconds": self.evaluation_seconds,
                "evaluations": self.evaluations,
                "seconds": self.seconds,
            },
        }


def try_out(run: Run, layers: Sequence[Layer], left_float: list[dict[str, Any]]) -> Forecast:
    """Train some steps, harden, and write the run folder's model file. The run's model is used up by that.

    The integers' entropy is that of the weights as they came, rounded at the planes that their importance earns by then;
    training moves it by a few percent.
    """
    recipe = run.recipe
    trainer = make_trainer(run, recipe, layers)
    trainer.optimizer.before_harden = None  # which evaluates
    with run.display.step(f"timing {TIMED_STEPS} steps", TIMED_STEPS) as tell:
        step_seconds = _timed_steps(trainer, tell)
    with run.display.step("timing an evaluation"):
        evaluation_seconds = _timed_evaluation(run)
    with run.display.step("predicting the file"):
        trainer.optimizer.harden()
        hard = trainer.optimizer.hard_layers()
        file = assembled(run, hard, left_float)
        io.write(run.folder.model_file, file)
    card = method_card(recipe, layers, None)
    images = run.record.step_images or recipe.data.batch_size
    step = step_memory(run, recipe, card, amp=trainer.amp)
    model_bytes = sum(value.numel() * value.element_size() for value in run.model.state_dict().values())
    epochs = recipe.adaptation.epochs + recipe.epochs + (recipe.finetune.epochs if layers else 0)
    hardens_midway = trainer.optimizer.harden_at_step is not None  # where the soft model is evaluated, too
    macs = run.operations.macs if run.operations is not None else {}
    return Forecast(
        layers=[
            {
                "name": layer.name,
                "shape": list(layer.integers.shape),
                "weights": layer.integers.numel(),
                "macs": macs.get(layer.name),
                "planes": layer.planes,
            }
            for layer in hard
        ],
        mean_bits=file.manifest.budget.mean_bits,
        model_bytes=run.folder.model_file.stat().st_size,
        memory_bytes=model_bytes + step.of(images),
        free_bytes=memory.free_bytes(run.device),
        images_per_step=images,
        step_seconds=step_seconds,
        steps=epochs * trainer.steps_per_epoch,
        evaluation_seconds=evaluation_seconds,
        evaluations=epochs + _EVALUATIONS + hardens_midway,
    )


def _timed_steps(trainer: Trainer, tell: Any) -> float:
    """The median of the steps' seconds, loading included."""
    moments = [time.perf_counter()]

    def clock(epoch: int, batch: int, losses: Sequence[Tensor | float]) -> None:
        float(losses[-1])  # waits for the device
        moments.append(time.perf_counter())
        tell(len(moments) - 1)
        if len(moments) > TIMED_STEPS:
            raise _Enough

    trainer.on_step = clock
    first = trainer.train_loader.batches
    try:
        for epoch in range(min(trainer.epochs, -(-TIMED_STEPS // max(first, 1)))):
            trainer.run_epoch(epoch)
    except _Enough:
        pass
    seconds = [after - before for before, after in itertools.pairwise(moments)]
    return statistics.median(seconds[_LEFT_OUT:] or seconds)


@torch.no_grad()
def _timed_evaluation(run: Run) -> float:
    """Seconds for all validation images, from the last of the first batches."""
    run.model.eval()
    loader = run.val_loader
    moments = [time.perf_counter()]
    for images, _ in itertools.islice(loader.epoch(0), _EVALUATED_BATCHES):
        logits_of(run.model(images)).sum().item()
        moments.append(time.perf_counter())
    return (moments[-1] - moments[-2]) * loader.batches if len(moments) > 1 else 0.0
