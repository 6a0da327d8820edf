"""Files of planes: what `csq allocate --output FILE` writes and `csq search --planes FILE` trains.

target_bits: 3.0        # optional: the budget that the planes are held against; one that is typed beside replaces it
planes:
  conv1.weight: 5       # a weight's name, or a glob; where several lines match a weight, the last one counts
  "layer4.*": 2
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from csqcli.errors import UserError, did_you_mean, no_such_file
from csqcli.quant.names import MOST_PLANES
from csqcli.recipe.yaml_files import read_yaml

_KEYS = ("target_bits", "planes")


def read_planes(path: Path) -> dict[str, Any]:
    """The settings that a file of planes stands for: dotted recipe keys → values. UserError for anything else."""
    if not path.is_file():
        raise no_such_file(path)
    raw, where = read_yaml(path), str(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("planes"), dict):
        raise UserError("holds no `planes`", where=where, hint="write `planes:` and a line `NAME: COUNT` per weight")
    for key in raw:
        if key not in _KEYS:
            hint = did_you_mean(str(key), _KEYS) or f"it may hold {' and '.join(_KEYS)}"
            raise UserError(f"unknown key `{key}`", where=where, hint=hint)
    for name, count in raw["planes"].items():
        if not isinstance(name, str) or type(count) is not int or not 0 <= count <= MOST_PLANES:
            hint = f"a name or glob of weights, and a whole number from 0 to {MOST_PLANES}"
            raise UserError(f"`{name}: {count}` does not say how many planes a weight has", where=where, hint=hint)
    target = raw.get("target_bits")
    settings = {"quantization.planes": raw["planes"], "quantization.allocator": "manual"}
    return settings | ({"quantization.target_bits": target} if target is not None else {})


def replaced_target(path: Path | None, overrides: Mapping[str, Any]) -> str:
    """A line that says so where the target of a file of planes gives way to another one that was typed; else empty."""
    written = read_planes(path).get("quantization.target_bits") if path is not None else None
    asked = [overrides.get(key) for key in ("quantization.target_bits", "target_bits")]
    other = next((target for target in asked if target not in (None, written)), None)
    return f"{path}: its target_bits {written} gives way to {other}" if None not in (written, other) else ""


def planes_text(planes: Mapping[str, int], *, target_bits: float, comment: str) -> str:
    """A file of planes, as :func:`read_planes` takes it; ``comment`` is its first line."""
    content = yaml.safe_dump({"target_bits": target_bits, "planes": dict(planes)}, sort_keys=False, allow_unicode=True)
    return f"# {' '.join(comment.split())}\n{content}"
