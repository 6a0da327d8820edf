"""``csq diff``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csqcli.cli import output
from csqcli.cli.options import (
    LOG_EVERY,
    DataOption,
    DeviceOption,
    JsonOption,
    LogOption,
    LookLimitOption,
    QuietOption,
    TrustOption,
    ValSplitOption,
    WorkersOption,
    val_split,
)
from csqcli.data.specs import WORKERS
from csqcli.errors import no_data_given


def diff(
    float_: Annotated[
        str,
        typer.Argument(
            metavar="FLOAT", help="A checkpoint, a csq file or run, or the model's name for its own weights."
        ),
    ],
    quantized: Annotated[
        Path,
        typer.Argument(
            metavar="QUANTIZED", help="A run's folder, a safetensors file of csq, or an ONNX or LiteRT export."
        ),
    ],
    data: DataOption = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="An ONNX or LiteRT export of QUANTIZED, to be run in its engine beside."),
    ] = None,
    val_split_: ValSplitOption = None,
    val_limit: LookLimitOption = 64,
    device: DeviceOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step; does not change the result.")] = 16,
    workers: WorkersOption = WORKERS,
    trust_code: TrustOption = False,
    log_every: LogOption = LOG_EVERY,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare every layer's output with the float model's.

    As signal-to-noise ratios in dB, worst first.

    Example: csq diff resnet18 runs/resnet18 --data /imagenet
    """
    from csqcli import api
    from csqcli.file.header import read_manifest
    from csqcli.system.progress import Display
    from csqcli.system.run_files import model_of

    if data is None:
        raise no_data_given()
    read_manifest(model_of(quantized))  # what is wrong with the file is said before torch is imported
    found = api.diff(
        float_,
        quantized,
        data,
        export=export,
        val_limit=val_limit,
        device=device or "auto",
        batch_size=batch_size,
        workers=workers,
        val_split=val_split(val_split_),
        trust_code=trust_code,
        progress=Display(quiet=quiet, log_every=log_every),
    )
    if as_json:
        output.as_json(found)
        return
    from csqcli.reporting.analyses import print_diff

    print_diff(found, output.console())
