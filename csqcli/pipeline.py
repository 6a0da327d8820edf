"""search(), top to bottom: the page to start reading at. Behind it are prepare() and plan(), which take some of its steps.

Each line is a step that has its own module: `training.run` (what the phases of a run share), `training.phase` (one phase
trained to its end, whatever interrupts it), `training.post_training` (where nothing is trained), `training.deliver` (the file,
written and read back), `shipping` (where its size was asked for), `finetuning` (the phase after the search).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from csqcli.data.splits import DataSet
from csqcli.errors import UserError
from csqcli.file import io
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import ModelRecord
from csqcli.finetuning import finetune_integers
from csqcli.models.spec import ModelSpec, parse
from csqcli.quant.layers import Layer
from csqcli.quant.names import FLOAT_BITS
from csqcli.recipe.complete import check_complete
from csqcli.recipe.schema import Recipe
from csqcli.shipping import deliver_in_bytes, round_in_bytes, round_layers, shipped_bytes
from csqcli.system import distributed
from csqcli.system.progress import Display
from csqcli.training import phase, shared_start, sizing
from csqcli.training.adapt import adapt
from csqcli.training.budgets import budgets_reached, check_targets, check_written_planes
from csqcli.training.deliver import deliver, rehearse, write_report
from csqcli.training.limits import measure_ways
from csqcli.training.opening import check_task, open_images, open_model
from csqcli.training.planning import try_out
from csqcli.training.post_training import measure_importance
from csqcli.training.preflight import check_named
from csqcli.training.run import Run, data_config
from csqcli.training.run_folder import RunFolder
from csqcli.training.setup import shared_importance
from csqcli.training.shared_start import SharedStart
from csqcli.training.warm_start import begin_with, check_fits, keep_latents, read_warm_start


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
            if recipe.card.lost_without_act_bits and recipe.quantization.act_bits == FLOAT_BITS:
                display.say(f"without --act-bits {recipe.card.lost_without_act_bits}")
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
                searched = distributed.from_main(io.read(folder.model_file) if folder.shard.is_main else None)
                report = finetune_integers(run, searched, budgets=lambda file: budgets_reached(run, file, layers))
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
    if run.latencies is not None:
        run.folder.write_latencies(run.latencies)
    return write_report(run, file, parity={"max_logit_gap": gap}, budgets=budgets_reached(run, file, layers))


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
