"""``csq init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csqcli.cli import output as out
from csqcli.cli.options import DataOption, SetOption, with_settings
from csqcli.errors import UserError
from csqcli.recipe import DEFAULT_RECIPE


def init(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A timm or torchvision name, or package.module:factory.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="The recipe to start from: a shipped name, or a YAML file.")
    ] = DEFAULT_RECIPE,
    target_bits: Annotated[float | None, typer.Option(help="Mean bits (planes) per weight not to exceed.")] = None,
    data: DataOption = None,
    method: Annotated[str | None, typer.Option(help="As for search; its settings are written too.")] = None,
    settings: SetOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write a recipe to edit, with every setting explained.

    Example: csq init resnet18 --target-bits 3 --data /imagenet -o mine.yaml
    """
    from csqcli.models.spec import parse
    from csqcli.recipe.commented import commented
    from csqcli.recipe.complete import still_missing
    from csqcli.recipe.resolve import resolve
    from csqcli.system.files import write_text

    typed = {
        "model.source": model,
        "quantization.target_bits": target_bits,
        "data.source": data,
        "quantization.method": method,
    }
    overrides = with_settings(typed, settings)
    resolved = resolve(recipe, overrides)
    if resolved.model.source is not None:
        parse(resolved.model.source)  # a name that no library has is not written down
    text = commented(resolved, keep=set(overrides))
    if output.exists() and not force:
        raise UserError("exists already", where=str(output), hint="pass --force to replace it, or -o another")
    write_text(output, text)
    missing = still_missing(resolved)
    without = f" without {' and '.join(missing)}" if missing else ""
    out.line(f"wrote {output}{without}; {' '.join(['csq search', *missing.values(), f'--recipe {output}'])}")
