"""One loop for search, finetune and every yardstick."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csqcli.data import Loader, stream_seed
from csqcli.errors import UserError
from csqcli.quant.optimizer import QuantizedOptimizer


@dataclass(frozen=True)
class Accuracy:
    """Correct predictions out of ``samples``; percentages are derived, so shards can be summed first."""

    correct1: int
    correct5: int
    samples: int

    @property
    def top1(self) -> float:
        return 100 * self.correct1 / self.samples

    @property
    def top5(self) -> float:
        return 100 * self.correct5 / self.samples


def logits_of(output: Any) -> Tensor:
    """The class scores of a model's output: a tensor, or the first entry of the tuple or dict that it returns."""
    while not isinstance(output, Tensor):
        if isinstance(output, dict):
            output = output["out"] if "out" in output else next(iter(output.values()))
        else:
            output = output[0]
    return output


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, *, on_batch: Callable[[int], None] | None = None) -> Accuracy:
    """Top-1 and top-5 counts of the model as it stands, in eval mode; the mode it was in comes back."""
    was_training = model.training
    model.eval()
    correct1 = correct5 = samples = 0
    for number, (images, labels) in enumerate(loader.epoch(0), 1):
        scores = logits_of(model(images))
        ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
        correct1 += int(ranked[:, 0].sum())
        correct5 += int(ranked.sum())
        samples += len(labels)
        if on_batch is not None:
            on_batch(number)
    model.train(was_training)
    if samples == 0:
        raise UserError("no validation image could be used")
    return Accuracy(correct1, correct5, samples)


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, loader: Loader, *, epoch: int, batches: int) -> None:
    """Re-estimate BatchNorm means and variances as plain averages over ``batches`` training batches."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms or batches == 0:
        return
    momenta = [norm.momentum for norm in norms]
    was_training = model.training
    model.eval()  # dropout and the like stay off
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    for images, _ in itertools.islice(loader.epoch(epoch), batches):
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(was_training)


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
    teacher: nn.Module | None = None  # the float model, in eval mode
    distill: float = 0.0  # share of the loss that follows the teacher
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None  # timm's Mixup: labels become distributions
    seed: int = 0  # of mixup
    on_step: Callable[[int, int, dict[str, float]], None] | None = None  # (epoch, step in epoch, numbers)

    def run_epoch(self, epoch: int) -> dict[str, Any]:
        """Train one epoch, evaluate the weights as they are, and return the metrics line."""
        self.model.train()
        started, images_seen = time.perf_counter(), 0
        losses: list[Tensor] = []
        for batch, (images, labels) in enumerate(self._batches(epoch)):
            self.scheduler.step_update(num_updates=epoch * self.steps_per_epoch + batch)
            loss = self._loss(*self._mixed(images, labels, epoch, batch))
            loss.backward()
            if self.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
            lr = self.optimizer.param_groups[0]["lr"]
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
            images_seen += len(labels)
            if self.on_step is not None:
                self.on_step(epoch, batch + 1, {"loss": float(losses[-1])})
        seconds = time.perf_counter() - started
        step = self.optimizer.step_count
        train_loss = float(torch.stack(losses).mean()) if losses else math.nan
        if not math.isfinite(train_loss):
            hint = f"lower optimizer.lr (now {lr:.3g}) or set optimizer.clip_grad_norm; nothing was written"
            raise UserError(f"the loss became {train_loss} in epoch {epoch + 1}", hint=hint)
        accuracy = evaluate(self.model, self.val_loader)
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

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            scores = logits_of(self.model(images))
        loss: Tensor = self.criterion(scores.float(), labels)
        if self.teacher is None:
            return loss
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            wanted = logits_of(self.teacher(images))
        following = F.kl_div(
            F.log_softmax(scores.float(), dim=1),
            F.log_softmax(wanted.float(), dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - self.distill) * loss + self.distill * following

    def _mixed(self, images: Tensor, labels: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        if self.mixup is None or len(labels) % 2:
            return images, labels
        state = numpy.random.get_state()  # timm draws from NumPy's global stream
        numpy.random.seed(stream_seed(self.seed, epoch, batch) % 2**32)
        mixed = self.mixup(images, labels)
        numpy.random.set_state(state)
        return mixed

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.islice(self.train_loader.epoch(epoch), self.steps_per_epoch)
