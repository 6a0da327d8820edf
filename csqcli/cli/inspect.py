"""``csq inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from csqcli.cli import output
from csqcli.cli.options import JsonOption
from csqcli.errors import UserError


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A timm or torchvision name, or package.module:factory.")
    ],
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="Load the library's weights.")
    ] = False,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob of weights that stay float. Repeatable.")] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Classes of the head; the library's own if unset.")
    ] = None,
    input_size: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Side of the images in pixels; the model's own if unset.")
    ] = None,
    strict: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fail when less than this share of parameters is covered.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what csq would quantize in a model, and what not.

    Example: csq inspect resnet18 --exclude "fc*"
    """
    from csqcli import api

    found = api.inspect(
        model, input_size=input_size, exclude=exclude or (), num_classes=num_classes, pretrained=pretrained
    )
    if as_json:
        output.as_json(found)
    else:
        from csqcli.reporting.terminal import print_coverage

        print_coverage(found, output.console())
    if strict is not None and found["parameter_share"] < strict:
        raise UserError(
            f"only {found['parameter_share']:.4f} of the parameters are covered",
            where=model,
            hint=f"--strict asks for {strict:g}",
        )
