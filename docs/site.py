"""What mkdocs calls: reference pages made from the commands, the recipe's models, the functions and the file's schema, so that they
cannot go stale; and links to files outside docs/, which a site does not have, become their names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

import csqcli
from csqcli.cli.app import app
from csqcli.file.manifest import Manifest
from csqcli.quant.catalog import CARDS
from csqcli.recipe.schema import Recipe

FUNCTIONS = (*(name for name in csqcli.__all__ if name not in ("CSQ", "UserError")), "CSQ")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are generated."""
    pages = {"cli": _cli(), "recipe": _recipe(), "python": _python(), "manifest": _manifest()}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """``[CHANGELOG](../CHANGELOG.md)`` becomes ``CHANGELOG``."""
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?!.*docs/)[^)]*\)", r"\1", markdown)


def _cli() -> str:
    lines = ["# Commands", "", "Generated from the commands themselves; `csq COMMAND -h` prints the same.", ""]
    lines += _command(typer.main.get_command(app), ("csq",))
    return "\n".join(lines)


def _command(command: Any, path: tuple[str, ...]) -> Iterator[str]:
    name = " ".join(path)
    if len(path) > 1:
        summary, _, example = (command.help or "").partition("Example: ")
        yield from (f"## {name}", "", " ".join(summary.split()), "")
        if example:
            yield from ("```sh", " ".join(example.split()), "```", "")
        yield from _parameters(command)
    for inner in getattr(command, "commands", {}).values():
        yield from _command(inner, (*path, inner.name))


def _parameters(command: Any) -> Iterator[str]:
    rows = []
    for parameter in command.params:
        option = parameter.param_type_name == "option"
        names = (
            [*parameter.opts, *parameter.secondary_opts] if option else [parameter.metavar or parameter.name.upper()]
        )
        default = parameter.default
        shown = "" if default in (None, False) or callable(default) else f"`{getattr(default, 'value', default)}`"
        what = " ".join((getattr(parameter, "help", None) or "").split())
        rows.append(f"| {', '.join(f'`{name}`' for name in names)} | {_cell(what)} | {_cell(shown)} |")
    if rows:
        yield from ("| | | default |", "|---|---|---|", *rows, "")


def _recipe() -> str:
    lines = [
        "# Recipes",
        "",
        "Generated from the models that check them. A recipe is YAML; any key can be set with `--set section.key=value`, and",
        "`csq init` writes one with all of this in it.",
        "",
        "## The run",
        "",
        "| key | | default |",
        "|---|---|---|",
    ]
    sections: list[tuple[str, type[BaseModel]]] = []
    for name, field in Recipe.model_fields.items():
        if field.exclude:
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections.append((name, field.annotation))
        else:
            lines.append(_row(name, field))
    sections += [(card.section, card.settings) for card in CARDS.values() if card.settings.model_fields]
    seen: set[str] = set()
    for name, model in sections:
        if name not in seen:
            seen.add(name)
            lines += ["", f"## {name}", "", _cell((model.__doc__ or "").split("\n\n")[0]), ""]
            lines += ["| key | | default |", "|---|---|---|"]
            lines += [_row(key, field) for key, field in model.model_fields.items()]
    return "\n".join(lines)


def _row(key: str, field: Any) -> str:
    default = field.get_default(call_default_factory=True)
    shown = "" if default is None or isinstance(default, BaseModel) else f"`{default}`"
    return f"| `{key}` | {_cell(field.description or '')} | {_cell(shown)} |"


def _python() -> str:
    lines = [
        "# Python",
        "",
        "`import csqcli`: what the commands do with models, and `CSQ`, an optimizer for a loop of your own.",
        "",
    ]
    for name in FUNCTIONS:
        lines += [f"::: csqcli.{'quant.optimizer.CSQ' if name == 'CSQ' else f'api.{name}'}", ""]
    return "\n".join(lines)


def _manifest() -> str:
    schema = Manifest.model_json_schema()
    lines = [
        "# The manifest in a file",
        "",
        "A model file carries a JSON text under the key `csq` of its safetensors header: this. Generated from the models that",
        "check it when a file is read; unknown fields are refused.",
    ]
    parts = {"Manifest": schema} | schema.get("$defs", {})
    for name, part in parts.items():
        lines += ["", f"## {name}", "", _cell((part.get("description") or "").split("\n\n")[0]), ""]
        if part.get("properties"):
            lines += ["| field | type | |", "|---|---|---|"]
        for field, what in part.get("properties", {}).items():
            kinds = [what, *what.get("anyOf", [])]
            types = ", ".join(
                k.get("type") or k.get("$ref", "").rpartition("/")[2] for k in kinds if "type" in k or "$ref" in k
            )
            lines.append(f"| `{field}` | {types} | {_cell(what.get('description', ''))} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
