"""From a trained model to the file that is delivered: written, read back, evaluated, and only then published."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from csqcli.file import io
from csqcli.file.io import QuantizedFile
from csqcli.file.loading import activation_entries, hard_model
from csqcli.reporting.build import build as build_report
from csqcli.system import distributed
from csqcli.training.evaluate import evaluate, logits_of, recalibrate_batchnorm
from csqcli.training.loop import Trainer
from csqcli.training.run import Run, environment
from csqcli.training.run_folder import MODEL_FILE


def deliver(
    run: Run, trainer: Trainer, left_float: list[dict[str, Any]], *, at_least: float = 0.0
) -> tuple[QuantizedFile, float]:
    """Harden, let BatchNorm settle, write, read back, and record the accuracy of what was read back.

    A model below a top-1 of ``at_least`` percent replaces no file, so that a kill here leaves the better one.
    Returns what was written and the largest logit difference between the model in memory and the one read back.
    """
    recipe, accuracy = run.recipe, run.record.accuracy
    trainer.optimizer.harden()
    if trainer.optimizer.method.layers:
        batches = recipe.bn_recalibration_batches
        recalibrate_batchnorm(run.model, run.train_loader, epoch=trainer.epochs, batches=batches)
        distributed.copy_from_main(run.model.buffers())
    layers = trainer.optimizer.hard_layers()
    run.model.eval()

    file = io.assemble(
        run.model,
        layers,
        record=run.source,
        data_config=run.config,
        target_bits=run.target_bits if layers else None,
        operations=run.operations,
        classes=run.images.classes,
        trained_outputs=run.images.present,
        accuracy=accuracy,
        activations=activation_entries(run.activations.records() if run.activations is not None else ()),
        left_float=left_float,
        environment=environment(),
        recipe=recipe.to_dict(),
    )

    distributed.check_equal([vars(layer) for layer in layers], what="the hard model")
    results: tuple[float, float, float | None, float] | None = None
    if run.shard.is_main:
        candidate = run.folder.path / f".{MODEL_FILE}.candidate"
        try:
            io.write(candidate, file)
            reloaded = hard_model(io.read(candidate), trust_code=True, where=str(candidate)).to(run.device)
            measured = evaluate(reloaded, run.whole_val_loader, shared=False, present=run.images.present)
            results = measured.top1, measured.top5, measured.top1_present, _logit_gap(run, reloaded)
        finally:
            candidate.unlink(missing_ok=True)
    accuracy.hard_top1, accuracy.hard_top5, accuracy.hard_top1_present, gap = distributed.from_main(results)
    file.manifest.accuracy = accuracy
    if run.shard.is_main and accuracy.hard_top1 >= at_least:
        io.write(run.folder.model_file, file)
    return file, gap


@torch.no_grad()
def _logit_gap(run: Run, reloaded: nn.Module) -> float:
    images, _ = next(iter(run.whole_val_loader.epoch(0)))
    return float((logits_of(run.model(images)) - logits_of(reloaded(images))).abs().max())


def write_report(run: Run, file: QuantizedFile, **more: Any) -> dict[str, Any]:
    """report.json: the manifest as written, the file's size, the history, and ``more``."""
    if run.shard.is_main:
        file.manifest.sizes.file_bytes = run.folder.model_file.stat().st_size
    report = build_report(file.manifest, run.record.history) | more
    run.folder.write_report(report)
    return report
