"""One loop for search, finetune and every baseline."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from csqcli.data.loaders import Loader, Unavailable, stream_seed
from csqcli.errors import UserError
from csqcli.quant.activations import ActivationQuantizers
from csqcli.quant.measuring import ONE_VALUE, logits_of
from csqcli.quant.optimizer import QuantizedOptimizer
from csqcli.system import distributed
from csqcli.training.evaluate import BrokenScores, evaluate
from csqcli.training.teacher import Teacher

Watch = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None] | None]]


class NonFinite(UserError):
    """The loss, or what is trained, holds NaN or infinite numbers. Nothing of it may be saved."""


def is_finite(state: Any) -> bool:
    """Whether every number of a nested state is finite."""
    if isinstance(state, Tensor):
        return not state.is_floating_point() or bool(torch.isfinite(state).all())
    if isinstance(state, Mapping):
        return all(is_finite(value) for value in state.values())
    if isinstance(state, (list, tuple)):
        return all(is_finite(value) for value in state)
    return not isinstance(state, float) or math.isfinite(state)


@dataclass
class Trainer:
    """Model, optimizer, data and schedule of one phase, run epoch by epoch."""

    model: nn.Module
    optimizer: QuantizedOptimizer
    scheduler: Any  # timm scheduler, stepped per update
    train_loader: Loader
    val_loader: Loader
    epochs: int
    steps_per_epoch: int
    criterion: nn.Module
    clip_grad_norm: float | None = None
    amp: bool = False  # bfloat16 autocast of the forward pass
    micro_batch: int | None = None  # images per forward pass; None takes the batch whole
    channels_last: bool = False  # memory format of the images; the model has it already
    teacher: Teacher | None = None
    mixup: Mixup | None = None  # timm's: labels become distributions
    seed: int = 0  # of mixup
    activations: ActivationQuantizers | None = None  # their scales are trained, but outside the model
    batchnorm_frozen: bool = False  # its statistics are not those of the batch, and do not move
    replica: Any = None  # the data-parallel or compiled wrapper that training calls in place of the model
    watch_evaluation: Watch = lambda name, batches: contextlib.nullcontext(None)  # names it and is told of every batch
    on_step: Callable[[int, int, list[Tensor | float]], None] | None = None  # (epoch, batches done, losses so far)
    evaluated: tuple[int, float] = (-1, 0.0)  # after how many steps last, and the top-1 found

    def run_epoch(self, epoch: int, *, start: int = 0, losses: Sequence[float] = ()) -> dict[str, Any]:
        """Train one epoch, evaluate the weights as they are, and return the metrics line.

        ``start`` and ``losses`` continue an epoch of which so many batches are done.
        """
        self.model.train()
        if self.batchnorm_frozen:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        started, images_seen, lr = time.perf_counter(), 0, self.optimizer.param_groups[0]["lr"]
        seen: list[Tensor | float] = list(losses)
        batches = itertools.islice(self.train_loader.epoch(epoch, start), self.steps_per_epoch - start)
        for batch, (images, labels) in enumerate(batches, start):
            if len(labels) == 0:
                continue
            self.scheduler.step_update(num_updates=epoch * self.steps_per_epoch + batch)
            loss = self._backward(*self._mixed(images, labels, epoch, batch))
            if self.activations is not None:
                distributed.average_gradients(self.activations.parameters())
            if self.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(self._trained(), self.clip_grad_norm)
            lr = self.optimizer.param_groups[0]["lr"]
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.activations is not None:
                self.activations.keep_positive()
            seen.append(loss)
            images_seen += len(labels)
            if self.on_step is not None:
                self.on_step(epoch, batch + 1, seen)
        seconds = time.perf_counter() - started
        step = self.optimizer.step_count
        if not seen:
            raise Unavailable(f"no training image of epoch {epoch + 1} could be used", hint="check the data")
        train_loss = sum(map(float, seen)) / len(seen)
        device = next(self.model.parameters()).device
        if distributed.sum_counts([not math.isfinite(train_loss)], device)[0]:  # the same answer on every process
            became = "non-finite on another process" if math.isfinite(train_loss) else train_loss
            raise NonFinite(f"the loss became {became} in epoch {epoch + 1} (learning rate {lr:.3g})")
        distributed.check_equal(self.optimizer.method.state_dict(), what="the state of the quantized weights")
        try:
            with self.watch_evaluation(f"evaluating after epoch {epoch + 1}", self.val_loader.batches) as tell:
                accuracy = evaluate(self.model, self.val_loader, on_batch=tell)
        except BrokenScores as error:
            raise NonFinite(f"evaluation met NaN or infinite numbers by epoch {epoch + 1}") from error
        self.evaluated = step, accuracy.top1
        return {
            "epoch": epoch + 1,
            "step": step,
            **self.optimizer.method.monitor(step),
            "train_loss": train_loss,
            "val_top1": accuracy.top1,
            "lr": lr,
            "images_per_second": images_seen / seconds,
            "skipped_images": self.train_loader.skipped,
        }

    def _backward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Accumulate the gradients of the batch's mean loss, part by part; that loss, detached. Reads nothing back."""
        if self.channels_last and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        # equal parts: a last one of a single image would have no variance for BatchNorm
        count = self._parts(len(images))
        parts = list(zip(images.tensor_split(count), labels.tensor_split(count), strict=True))
        whole = torch.zeros((), device=images.device)
        for number, (pixels, wanted) in enumerate(parts, 1):
            # the processes exchange gradients once a step, with the last part
            waits = number < len(parts) and hasattr(self.replica, "no_sync")
            with self.replica.no_sync() if waits else contextlib.nullcontext():
                loss = self._loss(pixels, wanted) * (len(pixels) / len(images))
                loss.backward()
            whole += loss.detach()
        return whole

    def _trained(self) -> list[nn.Parameter]:
        """All that gradients reach: the model's parameters and the scales of its activations."""
        scales = [] if self.activations is None else self.activations.parameters()
        return [*self.model.parameters(), *scales]

    def _parts(self, images: int) -> int:
        return -(-images // (self.micro_batch or images))

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        try:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
                scores = logits_of((self.model if self.replica is None else self.replica)(images))
        except ValueError as error:
            if ONE_VALUE not in str(error):
                raise
            hint = "raise data.batch_size or data.micro_batch"
            raise UserError("BatchNorm cannot train on one image at a time", hint=hint) from error
        loss: Tensor = self.criterion(scores.float(), labels)
        return loss if self.teacher is None else self.teacher.loss(images, scores, loss, amp=self.amp)

    def _mixed(self, images: Tensor, labels: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        if self.mixup is None:
            return images, labels
        paired = len(labels) // 2 * 2  # where an image could not be decoded, one is left without another to mix with
        single = mixup_target(labels[paired:], self.mixup.num_classes, smoothing=self.mixup.label_smoothing)
        if not paired:
            return images, single
        state = numpy.random.get_state()  # timm draws from NumPy's global stream
        numpy.random.seed(stream_seed(self.seed, epoch, batch) % 2**32)
        mixed, distributions = self.mixup(images[:paired], labels[:paired])
        numpy.random.set_state(state)
        return torch.cat([mixed, images[paired:]]), torch.cat([distributions, single])
