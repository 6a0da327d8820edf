"""What every section of a recipe is made of: strict pydantic models whose docstrings are their help.

Marks stand on fields, so that no list of names elsewhere can go stale: :data:`RESULT_NEUTRAL` for settings that do not
change what a run delivers, :data:`HASHED_ELSEWHERE` for a path of which the file's content does, whose hash a run keeps by itself,
and :data:`USERS_ONLY` for settings that a recipe inside a model file may not make, because they name what is read, imported or
started.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

RESULT_NEUTRAL = "result-neutral"
HASHED_ELSEWHERE = "hashed-elsewhere"
USERS_ONLY = "users-only"
LARGE = 1e6  # beyond every rate and strength that means anything; squares of it are still numbers in float32


class Section(BaseModel):
    """A mapping of settings. Unknown keys, NaN and infinities are errors; a field's docstring is its help text."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_assignment=True, allow_inf_nan=False
    )

    @classmethod
    def keys_marked(cls, mark: str) -> Iterator[tuple[str, ...]]:
        """Paths of the fields that carry ``mark``: ``("data", "workers")``."""
        for name, field in cls.model_fields.items():
            if mark in field.metadata:
                yield (name,)
            elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from ((name, *rest) for rest in field.annotation.keys_marked(mark))

    @classmethod
    def leaves(cls) -> list[str]:
        """Dotted names of every setting, sections unfolded."""
        names: list[str] = []
        for name, field in cls.model_fields.items():
            if field.exclude:
                continue
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                names += [f"{name}.{leaf}" for leaf in field.annotation.leaves()]
            else:
                names.append(name)
        return names


def without(tree: dict[str, Any], paths: Iterator[tuple[str, ...]]) -> dict[str, Any]:
    """A copy of a nested mapping that lacks the given paths; those it does not have are passed over."""
    left = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for path in paths:
        section: Any = left
        for name in path[:-1]:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(path[-1], None)
    return left


def flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Dotted keys of a nested mapping and their values: ``{"data.workers": 2}``. An empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inside = isinstance(value, Mapping) and value
        found |= flat(value, f"{before}{key}.") if inside else {f"{before}{key}": value}
    return found
