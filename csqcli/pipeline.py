"""search() and finetune(), top to bottom: the page to start reading at.

Each line is a step that has its own module: `training.run` (what the phases of a run share), `training.phase` (one phase
trained to its end, whatever interrupts it), `training.post_training` (where nothing is trained), `training.deliver` (the file,
written and read back), `shipping` (where its size was asked for).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from csqcli.data.splits import DataSet
from csqcli.errors import UserError
from csqcli.file import header, io
from csqcli.file.checkpoint import open_checkpoint
from csqcli.file.io import QuantizedFile
from csqcli.file.loading import activation_records, plain_model
from csqcli.file.manifest import ModelRecord
from csqcli.models.fitting import load_for
from csqcli.models.spec import ModelSpec, parse
from csqcli.quant.layers import Layer, layers_named
from csqcli.recipe.complete import check_complete
from csqcli.recipe.schema import Recipe
from csqcli.shipping import deliver_in_bytes, round_in_bytes, round_layers, shipped_bytes
from csqcli.system import distributed
from csqcli.system.files import write_text
from csqcli.system.progress import Display
from csqcli.system.run_files import model_of
from csqcli.training import phase, shared_start, sizing
from csqcli.training.adapt import adapt
from csqcli.training.budgets import check_targets, check_written_planes, latency_reached
from csqcli.training.deliver import deliver, rehearse, write_report
from csqcli.training.evaluate import evaluate
from csqcli.training.labels import with_labels_of
from csqcli.training.limits import measure_ways
from csqcli.training.opening import check_task, open_images, open_model
from csqcli.training.planning import try_out
from csqcli.training.post_training import measure_importance
from csqcli.training.preflight import check_named, check_optimizer
from csqcli.training.run import Run, data_config
from csqcli.training.run_folder import RunFolder
from csqcli.training.setup import shared_importance, shortened
from csqcli.training.shared_start import SharedStart
from csqcli.training.warm_start import begin_with, check_fits, keep_latents, read_warm_start

_FINETUNE_RATE = 0.4  # of the search's peak learning rate, where the recipe says nothing


def search(
    recipe: Recipe,
    output: Path,
    *,
    display: Display,
    force: bool = False,
    resume: bool = False,
    images: DataSet | None = None,
    shared: SharedStart | None = None,
    latents: bool = False,
) -> dict[str, Any]:
    """From a pretrained checkpoint to a quantized file and its report, written into ``output``; the report.

    ``recipe.adaptation.epochs`` in float come first, and ``recipe.finetune.epochs`` with the planes fixed at the end.
    ``images`` spares callers who run many jobs the opening of ``recipe.data.source``, and ``shared``, of :func:`prepare`, what
    does not depend on the target; neither changes the result, but that a recipe of another seed than ``shared`` begins with the
    float network of ``shared`` and not with one of its own. ``latents`` leaves latents.safetensors in the folder, for other
    searches to begin with (``model.warm_start``). Raises UserError for anything wrong with the input; a folder
    with a finished run is refused without ``force``.
    """
    spec = _model_asked_for(recipe, resume=resume)
    if images is None:
        images = _listed(recipe, display)
    warm = None if recipe.model.warm_start is None else read_warm_start(recipe.model.warm_start)
    source = "" if warm is None else warm.sha256
    with RunFolder(output, recipe, images, force=force, resume=resume, source=source) as folder:
        if folder.finished is not None:
            folder.finish()
            return folder.finished
        with _opened(recipe, spec, images, folder, display, weights_seed=shared.seed if shared else None) as run:
            display.say(f"method {recipe.card.name}: {recipe.card.summary}{_why(recipe)}")
            if recipe.card.name == "pact" and recipe.quantization.act_bits == 32:
                display.say(
                    "without --act-bits nothing is left of PACT but its weights: the learned clip is of activations"
                )
            layers, left_float = run.find_layers()
            left = [vars(tensor) for tensor in left_float]
            run.count_operations(layers)
            check_targets(run, recipe, layers)
            begins_with = shared if run.saved is None else None
            if begins_with is not None:
                begins_with.hand_over(run)
            _know_ways(run, layers)
            check_written_planes(run, recipe, layers)
            _know_latencies(run, layers)
            if layers and recipe.quantization.in_bytes and run.saved is None:
                with run.display.step("measuring the smallest file"):
                    sizing.check_reachable(run, layers, left, shipped_bytes)
            if begins_with is not None:
                run.tell_float()
            else:
                run.measure_float()
            rehearse(run, layers, left)
            if warm is not None:
                check_fits(run, warm)
            if recipe.adaptation.epochs:
                adapt(run)
            run.keep_teacher()
            if warm is not None:
                begin_with(run, warm)
            report = {} if run.past_search else _search(run, layers, left, latents=latents)
            if recipe.finetune.epochs and recipe.card.name != "float":
                searched = io.read(folder.model_file) if folder.shard.is_main else None
                report = _finetune(run, distributed.from_main(searched))
        folder.finish()
    return report


def prepare(
    recipe: Recipe,
    folder_path: Path,
    *,
    display: Display,
    images: DataSet | None = None,
    resume: bool = False,
    searches: Sequence[Recipe] = (),
) -> None:
    """The part of a search that does not depend on its target, kept in a folder for many searches to begin with.

    The float model's accuracy, ``recipe.adaptation.epochs`` in float, and the importance of planes where it is measured before
    training. ``recipe`` needs no target. Interrupted, it goes on with ``resume``. UserError as :func:`search`, and, before
    anything is measured, where the layers leave no room for a target of one of the ``searches`` that will begin with it.
    """
    assert recipe.model.source is not None
    spec = parse(recipe.model.source, recipe.model.arguments)
    check_task(spec)
    for each in (recipe, *searches):
        _check_named(each)
    if images is None:
        images = _listed(recipe, display)
    with RunFolder(folder_path, recipe, images, force=False, resume=resume) as folder:
        with _opened(recipe, spec, images, folder, display) as run:
            layers, left_float = run.find_layers()
            run.count_operations(layers)
            for each in searches:
                check_targets(run, each, layers)
            run.measure_float()
            rehearse(run, layers, [vars(tensor) for tensor in left_float])
            if recipe.adaptation.epochs:
                adapt(run)
            importance, by = None, recipe.quantization.allocator
            if layers and (by is not None or not recipe.card.trains):
                run.quantize_activations()
                if recipe.card.trains:
                    importance = shared_importance(run, layers, run.calibration_batches())
                else:
                    importance, by = measure_importance(run, layers)
            shared_start.write(run, importance, by=by)
        folder.finish()


def _listed(recipe: Recipe, display: Display) -> DataSet:
    with display.step(f"listing the images of {recipe.data.source}"):
        return open_images(recipe)


def _opened(
    recipe: Recipe,
    spec: ModelSpec,
    images: DataSet,
    folder: RunFolder,
    display: Display,
    *,
    weights_seed: int | None = None,
) -> Run:
    """The run of a recipe before its first phase: the model with its weights and head, its images and loaders. Weights that are
    fresh are those of ``weights_seed``, the recipe's own if None."""
    first = recipe.seed if weights_seed is None else weights_seed
    torch.manual_seed(first)
    with display.step(f"loading {spec.source}"):
        fitted = open_model(recipe.model_copy(update={"seed": first}), images)
    if first != recipe.seed:
        torch.manual_seed(recipe.seed)
    loaded, images = fitted.loaded, images.relabelled(fitted.outputs, fitted.names)
    for line in loaded.lines:
        display.say(line)
    source = ModelRecord(
        source=spec.source,
        library=spec.library,
        name=spec.name,
        arguments=spec.arguments,
        num_classes=images.num_classes,
        weights_from=loaded.weights_from,
        checkpoint_sha256=loaded.checkpoint_sha256,
    )
    config = data_config(loaded.data_config, recipe)
    return Run(recipe, folder, display, loaded.model, images, config, source)


def _search(run: Run, layers: list[Layer], left: list[dict[str, Any]], *, latents: bool) -> dict[str, Any]:
    run.quantize_activations()
    if run.activations is not None:
        rehearse(run, layers, left)
    file, gap = _delivered(run, layers, left, latents=latents)
    return write_report(run, file, parity={"max_logit_gap": gap}, **_asked(run, file, layers), **_adaptation(run))


def _delivered(
    run: Run, layers: list[Layer], left: list[dict[str, Any]], *, latents: bool
) -> tuple[QuantizedFile, float]:
    """What the search ends with, written and read back, and the largest gap between its logits and the model's."""
    if not run.recipe.card.trains:
        return (round_in_bytes if layers and run.recipe.quantization.in_bytes else round_layers)(run, layers, left)
    if layers and run.recipe.quantization.in_bytes:
        with run.display.step("measuring what each plane takes on disk"):
            sizing.measure(run, layers, left, shipped_bytes)
    trainer = phase.train(run, "search", run.recipe, layers)
    if run.ships is not None:
        return deliver_in_bytes(run, trainer, left)
    delivered = deliver(run, trainer, left)
    run.searched = trainer.optimizer.method
    if latents:
        keep_latents(run, trainer.optimizer.method)
    return delivered


def _know_ways(run: Run, layers: list[Layer]) -> None:
    """Where layers may lose their last plane: measure the ways through the network; a resumed run has them."""
    if run.record.ways is None:
        found = measure_ways(
            run.recipe, run.model, layers, lambda: next(iter(run.calibration_batches()))[0], display=run.display
        )
        run.record.ways = distributed.from_main(found)


def _know_latencies(run: Run, layers: list[Layer]) -> None:
    """Set what a budget in milliseconds counts with: the table that is named, or measured now; a resumed run has it."""
    if not layers or run.recipe.quantization.target_latency is None or run.record.latencies is not None:
        return
    found = None
    if run.shard.is_main:
        from csqcli.exporting.latency_table import latencies_of

        found = latencies_of(run.recipe, run.model, layers, run.config, display=run.display)
    run.record.latencies = distributed.from_main(found)


def _asked(run: Run, file: QuantizedFile, layers: list[Layer]) -> dict[str, Any]:
    """What was asked for in each unit and what was reached, as a field of the report."""
    settings, manifest = run.recipe.quantization, file.manifest
    found: list[dict[str, Any]] = []
    if settings.target_bits is not None and manifest.layers:
        found.append({"budget": "bits", "asked": settings.target_bits, "reached": manifest.budget.mean_bits})
    shipped = run.folder.shipped_file(settings.ship_as)
    if run.ships is not None and shipped.exists():
        size = shipped.stat().st_size
        if settings.target_size is not None:
            found.append({"budget": "size", "asked": settings.target_size, "reached": size})
        else:
            reached = manifest.sizes.float_bytes / size
            found.append({"budget": "compression", "asked": settings.target_compression, "reached": reached})
        found[-1]["file"] = shipped.name
    if settings.target_bops is not None and manifest.compute is not None:
        found.append({"budget": "bops", "asked": settings.target_bops, "reached": manifest.compute.bops})
    if run.latencies is not None and settings.target_latency is not None:
        reached = latency_reached(run, run.recipe, layers, [layer.planes for layer in file.layers])
        found.append({"budget": "latency", "asked": settings.target_latency, "reached": reached})
        found[-1]["engine"] = run.latencies.engine_version
        if run.shard.is_main:
            write_text(run.folder.latency_file, run.latencies.model_dump_json(indent=1) + "\n")
    if run.mean_act_bits is not None:
        found.append({"budget": "act_bits", "asked": settings.target_act_bits, "reached": run.mean_act_bits})
    return {"budgets": found}


def plan(recipe: Recipe, *, display: Display, images: DataSet | None = None) -> dict[str, Any]:
    """What :func:`search` would do and come to, from a few of its own steps; the plan, of which nothing stays on disk.

    The model is loaded and trained for some timed steps, its weights are rounded at the planes that are found by then, and
    both files are written into a folder that is removed again. UserError for whatever would stop the search, and for 0 epochs.
    """
    spec = _model_asked_for(recipe)
    if not recipe.card.trains:
        raise UserError(
            "0 epochs have no steps to be timed", where="epochs", hint="run the search itself: it takes minutes"
        )
    if images is None:
        images = _listed(recipe, display)
    untracked = recipe.model_copy(update={"log": []})
    with tempfile.TemporaryDirectory(prefix="csq-plan-") as scratch:
        with (
            RunFolder(Path(scratch) / "run", untracked, images, force=False, resume=False) as folder,
            _opened(untracked, spec, images, folder, display) as run,
        ):
            layers, left_float = run.find_layers()
            left = [vars(tensor) for tensor in left_float]
            run.count_operations(layers)
            check_targets(run, recipe, layers)
            _know_ways(run, layers)
            check_written_planes(run, recipe, layers)
            rehearse(run, layers, left)
            run.keep_teacher()
            _know_latencies(run, layers)
            run.quantize_activations()
            if layers and recipe.quantization.in_bytes:
                sizing.measure(run, layers, left, shipped_bytes)
            forecast = try_out(run, layers, left)
            small = shipped_bytes(folder.model_file, "bit-packed-small") if layers else None
            folder.finish()
    return forecast.described(recipe) | {
        "left_float": left,
        "bytes": {"model": forecast.model_bytes, "bit_packed_small": small},
    }


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
            report = _finetune(run, file)
        folder.finish()
    return report


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


def _finetune(run: Run, start: QuantizedFile) -> dict[str, Any]:
    """Train ``start``'s integers on and deliver the better of the two."""
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
    return write_report(run, file, parity={"max_logit_gap": gap}, finetune=outcome, **_adaptation(run))


def _adaptation(run: Run) -> dict[str, Any]:
    done = run.record.adaptation
    return {} if done is None else {"adaptation": done.model_dump(exclude={"sha256"})}


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


def _model_asked_for(recipe: Recipe, *, resume: bool = False) -> ModelSpec:
    """The model's spec. UserError where none is named, where it is no classifier, where no target is given, and for whatever else the
    recipe names that is not there."""
    check_complete(recipe)
    _check_named(recipe, resume=resume)
    assert recipe.model.source is not None
    spec = parse(recipe.model.source, recipe.model.arguments)
    check_task(spec)
    return spec


def _check_named(recipe: Recipe, *, resume: bool = False) -> None:
    """As :func:`check_named`, and UserError where latencies are to come from what is not there; a state that is resumed has them."""
    check_named(recipe)
    if recipe.quantization.target_latency is not None and not resume:
        from csqcli.exporting.latency_table import check_source

        check_source(recipe)


def _why(recipe: Recipe) -> str:
    return f" (chosen by auto: {recipe.method_why})" if recipe.method_why else ""
