"""Functions of the Python API that train: search, plan, finetune, sweep.

The commands of the same names say first what they are about to do and where, and then call what these functions call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le

from csqcli.api.arguments import Positive, Report, display_of, together
from csqcli.recipe import DEFAULT_RECIPE
from csqcli.system.arguments import checked
from csqcli.system.callers import preserve_global_state

if TYPE_CHECKING:
    from csqcli.recipe.schema import Recipe
    from csqcli.system.progress import Display

FINETUNE_EPOCHS = 5  # where neither the caller nor the file's recipe says


@checked
def search(
    model: str | None = None,
    *,
    target_bits: float | None = None,
    data: str | None = None,
    output: str | Path | None = None,
    recipe: str = DEFAULT_RECIPE,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Report:
    """From a pretrained checkpoint to a quantized file and its report, as ``csq search`` does it.

    Args:
        model: a timm or torchvision name, ``timm:NAME``, ``torchvision:NAME``, ``csq:NAME`` or ``package.module:factory``;
            None where the recipe names one.
        target_bits: mean planes per weight element that the result must not exceed; fractions are fine. None where the
            recipe says.
        data: what ``--data`` takes: a folder or archive of class folders, ``csv:FILE``, ``cifar10:DIR``, ``digits``, ….
        output: folder for ``model.safetensors``, ``report.json``, ``metrics.jsonl`` and ``recipe.yaml``; None takes
            ``runs/MODEL-TARGETbit``, as ``runs/resnet18-3bit``.
        recipe: the name of one that ships with csq, or a YAML file.
        resume: go on with an unfinished run in ``output``. The report of a finished one is returned as it is.
        force: overwrite a run in ``output``, finished or not, and files of these names that no run wrote.
        progress: show what is going on, on stderr.
        settings: further recipe keys, dotted or short where that is unambiguous: ``epochs=5``, ``batch_size=64``,
            ``**{"finetune.epochs": 3}``. `csq init` writes them all with their meaning. They win over the recipe.

    Returns:
        The report: budget, sizes, accuracy in percent (``report["accuracy"]["hard_top1"]``), one entry per layer, history.

    Raises:
        UserError: for anything wrong with the arguments, the data, the checkpoint or the folder; before training.

    Example::

        report = csqcli.search("resnet18", target_bits=3, data="/imagenet", output="runs/resnet18", epochs=5)
        print(report["budget"]["mean_bits"], report["accuracy"]["hard_top1"])
    """
    resolved, display = _search_recipe(model, target_bits, data, recipe, settings, progress)

    from csqcli import pipeline

    folder = Path(output) if output is not None else search_folder(resolved)
    with preserve_global_state():
        return pipeline.search(resolved, folder, display=display, force=force, resume=resume)


@checked
def plan(
    model: str | None = None,
    *,
    target_bits: float | None = None,
    data: str | None = None,
    recipe: str = DEFAULT_RECIPE,
    progress: bool | Display = False,
    **settings: Any,
) -> Report:
    """What :func:`search` would come to, from a few of its own steps, as ``csq plan`` says it; nothing is written.

    Args:
        model, target_bits, data, recipe, settings: as for :func:`search`.
        progress: show what is going on, on stderr.

    Returns:
        ``bytes`` of the ``model`` file and of its ``bit_packed_small`` form, predicted; ``memory`` (``bytes`` of a step on ``images`` at
        once, ``free_bytes``); ``time`` (``step_seconds``, ``steps``, ``evaluation_seconds``, ``evaluations``, ``seconds`` in all);
        ``mean_bits`` (planes per weight element), ``target_mean_bits``; ``layers`` (name, shape, weights, macs, planes as far as a few
        steps tell), ``left_float``; ``recipe`` as resolved, ``method_why``.

    Raises:
        UserError: for whatever would stop the search, and for 0 epochs, which have no steps to be timed.

    Example::

        found = csqcli.plan("resnet18", target_bits=3, data="/imagenet", epochs=5)
        print(found["time"]["seconds"] / 3600, found["memory"]["bytes"], found["bytes"]["model"])
    """
    resolved, display = _search_recipe(model, target_bits, data, recipe, settings, progress)

    from csqcli import pipeline

    with preserve_global_state():
        return pipeline.plan(resolved, display=display)


@checked
def finetune(
    file: str | Path,
    *,
    data: str | None = None,
    epochs: Positive | None = None,
    teacher: str | Path | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
    trust_code: bool = False,
    **settings: Any,
) -> Report:
    """Train a quantized file's integers on, planes fixed; the better of the two models is written.

    Args:
        file: what ``search``, ``finetune`` or ``save`` wrote, in any safetensors form of ``export``; or a run's folder.
        data: as for :func:`search`.
        epochs: of this training; None takes those of the file's recipe, or 5.
        teacher: float weights that ``optimizer.distill`` and ``distill_features`` follow: a checkpoint, or a float run's folder.
        output: folder for the result; None takes ``runs/NAME-finetuned``, NAME that of the file's folder.
        resume, force, progress, settings: as for :func:`search`. The recipe is the file's own.
        trust_code: let the file import the ``package.module:factory`` that it names.

    Returns:
        The report; ``report["finetune"]`` says which model was kept, and both top-1 in percent.

    Raises:
        UserError: for anything wrong with the arguments, the file, the data or the folder.

    Example::

        report = csqcli.finetune("runs/resnet18", data="/imagenet", epochs=3, output="runs/tuned")
    """
    from csqcli.recipe.resolve import check_of_finetune
    from csqcli.system.run_files import finetune_folder, model_of

    check_of_finetune(settings)
    path = model_of(file)
    named = {
        "data.source": data,
        "finetune.epochs": epochs,
        "finetune.teacher": None if teacher is None else str(teacher),
    }
    resolved = finetune_recipe(path, together(named, settings), trust_code=trust_code)

    from csqcli import finetuning

    with preserve_global_state():
        return finetuning.finetune(
            path,
            resolved,
            Path(output) if output is not None else finetune_folder(path),
            display=display_of(progress),
            force=force,
            resume=resume,
            trust_code=trust_code,
        )


@checked
def sweep(
    model: str | None = None,
    *,
    targets: Sequence[float] | str | None = None,
    data: str | None = None,
    output: str | Path | None = None,
    recipe: str = DEFAULT_RECIPE,
    baselines: Sequence[str] = (),
    warm: bool = False,
    warm_epochs: Positive | None = None,
    seeds: Positive = 1,
    max_drop: Annotated[float, Ge(0), Le(100)] | None = None,
    jobs: Annotated[int, Ge(1), Le(1000)] | None = None,
    progress: bool = False,
    **settings: Any,
) -> Report:
    """Search one model at many targets, what they share done once, as ``csq sweep`` does it. What is there already is not run again.

    Args:
        model, data, recipe, progress, settings: as for :func:`search`.
        targets: mean planes per weight, each above 0 and at most 8, or ``"1,1.5,2"``; None, with ``max_drop``, begins with 4.
        output: folder for the runs, ``pareto.json`` and ``pareto.html``; None takes ``runs/MODEL-sweep``.
        baselines: methods to put beside, at those targets that they can meet.
        warm: begin all targets but the highest with that one's weights, for fewer epochs: cheaper, and less accurate.
        warm_epochs: epochs of the runs that do; None takes 0.4 of the others'.
        seeds: runs of every target and method, with the recipe's seed and those after it.
        max_drop: also look for the smallest file whose top-1, the mean over seeds, is at most so many points below the float model's.
        jobs: runs at a time, each in a process of its own; None runs them here, one after the other.

    Returns:
        What pareto.json holds: ``float`` (``top1`` in percent, ``bytes``, ``bops``), ``runs`` (one each: ``run``, its folder;
        ``target_bits``, ``seed``, ``mean_bits``, ``top1``, ``bytes`` of the bit-packed file, …), ``groups`` (means over seeds, one
        for each method and target: ``top1``, ``top1_sd``, …), ``max_drop``.

    Raises:
        UserError: for anything wrong with the arguments, the data or the folder; and where no run holds ``max_drop``.

    Example::

        found = csqcli.sweep("resnet18", targets=[1, 1.5, 2, 3, 4], data="/imagenet", output="runs/sweep", epochs=5)
        print([(run["target_bits"], run["top1"], run["bytes"]) for run in found["runs"] if run["on_front_bytes"]])
    """
    from csqcli.sweeping.plan import Sweep, parse_targets

    planned = Sweep(
        recipe=recipe,
        overrides=together({"model.source": model, "data.source": data}, settings),
        output=Path(output) if output is not None else None,
        targets=parse_targets(targets) if isinstance(targets, str) else targets,
        baselines=list(baselines),
        warm=warm,
        warm_epochs=warm_epochs,
        seeds=seeds,
        max_drop=max_drop,
    )
    planned.members()  # what cannot be run is known before PyTorch is loaded

    from csqcli.sweeping.launching import LocalProcesses
    from csqcli.sweeping.sweep import run_sweep

    launcher = None if jobs is None else LocalProcesses(jobs)
    with preserve_global_state():
        return run_sweep(planned, display=display_of(progress), launcher=launcher, jobs=jobs or 1)


def _search_recipe(
    model: str | None,
    target_bits: float | None,
    data: str | None,
    recipe: str,
    settings: Mapping[str, Any],
    progress: bool | Display,
) -> tuple[Recipe, Display]:
    """The recipe of a search and where its progress is shown; there, what was given and changes nothing is said."""
    from csqcli.recipe.complete import without_effect
    from csqcli.recipe.resolve import resolve

    named = {"model.source": model, "quantization.target_bits": target_bits, "data.source": data}
    typed = together(named, settings)
    resolved, display = resolve(recipe, typed), display_of(progress)
    for note in without_effect(resolved, typed):
        display.say(f"without effect: {note}")
    return resolved, display


def search_folder(recipe: Recipe) -> Path:
    """Where ``search`` writes when it is told nothing: ``runs/resnet18-3bit`` in the current folder."""
    from csqcli.system.run_files import default_folder

    settings = recipe.quantization
    model = (recipe.model.source or "model").rpartition(":")[2]
    parts = {
        "{:g}bit": settings.target_bits,
        "{}bytes": settings.target_size,
        "{:g}times": settings.target_compression,
        "{:g}bops": settings.target_bops,
        "{:g}ms": settings.target_latency,
    }
    asked = "-".join(text.format(value) for text, value in parts.items() if value is not None) or "float"
    return default_folder(model, asked)


def finetune_recipe(file: Path, overrides: Mapping[str, Any], *, trust_code: bool) -> Recipe:
    """What trains a file on: the recipe in it with ``overrides``, at its target, for 5 epochs where neither says how many."""
    from csqcli.file import header
    from csqcli.recipe.resolve import resolve_stored

    manifest = header.read_manifest(file)
    target = manifest.budget.target_mean_bits or manifest.budget.mean_bits
    section = manifest.recipe.get("quantization")
    most = section.get("max_bits") if isinstance(section, dict) else None
    if isinstance(most, int) and 0 < most < target:  # an allocator's budget may be more than there are planes
        target = float(most)
    given = {"quantization.target_bits": target, **overrides}
    found = resolve_stored(manifest.recipe, given, where=f"recipe in {file}", trust_code=trust_code)
    found.finetune.epochs = found.finetune.epochs or FINETUNE_EPOCHS
    return found
