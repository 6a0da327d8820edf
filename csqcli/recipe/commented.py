"""A recipe to edit: every setting with its meaning; what is set stands as it is, what has its default stands behind a ``#``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Set
from typing import Any

import yaml
from pydantic import BaseModel

from csqcli.recipe.resolve import resolve_from
from csqcli.recipe.schema import Recipe

_WIDTH = 110


def commented(recipe: Recipe, *, keep: Set[str] = frozenset()) -> str:
    """YAML that resolves to ``recipe``, as it does when a ``#`` before a key is removed.

    Args:
        keep: dotted keys that stand without a ``#`` even at their default.
    """
    wanted = recipe.to_dict()
    without = resolve_from(yaml.safe_load(_written(recipe, keep)), {}, where="recipe").to_dict()
    # a default may follow from another key, as max_bits does from act_bits: what was set against it stands too
    return _written(recipe, keep | set(_differing(wanted, without)))


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in one.items():
        if isinstance(value, Mapping) and isinstance(other.get(key), Mapping) and not path:
            yield from _differing(value, other[key], f"{key}.")
        elif other.get(key) != value:
            yield f"{path}{key}"


def _written(recipe: Recipe, keep: Set[str]) -> str:
    lines = [
        "# A recipe of csq. A key behind a # has its default: remove the # to set it.",
        "# csq search --recipe THIS_FILE; what is typed on the command line wins.",
    ]
    for name, field in Recipe.model_fields.items():
        if field.exclude:
            continue
        value = getattr(recipe, name)
        lines.append("")
        if isinstance(value, BaseModel):
            lines += _section(name, value, keep)
        else:
            lines += _entry(name, value, field.description, default=field.default, live=name in keep)
    settings = recipe.method_settings
    if type(settings).model_fields:
        lines += ["", *_section(recipe.card.section, settings, keep)]
    return "\n".join(lines) + "\n"


def _section(name: str, section: BaseModel, keep: Set[str]) -> list[str]:
    body: list[tuple[bool, list[str]]] = []
    for key, field in type(section).model_fields.items():
        default = field.get_default(call_default_factory=True)
        live = getattr(section, key) != default or f"{name}.{key}" in keep
        entry = _entry(key, getattr(section, key), field.description, default=default, live=live)
        body.append((live, entry))
    any_live = any(live for live, _ in body)
    lines = [*_help((type(section).__doc__ or "").split("\n\n")[0]), f"{'' if any_live else '#'}{name}:"]
    for live, entry in body:
        for line in entry:
            is_key = not line.startswith("# ")
            bare = line.removeprefix("#") if is_key else line
            if is_key and not live:
                lines.append(f"  #{bare}" if any_live else f"#  {bare}")
            else:
                lines.append(f"  {bare}")
    return lines


def _entry(name: str, value: Any, description: str | None, *, default: Any, live: bool) -> list[str]:
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    shown = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10**6)
    mark = "" if live or value != default else "#"
    return [*_help(description or ""), f"{mark}{name}: {shown.removesuffix('...' + chr(10)).strip()}"]


def _help(text: str) -> Iterator[str]:
    for line in textwrap.wrap(" ".join(text.split()), _WIDTH):
        yield f"# {line}"
