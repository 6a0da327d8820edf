"""``csq sensitivity``."""

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
    LogOption,
    LookLimitOption,
    PretrainedOption,
    QuietOption,
    RecipeOption,
    SetOption,
    ValSplitOption,
    WeightsOption,
    model_settings,
    settings_beside,
    val_split,
    with_settings,
)
from csqcli.errors import UserError
from csqcli.recipe import DEFAULT_RECIPE


def sensitivity(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A timm or torchvision name, or package.module:factory.")
    ] = None,
    data: DataOption = None,
    val_split_: ValSplitOption = None,
    val_limit: LookLimitOption = 256,
    widths: Annotated[str, typer.Option(metavar="N,N", help="Planes to round each layer to.")] = "1,2,3,4",
    checkpoint: CheckpointOption = None,
    weights: WeightsOption = None,
    head: HeadOption = None,
    pretrained: PretrainedOption = None,
    recipe: RecipeOption = DEFAULT_RECIPE,
    device: DeviceOption = None,
    settings: SetOption = None,
    svg: Annotated[Path | None, typer.Option(metavar="OUT", help="Write the figure, OUT.svg.")] = None,
    log_every: LogOption = LOG_EVERY,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure what rounding each layer alone costs.

    Loss and top-1 with that one layer rounded, at each width, before any training.

    Example: csq sensitivity resnet18 --data /imagenet
    """
    from csqcli import api
    from csqcli.system.progress import Display

    if svg is not None and (svg.suffix.lower() != ".svg" or not svg.parent.is_dir()):
        what = "the figure's name must end in .svg" if svg.suffix.lower() != ".svg" else "no such folder"
        raise UserError(what, where=str(svg if svg.suffix.lower() != ".svg" else svg.parent))
    named: dict[str, Any] = {
        "recipe": recipe,
        "widths": _numbers(widths),
        "val_limit": val_limit,
        "progress": Display(quiet=quiet, log_every=log_every),
    }
    typed = model_settings(model, data, checkpoint, weights, head, pretrained, device, val_split(val_split_))
    found = api.sensitivity(**named, **with_settings(typed, settings_beside(named, settings, context)))
    if svg is not None:
        from csqcli.reporting.analyses import sensitivity_figure
        from csqcli.system.files import write_text

        write_text(svg, sensitivity_figure(found).svg())
    if as_json:
        output.as_json(found)
        return
    from csqcli.reporting.analyses import print_sensitivity

    print_sensitivity(found, output.console())
    if svg is not None:
        output.line(f"wrote {svg}")


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 4 for part in parts):
        raise UserError(
            f"`{text}` is not a list of widths", where="--widths", hint="whole numbers from 1 to 8, as 1,2,4"
        )
    return [int(part) for part in parts]
