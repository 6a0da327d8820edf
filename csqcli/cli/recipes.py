"""``csq recipes``: list, show, schema."""

from __future__ import annotations

import typer

from csqcli.cli import output
from csqcli.cli.options import JsonOption
from csqcli.cli.suggesting import Commands

app = typer.Typer(cls=Commands, help="List, show and describe recipes.", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_recipes()


@app.command("list")
def list_recipes(as_json: JsonOption = False) -> None:
    """Shipped recipes, a line each."""
    from csqcli.recipe.yaml_files import builtin_names, read

    found = [{"name": name, "description": read(name)[0].get("description", "")} for name in builtin_names()]
    if as_json:
        output.as_json(found)
    else:
        width = max(len(recipe["name"]) for recipe in found)
        output.lines([f"{recipe['name']:<{width}}  {recipe['description']}" for recipe in found], indent=width + 2)


@app.command()
def show(name: str, as_json: JsonOption = False) -> None:
    """A recipe, complete with defaults, as YAML."""
    from csqcli.recipe.resolve import resolve, to_yaml

    recipe = resolve(name, {})
    if as_json:
        output.as_json(recipe.to_dict())
    else:
        output.block(to_yaml(recipe))


@app.command()
def schema() -> None:
    """JSON schema of recipe files; every key with its meaning."""
    from csqcli.recipe.resolve import json_schema

    output.as_json(json_schema())
