"""What a model is worth: top-1 and top-5 counts, and the BatchNorm statistics that they depend on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from csqcli.data.loaders import Loader
from csqcli.errors import FORWARD_ERRORS, UserError, cannot_run
from csqcli.quant.measuring import evaluating, logits_of
from csqcli.quant.norms import tracking_norms
from csqcli.system import distributed


class BrokenScores(UserError):
    """Scores that are NaN or infinite: whichever of them is taken for the largest says nothing."""


@dataclass(frozen=True)
class Accuracy:
    """Correct predictions out of ``samples``; percentages are derived, so shards can be summed first."""

    correct1: int
    correct5: int
    samples: int
    correct1_present: int | None = None  # among the classes present in the data; None where those are all

    @property
    def top1(self) -> float:
        return 100 * self.correct1 / self.samples

    @property
    def top5(self) -> float:
        return 100 * self.correct5 / self.samples

    @property
    def top1_present(self) -> float | None:
        return None if self.correct1_present is None else 100 * self.correct1_present / self.samples


@torch.no_grad()
def check_scores(model: nn.Module, input_size: Sequence[int], num_classes: int | None, *, where: str) -> None:
    """UserError for a model that does not make one score per class (None: anything) of an image. Leaves it in eval mode."""
    model.eval()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        output = model(torch.zeros(1, *input_size, device=device))
        shape = list(logits_of(output).shape)
    except FORWARD_ERRORS as error:
        what = cannot_run(error, input_size)
        hint = "check data.input_size"
        if "channels" in str(error):
            hint = 'a factory says what its model takes: model.data_config = {"input_size": (1, 28, 28)}'
        if "doesn't match model" in str(error):  # timm's, of networks that are built for one size
            own = f"--set 'model.arguments={{img_size: {input_size[-1]}}}'"
            hint = f"leave data.input_size out, or have the model built for it: {own}"
        raise UserError(what, where=where, hint=hint) from error
    if num_classes is not None and shape != [1, num_classes]:
        if len(shape) == 2 and shape[0] == 1:
            several = isinstance(output, (tuple, list, dict)) and len(output) > 1
            if several:
                what, hint = (
                    f"the first of {len(output)} outputs has {shape[1]} scores, not {num_classes}",
                    "let it come first",
                )
            else:
                what = f"has {shape[1]} outputs for {num_classes} classes"
                hint = "its factory must pass num_classes on to the last layer"
            raise UserError(what, where=where, hint=hint)
        hint = "csq trains image classifiers; others with csqcli.CSQ in your own loop"
        raise UserError(
            f"gives outputs of shape {shape} for one image, not {num_classes} scores", where=where, hint=hint
        )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    shared: bool = True,
    present: Sequence[int] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Accuracy:
    """Top-1 and top-5 counts of the model as it stands, in eval mode; each module's own mode comes back.

    BrokenScores where scores are not finite.
    ``shared``: the loader holds this process's share of the images, and counts are summed over processes. ``present``:
    outputs among which a second top-1 is counted, as if the model had no others. ``on_batch`` is told the batches done.
    """
    correct1 = correct5 = samples = among = 0
    finite = torch.ones((), dtype=torch.bool)
    with evaluating(model):
        for batch, (images, labels) in enumerate(loader.epoch(0), 1):
            scores = logits_of(model(images))
            finite = finite.to(scores.device) & scores.isfinite().all()
            ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
            correct1 += int(ranked[:, 0].sum())
            correct5 += int(ranked.sum())
            samples += len(labels)
            if present is not None:
                index = torch.tensor(present, device=scores.device)
                among += int((index[scores[:, index].argmax(dim=1)] == labels).sum())
            if on_batch is not None:
                on_batch(batch)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))  # an engine has none
    if shared:
        counts = (correct1, correct5, samples, among, int(not finite))
        correct1, correct5, samples, among, broken = distributed.sum_counts(counts, device)
    else:
        broken = int(not finite)
    if broken:
        raise BrokenScores(
            "the model's scores are NaN or infinite", hint="its accuracy would mean nothing; check the weights"
        )
    if samples == 0:
        raise UserError("no validation image could be used")
    return Accuracy(correct1, correct5, samples, None if present is None else among)


@torch.no_grad()
def recalibrate_batchnorm(
    model: nn.Module,
    loader: Loader,
    *,
    epoch: int,
    batches: int,
    on_batch: Callable[[int], None] | None = None,
) -> None:
    """Re-estimate BatchNorm means and variances as plain averages over ``batches`` training batches."""
    norms = tracking_norms(model)
    if not norms or batches == 0:
        return
    momenta = [norm.momentum for norm in norms]
    try:
        with evaluating(model):  # dropout and the like stay off
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
                norm.train()
            for batch, (images, _) in enumerate(itertools.islice(loader.epoch(epoch), batches), 1):
                if len(images):  # none of it could be decoded
                    model(images)
                if on_batch is not None:
                    on_batch(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
