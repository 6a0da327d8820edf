"""From a trained model to the file that is delivered: written, read back, evaluated, and only then published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from csqcli.errors import UserError, first_problem
from csqcli.file import io
from csqcli.file.io import QuantizedFile
from csqcli.file.loading import activation_entries, hard_model
from csqcli.quant.hard_layer import HardLayer
from csqcli.quant.layers import Layer
from csqcli.quant.measuring import logits_of
from csqcli.reporting.build import build as build_report
from csqcli.reporting.sparsity import count_sparsity
from csqcli.system import distributed
from csqcli.system.run_files import MODEL_FILE
from csqcli.training.evaluate import evaluate, recalibrate_batchnorm
from csqcli.training.loop import Trainer
from csqcli.training.run import Run, environment


def deliver(
    run: Run, trainer: Trainer, left_float: list[dict[str, Any]], *, at_least: float = 0.0
) -> tuple[QuantizedFile, float]:
    """Harden, let BatchNorm settle, write, read back, and record the accuracy of what was read back.

    A model below a top-1 of ``at_least`` percent replaces no file, so that a kill here leaves the better one.
    Returns what was written and the largest logit difference between the model in memory and the one read back.
    """
    recipe = run.recipe
    with run.display.step("hardening the weights"):
        trainer.optimizer.harden()
    if trainer.optimizer.method.layers:
        batches = recipe.bn_recalibration_batches if recipe.batchnorm == "train" else 0
        with run.display.step("recalibrating BatchNorm", min(batches, run.train_loader.batches)) as tell:
            recalibrate_batchnorm(run.model, run.train_loader, epoch=trainer.epochs, batches=batches, on_batch=tell)
        distributed.copy_from_main(run.model.buffers())
    layers = trainer.optimizer.hard_layers()
    if layers:
        run.tell_planes(trainer.optimizer.method, [layer.planes for layer in layers])
    return publish(run, layers, left_float, at_least=at_least)


def publish(
    run: Run, layers: Sequence[HardLayer], left_float: list[dict[str, Any]], *, at_least: float = 0.0
) -> tuple[QuantizedFile, float]:
    """Write the run's model, whose weights are those of ``layers``, read it back and evaluate it; as :func:`deliver`."""
    accuracy = run.record.accuracy
    run.model.eval()
    file = assembled(run, layers, left_float)

    distributed.check_equal([vars(layer) for layer in layers], what="the hard model")
    results: tuple[float, float, float | None, float] | None = None
    if run.shard.is_main:
        candidate = run.folder.path / f".{MODEL_FILE}.candidate"
        try:
            with run.display.step("writing the file and reading it back"):
                io.write(candidate, file)
                reloaded = hard_model(io.read(candidate), trust_code=True, where=str(candidate)).to(run.device)
            loader, present = run.whole_val_loader, run.images.present
            with run.display.evaluation("evaluating what was read back", loader.batches) as tell:
                measured = evaluate(reloaded, loader, shared=False, present=present, on_batch=tell)
            results = measured.top1, measured.top5, measured.top1_present, _logit_gap(run, reloaded)
        finally:
            candidate.unlink(missing_ok=True)
    accuracy.hard_top1, accuracy.hard_top5, accuracy.hard_top1_present, gap = distributed.from_main(results)
    file.manifest.accuracy = accuracy
    if run.shard.is_main and accuracy.hard_top1 >= at_least:
        io.write(run.folder.model_file, file)
    return file, gap


def assembled(run: Run, layers: Sequence[HardLayer], left_float: list[dict[str, Any]]) -> QuantizedFile:
    """The file of the run's model with ``layers`` as they are now."""
    return io.assemble(
        run.model,
        layers,
        record=run.source,
        data_config=run.config,
        target_bits=run.target_bits if layers else None,
        operations=run.operations,
        classes=run.images.classes,
        trained_outputs=run.images.present,
        accuracy=run.record.accuracy,
        activations=activation_entries(run.activations.records() if run.activations is not None else ()),
        left_float=left_float,
        environment=environment(),
        recipe=run.recipe.to_dict(),
    )


def rehearse(run: Run, layers: Sequence[Layer], left_float: list[dict[str, Any]]) -> None:
    """Before the first step: assemble, write and read back the file that this run will deliver, every integer 0.

    Names, types, shapes and buffers are those of the end, so that what no file can hold is found before the training and
    not after it. UserError where that is so; nothing stays behind.
    """
    if not run.shard.is_main:
        return
    blank = [
        HardLayer(
            layer.name,
            torch.zeros(layer.parameter.shape, dtype=torch.int32),
            torch.ones(1),
            torch.ones(run.recipe.quantization.max_bits if run.recipe.card.name != "float" else 1, dtype=torch.bool),
            layer.channel_dim,
            layer.aliases,
        )
        for layer in layers
    ]
    candidate = run.folder.path / f".{MODEL_FILE}.candidate"
    where, hint = run.source.source, "the model could be trained but not stored; nothing was trained"
    try:
        with run.display.step("rehearsing the file"):
            io.write(candidate, assembled(run, blank, left_float))
            file = io.read(candidate)
        state = run.model.state_dict()
        fit = file.state_dict()
        odd = sorted(name for name in state.keys() ^ fit.keys() if not name.endswith("num_batches_tracked"))
        odd += [name for name in state.keys() & fit.keys() if state[name].shape != fit[name].shape]
        if odd:
            raise ValueError(f"tensor {odd[0]} does not come back")
    except UserError as error:
        raise UserError(error.what, where=where if error.where == str(candidate) else error.where, hint=hint) from None
    except ValidationError as error:
        problem = first_problem(error)
        what = f"{problem.text} (got {str(problem.given)[:60]})"
        raise UserError(f"the file cannot say this of it: {what}", where=where, hint=hint) from None
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"cannot be stored ({error})", where=where, hint=hint) from error
    finally:
        candidate.unlink(missing_ok=True)


@torch.no_grad()
def _logit_gap(run: Run, reloaded: nn.Module) -> float:
    images, _ = next(iter(run.whole_val_loader.epoch(0)))
    return float((logits_of(run.model(images)) - logits_of(reloaded(images))).abs().max())


def write_report(run: Run, file: QuantizedFile, **more: Any) -> dict[str, Any]:
    """report.json: the manifest as written, the file's size, the history, ``more``, and what a float phase did."""
    if run.shard.is_main:
        file.manifest.sizes.file_bytes = run.folder.model_file.stat().st_size
    kept = {} if run.record.ways is None else run.record.ways.model_dump()
    sparsity = {
        layer.name: count_sparsity((layer.integers != 0).numpy(), channel_dim=layer.channel_dim)
        for layer in file.layers
    }
    report = build_report(file.manifest, run.record.history, sparsity=sparsity) | kept | more
    if run.record.adaptation is not None:
        report["adaptation"] = run.record.adaptation.model_dump(exclude={"sha256"})
    run.folder.write_report(report)
    return report
