"""``csq evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from csqcli.cli import output
from csqcli.cli.options import (
    LOG_EVERY,
    DeviceOption,
    JsonOption,
    LogOption,
    QuietOption,
    TrustOption,
    ValLimitOption,
    ValSplitOption,
    WeightsOption,
    WorkersOption,
    settings_beside,
    val_split,
    with_settings,
)
from csqcli.data.specs import WORKERS, help_text
from csqcli.errors import UserError, no_data_given


def evaluate(
    context: typer.Context,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="A run's folder or any file that csq wrote; with --model any checkpoint."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help=f"Images, of which the validation split is used: {help_text()}")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Measure this float model instead: RUN is its checkpoint; without RUN, the library's own weights."
        ),
    ] = None,
    weights: WeightsOption = None,
    input_size: Annotated[int | None, typer.Option(min=1, help="Side of the images in pixels, with --model.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="With --model, how its images are prepared: data.mean, data.std, data.interpolation, data.crop_pct. Repeatable.",
        ),
    ] = None,
    device: DeviceOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step; does not change the result.")] = 256,
    val_split_: ValSplitOption = None,
    val_limit: ValLimitOption = None,
    workers: WorkersOption = WORKERS,
    trust_code: TrustOption = False,
    classes_by_position: Annotated[
        bool, typer.Option("--classes-by-position", help="Match classes by their numbers, whatever their names.")
    ] = False,
    log_every: LogOption = LOG_EVERY,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the accuracy of a model that csq wrote.

    Top-1 and top-5 of the weights as they are in the file; with --model, of a float checkpoint.

    Example: csq evaluate runs/resnet18 --data /imagenet
    """
    from csqcli import api
    from csqcli.file.header import read_manifest
    from csqcli.system.progress import Display, counted
    from csqcli.system.run_files import model_of

    if data is None:
        raise no_data_given()
    if file is None and model is None:
        raise UserError("no run or file given", hint="name one that csq wrote, or a float model by --model")
    if file is not None and model is None:
        file = model_of(file)
        read_manifest(file)  # what is wrong with the file is said before torch is imported
    display = Display(quiet=quiet, log_every=log_every, names_steps=False)
    named: dict[str, Any] = {
        "file": file,
        "data": data,
        "model": model,
        "weights": weights or "auto",
        "input_size": input_size,
        "device": device or "auto",
        "batch_size": batch_size,
        "workers": workers,
        "val_split": val_split(val_split_),
        "val_limit": val_limit,
        "trust_code": trust_code,
        "classes_by_position": classes_by_position,
        "progress": display,
    }
    assigned = settings_beside(named, settings, context)
    with_settings({"data.input_size": input_size}, assigned)  # refuses two values, by the options' names
    with display.step("loading PyTorch"):
        from csqcli import evaluating  # noqa: F401  # what api.evaluate imports
    result = api.evaluate(**named, **assigned)
    if as_json:
        output.as_json(result)
    else:
        present = result["top1_present"]
        among = f"  among the data's classes {present:.2f} %" if present is not None else ""
        output.line(
            f"top-1 {result['top1']:.2f} %{among}  top-5 {result['top5']:.2f} %  of {counted(result['samples'], 'image')}"
        )
