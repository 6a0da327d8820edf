"""evaluate_file() and evaluate_checkpoint(): the accuracy of a file as reloaded, and of a float model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from csqcli.data.loaders import LoaderSettings, make_loader
from csqcli.data.specs import WORKERS, ValSplit, open_data
from csqcli.data.splits import DataSet
from csqcli.file import io
from csqcli.file.checkpoint import open_checkpoint
from csqcli.file.loading import hard_model
from csqcli.file.manifest import Manifest
from csqcli.models.fitting import load_for
from csqcli.models.libraries import without_weights
from csqcli.models.spec import parse
from csqcli.recipe.schema import Recipe
from csqcli.system.choices import Weights
from csqcli.system.device import pick_device
from csqcli.system.progress import Display
from csqcli.training.evaluate import Accuracy, check_scores, evaluate
from csqcli.training.labels import open_held_out, with_labels_of
from csqcli.training.opening import check_task
from csqcli.training.run import data_config


def evaluate_file(
    path: Path,
    data_source: str,
    *,
    device: str = "auto",
    batch_size: int = 256,
    workers: int = WORKERS,
    val_split: ValSplit = None,
    val_limit: int | None = None,
    display: Display | None = None,
    trust_code: bool = False,
    classes_by_position: bool = False,
) -> tuple[Accuracy, Manifest]:
    """Accuracy of the hard model as the file holds it, with the preprocessing stored in it.

    Classes are matched by their names, or by their numbers alone where ``classes_by_position``. Of data without a validation
    split those images are held out that were in training, unless ``val_split`` says otherwise.

    ONNX files run in ONNX Runtime on the CPU, .tflite files in LiteRT, all others in torch on ``device``.
    """
    target = pick_device(device)
    model: nn.Module
    if path.suffix == ".onnx":
        from csqcli.exporting import runtime

        target = pick_device("cpu")
        model, manifest = runtime.open_model(path)
    elif path.suffix == ".tflite":
        from csqcli.exporting import runtime

        target = pick_device("cpu")
        model, manifest = runtime.open_litert(path)
    else:
        file = io.read(path)
        manifest = file.manifest
        model = hard_model(file, trust_code=trust_code, where=str(path)).to(target)
    check_task(manifest.spec)
    images = open_held_out(manifest, data_source, val_split=val_split, val_limit=val_limit)
    images = with_labels_of(manifest, images, where=str(path), by_position=classes_by_position)
    settings = LoaderSettings(training=False, batch_size=batch_size, workers=workers, device=target)
    return _measured(model, images, manifest.data_config, settings, display=display, where=str(path)), manifest


def evaluate_checkpoint(
    checkpoint: str | None,
    model: str,
    data_source: str,
    *,
    weights: Weights = "auto",
    recipe: Recipe | None = None,
    device: str = "auto",
    batch_size: int = 256,
    workers: int = WORKERS,
    val_split: ValSplit = None,
    val_limit: int | None = None,
    display: Display | None = None,
) -> Accuracy:
    """Accuracy of a float model: of the weights in ``checkpoint``, or of the library's own where that is None.

    Images are prepared as the model's data config says, but for what ``recipe.data`` says of that; ``recipe.model.arguments`` are
    the model's.
    """
    recipe = recipe or Recipe()
    spec = parse(model, recipe.model.arguments)
    check_task(spec)
    target = pick_device(device)
    images = open_data(data_source, train=False, val_split=val_split, val_limit=val_limit)
    weights_file = open_checkpoint(checkpoint) if checkpoint is not None else None
    with without_weights("give a checkpoint of it as the first argument"):
        fitted = load_for(
            model,
            images.classes,
            head="keep",
            checkpoint=weights_file,
            weights=weights,
            arguments=recipe.model.arguments,
            classes_from=images.source,
        )
    images = images.relabelled(fitted.outputs, fitted.names)
    display = display or Display(quiet=True)
    for line in fitted.loaded.lines:
        display.say(line)
    config = data_config(fitted.loaded.data_config, recipe)
    settings = LoaderSettings(training=False, batch_size=batch_size, workers=workers, device=target)
    return _measured(fitted.loaded.model.to(target), images, config, settings, display=display, where=model)


def _measured(
    model: nn.Module,
    images: DataSet,
    config: dict[str, Any],
    settings: LoaderSettings,
    *,
    display: Display | None,
    where: str,
) -> Accuracy:
    """Accuracy on the validation images. UserError where the model does not give a score per class."""
    check_scores(model, config["input_size"], images.num_classes, where=where)
    loader = make_loader(images.val, config, settings)
    with (display or Display(quiet=True)).evaluation("evaluating", loader.batches) as tell:
        return evaluate(model, loader, present=images.present, on_batch=tell)
