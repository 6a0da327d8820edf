"""``csq recipes``: list, show, schema."""

from __future__ import annotations

import json

import typer

from csqcli.cli import output

app = typer.Typer(help="List, show and describe recipes.", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_recipes()


@app.command("list")
def list_recipes() -> None:
    """Shipped recipes, a line each."""
    from csqcli.recipe.resolve import builtin_names, read

    for name in builtin_names():
        output.line(f"{name:<20} {read(name)[0].get('description', '')}")


@app.command()
def show(name: str) -> None:
    """A recipe, complete with defaults, as YAML."""
    from csqcli.recipe.resolve import resolve, to_yaml

    output.block(to_yaml(resolve(name, {})))


@app.command()
def schema() -> None:
    """JSON schema of recipe files; every key with its meaning."""
    from csqcli.recipe.resolve import json_schema

    output.block(json.dumps(json_schema(), indent=2, ensure_ascii=False))
