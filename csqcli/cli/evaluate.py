"""``csq evaluate``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from csqcli.cli import output
from csqcli.cli.options import DeviceOption, FileArgument, JsonOption, TrustOption, ValLimitOption
from csqcli.data.specs import help_text


def evaluate(
    file: FileArgument,
    data: Annotated[str, typer.Option("--data", help=f"Images, of which the validation split is used: {help_text()}")],
    device: DeviceOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step; does not change the result.")] = 256,
    val_limit: ValLimitOption = None,
    trust_code: TrustOption = False,
    classes_by_position: Annotated[
        bool, typer.Option("--classes-by-position", help="Match classes by their numbers, whatever their names.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Top-1 and top-5 of the hard model, as reloaded from the file."""
    from csqcli import api
    from csqcli.file.header import read_manifest

    read_manifest(file)  # what is wrong with the file is said before torch is imported
    result = api.evaluate(
        file,
        data,
        device=device.value if device else "auto",
        batch_size=batch_size,
        val_limit=val_limit,
        trust_code=trust_code,
        classes_by_position=classes_by_position,
    )
    if as_json:
        output.block(json.dumps(result))
    else:
        output.line(f"top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  of {result['samples']} images")
