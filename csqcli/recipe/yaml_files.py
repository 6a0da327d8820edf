"""Recipes and other YAML as plain values: shipped ones by name, files under limits. Nothing is checked yet."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from csqcli.errors import UserError, did_you_mean
from csqcli.system.limits import MAX_DEPTH, check_tree

_MAX_BYTES, _MAX_VALUES = 2**18, 10_000  # of a recipe file; a rule per layer of the largest model takes less
_MERGE = "tag:yaml.org,2002:merge"  # <<: may stand as often as one likes


def shipped() -> Path:
    """Shipped recipes: inside the installed package, or `recipes/` beside it in a checkout."""
    installed = Path(str(resources.files("csqcli"))) / "recipes"
    return installed if installed.is_dir() else installed.parent.parent / "recipes"


def builtin_names() -> list[str]:
    """Names of the recipes that ship with csq."""
    return sorted(file.stem for file in shipped().glob("*.yaml"))


def read(name_or_file: str) -> tuple[dict[str, Any], str]:
    """A recipe's raw mapping, by shipped name or by path, and what to call it in messages."""
    if name_or_file in builtin_names():
        text, where = (shipped() / f"{name_or_file}.yaml").read_text(encoding="utf-8"), f"recipe {name_or_file}"
    else:
        path = Path(name_or_file)
        if not path.is_file():
            hint = did_you_mean(name_or_file, builtin_names()) or f"shipped recipes: {', '.join(builtin_names())}"
            raise UserError("no such recipe or file", where=name_or_file, hint=hint)
        text, where = _text_of(path), str(path)
    raw = _values(text, where) or {}
    if not isinstance(raw, dict):
        raise UserError("a recipe is a mapping of settings", where=where)
    return raw, where


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file, under the limits of a recipe. UserError for what cannot be read."""
    return _values(_text_of(path), str(path))


def _text_of(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"is larger than {_MAX_BYTES:,} bytes", where=str(path), hint="give a recipe")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read ({error})", where=str(path)) from None


def _values(text: str, where: str) -> Any:
    try:
        return load_yaml(text)
    except ValueError as error:
        raise UserError(f"not valid YAML: {error}", where=where) from None


class _Loader(yaml.SafeLoader):
    """Stops where the nesting gets deep, which PyYAML reads in quadratic time, and at a key that occurs twice in a mapping."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE]
        twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
        if twice is not None:
            raise yaml.YAMLError(f"`{twice}` occurs twice in one section; the first would be lost")
        return super().construct_mapping(node, deep=deep)


def load_yaml(text: str) -> Any:
    """YAML of plain values: no objects, and no more of them than a recipe needs. ValueError for anything else."""
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, LookupError, AttributeError, TypeError) as error:  # PyYAML's own slips too
        raise ValueError(error) from None
    check_tree(value, nodes=_MAX_VALUES)
    return value
