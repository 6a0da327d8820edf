"""``csq explain``."""

from __future__ import annotations

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
    RunArgument,
    TrustOption,
    ValSplitOption,
    WorkersOption,
    val_split,
)
from csqcli.data.specs import WORKERS
from csqcli.errors import UserError, no_data_given


def explain(
    run: RunArgument,
    data: DataOption = None,
    val_split_: ValSplitOption = None,
    val_limit: LookLimitOption = 512,
    swaps: Annotated[int, typer.Option(min=0, max=10_000, help="Swaps of a plane between two layers to try out.")] = 12,
    device: DeviceOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step; does not change the result.")] = 256,
    workers: WorkersOption = WORKERS,
    trust_code: TrustOption = False,
    log_every: LogOption = LOG_EVERY,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say why each layer has the bits that it has.

    What each of its planes saves, what one less and one more would do, and the best swaps between layers.

    Example: csq explain runs/resnet18 --data /imagenet
    """
    from csqcli.file.header import GRAPHS, read_manifest
    from csqcli.system.progress import Display
    from csqcli.system.run_files import model_of

    if data is None:
        raise no_data_given()
    if (file := model_of(run)).suffix in GRAPHS:
        raise UserError("its weights are inside of a graph", where=str(file), hint="explain the file it was made from")
    read_manifest(file)  # what is wrong with the file is said before torch is imported
    from csqcli import api

    found = api.explain(
        file,
        data,
        val_limit=val_limit,
        swaps=swaps,
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
    from csqcli.reporting.analyses import print_explanation

    print_explanation(found, output.console())
