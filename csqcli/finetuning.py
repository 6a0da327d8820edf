"""finetune(), top to bottom: the integers of a quantized file, or of a search that has just ended, trained on with their planes fixed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from csqcli.data.splits import DataSet
from csqcli.errors import UserError
from csqcli.file import header, io
from csqcli.file.checkpoint import open_checkpoint
from csqcli.file.io import QuantizedFile
from csqcli.file.loading import activation_records, plain_model
from csqcli.models.fitting import load_for
from csqcli.quant.layers import layers_named
from csqcli.recipe.schema import Recipe
from csqcli.system import distributed
from csqcli.system.progress import Display
from csqcli.system.run_files import model_of
from csqcli.training import phase
from csqcli.training.deliver import deliver, rehearse, write_report
from csqcli.training.evaluate import evaluate
from csqcli.training.labels import with_labels_of
from csqcli.training.opening import check_task, open_images
from csqcli.training.preflight import check_optimizer
from csqcli.training.run import Run, data_config
from csqcli.training.run_folder import RunFolder
from csqcli.training.setup import shortened

_FINETUNE_RATE = 0.4  # of the search's peak learning rate, where the recipe says nothing


def finetune(
    path: Path,
    recipe: Recipe,
    output: Path,
    *,
    display: Display,
    force: bool = False,
    resume: bool = False,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Train the integers of a quantized file on, masks fixed (Algorithm 1's second half); the report.

    Never delivers a worse model than it was given: the better of the two on the validation images is written, and
    ``report["finetune"]["kept"]`` says which.
    """
    file = io.read(path)
    if not file.layers:
        raise UserError("holds no quantized layer", where=str(path), hint="`csq search` writes one that does")
    if file.manifest.folded:
        hint = "finetune the file that it was exported from"
        raise UserError(
            "its BatchNorms are folded for inference; they cannot be trained on", where=str(path), hint=hint
        )
    check_task(file.manifest.spec)
    check_optimizer(recipe)
    _check_teacher(recipe, where=str(path))
    images = open_images(recipe)
    followed = _float_weights(recipe, images, file, trust_code=trust_code, where=str(path))
    images = with_labels_of(file.manifest, images, where=str(path), whole=True)
    source, teacher = file.manifest.payload_sha256, "" if followed is None else distributed.fingerprint(followed)
    with RunFolder(output, recipe, images, force=force, resume=resume, source=source, teacher=teacher) as folder:
        if folder.finished is not None:
            folder.finish()
            return folder.finished
        torch.manual_seed(recipe.seed)
        model = plain_model(file, trust_code=trust_code, where=str(path))
        config = data_config(file.manifest.data_config, recipe)
        with Run(recipe, folder, display, model, images, config, file.manifest.model) as run:
            run.keep_teacher(followed)
            report = finetune_integers(run, file)
        folder.finish()
    return report


def finetune_integers(
    run: Run, start: QuantizedFile, *, budgets: Callable[[QuantizedFile], list[dict[str, Any]]] | None = None
) -> dict[str, Any]:
    """The last phase of a run: train ``start``'s integers on and deliver the better of the two; the report, with what ``budgets``
    says of the file that is kept."""
    recipe = run.recipe.model_copy(deep=True)
    recipe.epochs = run.recipe.finetune.epochs
    recipe.optimizer = shortened(recipe.optimizer, recipe.epochs)
    recipe.optimizer.lr = run.recipe.finetune.lr or _FINETUNE_RATE * run.recipe.optimizer.peak_lr
    run.model.load_state_dict(start.state_dict() | run.untracked())
    if run.activations is None and start.manifest.activations:
        method = recipe.quantization.act_method
        run.attach_activations(activation_records(start.manifest), method=method)
    run.check_scores()
    if not run.past_search:
        with run.display.evaluation("evaluating the file's model", run.val_loader.batches) as tell:
            before = evaluate(run.model, run.val_loader, present=run.images.present, on_batch=tell)
        run.record.input_top1, run.record.input_top1_present = before.top1, before.top1_present
        found = {"samples": before.samples, "soft_top1": None, "unit_steps_top1": None}
        run.record.accuracy = start.manifest.accuracy.model_copy(update=found)
        run.saved = None
    input_top1 = run.record.input_top1 or 0.0
    run.display.say(f"finetune from top-1 {input_top1:.2f} % at {start.manifest.budget.mean_bits:.4f} bits")
    layers = layers_named(run.model, [layer.name for layer in start.layers])
    run.count_operations(layers)
    rehearse(run, layers, start.manifest.left_float)
    trainer = phase.train(run, "finetune", recipe, layers, start=start.layers)
    run.searched = None
    file, gap = deliver(run, trainer, start.manifest.left_float, at_least=input_top1)
    finetuned_top1 = run.record.accuracy.hard_top1 or 0.0
    kept = "finetuned" if finetuned_top1 >= input_top1 else "input"
    if kept == "input":
        file, gap = _keep_input(run, start, input_top1), 0.0
    run.display.say(f"finetuned top-1 {finetuned_top1:.2f} %, input {input_top1:.2f} %: kept the {kept} model")
    outcome = {"input_top1": input_top1, "finetuned_top1": finetuned_top1, "kept": kept}
    more = {} if budgets is None else {"budgets": budgets(file)}
    return write_report(run, file, parity={"max_logit_gap": gap}, finetune=outcome, **more)


def _keep_input(run: Run, start: QuantizedFile, top1: float) -> QuantizedFile:
    """Write the model that the finetune started from, with the accuracy that was measured here."""
    found = {
        "hard_top1": top1,
        "hard_top1_present": run.record.input_top1_present,
        "samples": run.record.accuracy.samples,
    }
    run.record.accuracy = start.manifest.accuracy.model_copy(update=found)
    start.manifest.accuracy, start.manifest.sizes.file_bytes = run.record.accuracy, None
    if run.shard.is_main:
        io.write(run.folder.model_file, start)
    return start


def _check_teacher(recipe: Recipe, *, where: str) -> None:
    """UserError where a finetune is to follow a float model that nothing names, and where nothing follows the one that is named."""
    asked = [name for name in ("distill", "distill_features") if getattr(recipe.optimizer, name)]
    if asked and recipe.finetune.teacher is None:
        without = " ".join(f"--set optimizer.{name}=0" for name in asked)
        hint = f"name it: --teacher FILE (teacher=), a checkpoint or the folder of a float run; or leave it: {without}"
        raise UserError("the float model to distill from is not in the file", where=where, hint=hint)
    if recipe.finetune.teacher is not None and not asked:
        hint = "say how much: --set optimizer.distill=0.9 (predictions), --set optimizer.distill_features=1 (what the classifier reads)"
        raise UserError("the loss has no share that follows the teacher", where="--teacher (teacher=)", hint=hint)


def _float_weights(
    recipe: Recipe, images: DataSet, file: QuantizedFile, *, trust_code: bool, where: str
) -> dict[str, torch.Tensor] | None:
    """Weights of the float model that a finetune follows, by the names of the file's model; None where it follows none. UserError for
    those of another network."""
    teacher = recipe.finetune.teacher
    if teacher is None:
        return None
    weights_of, model = str(model_of(teacher)), file.manifest.model
    # before anything else builds what a file names
    wanted = plain_model(file, trust_code=trust_code, where=where).state_dict()
    if header.is_quantized(model_of(teacher)) and io.read(model_of(teacher)).layers:
        hint = "give a float checkpoint, or the folder of a run of --method float"
        raise UserError("is quantized: a teacher is a float model", where=weights_of, hint=hint)
    found = load_for(
        model.source,
        images.classes,
        head="auto" if model.num_classes == len(images.classes) else "keep",
        checkpoint=open_checkpoint(weights_of),
        weights=recipe.model.weights,
        arguments=model.arguments,
        classes_from=images.source,
    ).loaded.model.state_dict()
    odd = [name for name in wanted if name not in found or found[name].shape != wanted[name].shape]
    if odd:
        what = f"its {odd[0]} is not that of the file's model"
        raise UserError(what, where=weights_of, hint="give float weights of the same network, with the same classes")
    return found
