"""``csq search``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csqcli.cli.options import (
    LOG_EVERY,
    BatchOption,
    CheckpointOption,
    DataOption,
    DeviceOption,
    ForceOption,
    HeadOption,
    JsonOption,
    LatencyEngineOption,
    LatencyTableOption,
    LogOption,
    PlanesOption,
    PretrainedOption,
    QuietOption,
    RecipeOption,
    ResumeOption,
    SetOption,
    TargetBopsOption,
    TargetLatencyOption,
    TrackOption,
    TrialsOption,
    ValSplitOption,
    WeightsOption,
    batch_settings,
    model_settings,
    val_split,
    with_settings,
)
from csqcli.cli.output import print_plan, result_of_run
from csqcli.recipe import DEFAULT_RECIPE
from csqcli.system.choices import Amp
from csqcli.system.launcher import is_main_process

if TYPE_CHECKING:
    from csqcli.recipe.schema import Recipe
    from csqcli.system.progress import Display


def search(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="timm or torchvision name, timm:NAME, torchvision:NAME, or package.module:factory."
        ),
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Mean bits (planes) per weight not to exceed; fractions are fine.")
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="In place of --target-bits or beside it: bytes of the exported file, e.g. 2MB or 500kB.",
        ),
    ] = None,
    target_compression: Annotated[
        float | None,
        typer.Option(
            help="In place of --target-bits or beside it: how many times smaller than float that file must be."
        ),
    ] = None,
    target_bops: TargetBopsOption = None,
    target_latency: TargetLatencyOption = None,
    latency_table: LatencyTableOption = None,
    latency_engine: LatencyEngineOption = None,
    data: DataOption = None,
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|zeroq",
            help="With --epochs 0: a folder of images to calibrate on, without labels; zeroq makes images from BatchNorm's statistics.",
        ),
    ] = None,
    val_split_: ValSplitOption = None,
    checkpoint: CheckpointOption = None,
    weights: WeightsOption = None,
    input_size: Annotated[
        int | None, typer.Option(help="Side of the images in pixels; the model's own if unset.")
    ] = None,
    head: HeadOption = None,
    recipe: RecipeOption = DEFAULT_RECIPE,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the model and its report; runs/MODEL-TARGETbit if unset."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="auto, a name that `csq methods` lists, or package.module:Class.")
    ] = None,
    allocator: Annotated[
        str | None,
        typer.Option(help="Who decides the planes before training: a name that `csq methods` lists, or your own."),
    ] = None,
    planes: PlanesOption = None,
    trials: TrialsOption = None,
    cost: Annotated[
        str | None,
        typer.Option(help="What the budget counts: weights, bops (bit operations) or package.module:function."),
    ] = None,
    act_bits: Annotated[
        str | None,
        typer.Option(help="Bits of layer inputs: 32 (float) or 1 to 8; auto for one width per layer."),
    ] = None,
    target_act_bits: Annotated[
        float | None, typer.Option(help="Mean bits of layer inputs, for --act-bits auto, which it implies.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of training; 0 is post-training quantization.")] = None,
    float_epochs: Annotated[int | None, typer.Option(help="Epochs in float first, before the search.")] = None,
    finetune_epochs: Annotated[int | None, typer.Option(help="Further epochs with the planes fixed.")] = None,
    distill: Annotated[
        float | None, typer.Option(help="Share of the loss that follows the float model, 0 to 1.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of the search.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that load images; does not change the result.")] = None,
    amp: Annotated[Amp | None, typer.Option(help="Train in bfloat16; auto does on a GPU.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data order, augmentation and fresh weights.")] = None,
    batch_size: BatchOption = None,
    device: DeviceOption = None,
    compile_: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Train through torch.compile.")
    ] = None,
    pretrained: PretrainedOption = None,
    settings: SetOption = None,
    force: ForceOption = False,
    resume: ResumeOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan that `csq plan` prints, and write nothing.")
    ] = False,
    log: TrackOption = None,
    log_every: LogOption = LOG_EVERY,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find how many bits each layer needs, and write that model.

    The budget is the mean over all weights (--target-bits), or bytes, operations or milliseconds. A layer of k planes
    holds integers of k binary digits and a sign; a layer of 0 planes is all zeros.

    Example: csq search resnet18 --target-bits 3 --data /imagenet --output runs/resnet18
    """
    options = dict(locals())
    if dry_run:
        print_plan_of(options)
        return
    from csqcli.api.runs import search_folder

    resolved, display, notes = _asked_for(options)
    target = output or search_folder(resolved)
    display.say(f"recipe {recipe}: {resolved.model.source} on {resolved.data.source}, into {target}")
    for note in notes:
        display.say(note)

    with display.step("loading PyTorch"):
        from csqcli import pipeline
        from csqcli.system.run_files import MODEL_FILE

    report = pipeline.search(resolved, target, display=display, force=force, resume=resume)
    result_of_run(target / MODEL_FILE, report, json_wanted=as_json, display=display)


def print_plan_of(options: Mapping[str, Any], *, verbose: bool = False) -> None:
    """Print the plan of the search that these options of it ask for."""
    resolved, display, notes = _asked_for(options)
    display.say(
        f"recipe {options['recipe']}: a plan for {resolved.model.source} on {resolved.data.source}; nothing is written"
    )
    for note in notes:
        display.say(note)
    with display.step("loading PyTorch"):
        from csqcli import pipeline

    print_plan(pipeline.plan(resolved, display=display), json_wanted=options["as_json"], verbose=verbose)


def _asked_for(options: Mapping[str, Any]) -> tuple[Recipe, Display, list[str]]:
    """The complete recipe that the options of a search ask for, the display that they ask for, and what to say of options that
    change nothing or take the place of what a file of planes says."""
    from csqcli.recipe.complete import check_complete, without_effect
    from csqcli.recipe.planes import replaced_target
    from csqcli.recipe.resolve import resolve
    from csqcli.system.progress import Display

    typed = search_settings(options)
    resolved = resolve(options["recipe"], typed)
    check_complete(resolved)
    display = Display(quiet=options["quiet"] or not is_main_process(), log_every=options["log_every"])
    notes = [f"without effect: {note}" for note in without_effect(resolved, typed)]
    if note := replaced_target(options.get("planes"), typed):
        notes.append(note)
    return resolved, display, notes


def search_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted recipe key: value} of what was typed. ``options`` are those of `csq search` by name; a command that has only some of
    them gives those."""
    get = options.get
    amp, planes_file, engine = get("amp"), get("planes"), get("latency_engine")
    held_out = val_split(get("val_split_"))
    model, data, checkpoint, device = (get(name) for name in ("model", "data", "checkpoint", "device"))
    named = {key: get(option) for option, key in _KEYS.items()}
    typed = {
        **model_settings(model, data, checkpoint, get("weights"), get("head"), get("pretrained"), device, held_out),
        **named,
        "quantization.latency_engine": engine,
        "quantization.act_bits": _width(get("act_bits"), get("target_act_bits")),
        "amp": amp,
        **batch_settings(get("batch_size")),
    }
    from csqcli.recipe.planes import read_planes

    written = read_planes(planes_file) if planes_file is not None else {}
    return written | with_settings(typed, get("settings"))


_KEYS = {
    "target_bits": "quantization.target_bits",
    "target_size": "quantization.target_size",
    "target_compression": "quantization.target_compression",
    "target_bops": "quantization.target_bops",
    "target_latency": "quantization.target_latency",
    "latency_table": "quantization.latency_table",
    "input_size": "data.input_size",
    "calib": "data.calib",
    "method": "quantization.method",
    "allocator": "quantization.allocator",
    "trials": "quantization.trials",
    "cost": "quantization.cost",
    "target_act_bits": "quantization.target_act_bits",
    "epochs": "epochs",
    "float_epochs": "adaptation.epochs",
    "finetune_epochs": "finetune.epochs",
    "distill": "optimizer.distill",
    "lr": "optimizer.lr",
    "workers": "data.workers",
    "seed": "seed",
    "log": "log",
    "compile_": "compile",
}  # options whose value is the recipe's as it is


def _width(typed: str | None, mean: float | None) -> int | str | None:
    """``--act-bits`` as a recipe has it: a number, or `auto`, which a mean implies."""
    if typed is None:
        return "auto" if mean is not None else None
    return int(typed) if typed.isascii() and typed.isdigit() and len(typed) < 4 else typed
