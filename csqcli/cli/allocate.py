"""``csq allocate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from csqcli.cli import output
from csqcli.cli.options import (
    LOG_EVERY,
    CheckpointOption,
    DataOption,
    DeviceOption,
    HeadOption,
    JsonOption,
    LatencyEngineOption,
    LatencyTableOption,
    LogOption,
    PlanesOption,
    PretrainedOption,
    QuietOption,
    RecipeOption,
    SetOption,
    TargetBopsOption,
    TargetLatencyOption,
    TrialsOption,
    ValSplitOption,
    WeightsOption,
    model_settings,
    settings_beside,
    val_split,
    with_settings,
)
from csqcli.recipe import DEFAULT_RECIPE


def allocate(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A timm or torchvision name, or package.module:factory.")
    ] = None,
    allocator: Annotated[
        str | None,
        typer.Option(help="A name that `csq methods` lists, or package.module:function; importance if unset."),
    ] = None,
    target_bits: Annotated[float | None, typer.Option(help="Mean bits (planes) per weight not to exceed.")] = None,
    target_bops: TargetBopsOption = None,
    target_latency: TargetLatencyOption = None,
    latency_table: LatencyTableOption = None,
    latency_engine: LatencyEngineOption = None,
    data: DataOption = None,
    val_split_: ValSplitOption = None,
    checkpoint: CheckpointOption = None,
    weights: WeightsOption = None,
    head: HeadOption = None,
    pretrained: PretrainedOption = None,
    recipe: RecipeOption = DEFAULT_RECIPE,
    cost: Annotated[
        str | None,
        typer.Option(help="What the budget counts: weights, bops (bit operations) or package.module:function."),
    ] = None,
    planes: PlanesOption = None,
    trials: TrialsOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the images and of what an allocator draws.")] = None,
    device: DeviceOption = None,
    settings: SetOption = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="Write the planes, for csq search --planes.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    log_every: LogOption = LOG_EVERY,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Print the bits that each layer would get, without training.

    Example: csq allocate resnet18 --allocator hawq-v2 --target-bits 3 --data /imagenet
    """
    from csqcli import api
    from csqcli.recipe.planes import read_planes, replaced_target
    from csqcli.system.progress import Display

    written = read_planes(planes) if planes is not None else {}
    typed = {
        **model_settings(model, data, checkpoint, weights, head, pretrained, device, val_split(val_split_)),
        "quantization.target_bits": target_bits,
        "quantization.target_bops": target_bops,
        "quantization.target_latency": target_latency,
        "quantization.latency_table": latency_table,
        "quantization.latency_engine": latency_engine,
        "quantization.allocator": allocator,
        "quantization.cost": cost,
        "quantization.trials": trials,
        "seed": seed,
    }
    display = Display(quiet=quiet, log_every=log_every)
    named: dict[str, Any] = {"recipe": recipe, "output": output_file, "force": force, "progress": display}
    overrides = written | with_settings(typed, settings_beside(named, settings, context))
    if note := replaced_target(planes, overrides):
        display.say(note)
    found = api.allocate(**named, **overrides)
    if as_json:
        output.as_json(found)
        return
    from csqcli.reporting.analyses import print_allocation

    print_allocation(found, output.console())
    if output_file is not None:
        output.line(f"wrote {output_file}")
