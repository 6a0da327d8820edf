"""The lines of metrics.jsonl as series over epochs. Anybody may have written them: what is no number is passed over."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PHASES = ("float", "search", "finetune")


@dataclass(frozen=True)
class PlaneChange:
    """A plane of a layer that was switched during training."""

    epoch: int  # over all phases, from 1; at whose end it was found so
    layer: str
    plane: int  # 0 the least significant
    on: bool


def lines_of(history: Sequence[Any]) -> list[Mapping[str, Any]]:
    """The lines that are mappings."""
    return [line for line in history if isinstance(line, Mapping)]


def series(history: Sequence[Any], key: str) -> list[tuple[float, float | None]]:
    """(epoch, value) of a key, epochs counted over all phases; None where a line has no such number."""
    return [(number, _number(line.get(key))) for number, line in enumerate(lines_of(history), 1)]


def values(history: Sequence[Any], key: str) -> list[float]:
    """The numbers of a key, in order."""
    return [value for _, value in series(history, key) if value is not None]


def phase_starts(history: Sequence[Any]) -> list[tuple[float, str]]:
    """(epoch, phase) of every phase after the first."""
    phases = [line.get("phase") for line in lines_of(history)]
    pairs = enumerate(itertools.pairwise(phases), 2)
    return [(number, phase) for number, (before, phase) in pairs if phase != before and phase in PHASES]


def masks(history: Sequence[Any], layers: int) -> dict[int, list[str]]:
    """Epoch → a mask per layer, most significant plane first; of the epochs for which the run recorded so many."""
    found = {}
    for number, line in enumerate(lines_of(history), 1):
        written = line.get("masks")
        if isinstance(written, list) and len(written) == layers and all(map(_is_mask, written)):
            found[number] = written
    return found


def plane_changes(by_epoch: Mapping[int, Sequence[str]], names: Sequence[str]) -> Iterator[PlaneChange]:
    """Which plane of which layer went off or on, and by which epoch; before the first one all planes were on."""
    before: Sequence[str] = ["1" * 8] * len(names)
    for epoch, now in by_epoch.items():
        for name, old, new in zip(names, before, now, strict=True):
            width = len(new)
            for plane, (was, is_) in enumerate(zip(old[:width], new, strict=False)):
                if was != is_:
                    yield PlaneChange(epoch, name, width - 1 - plane, is_ == "1")
        before = now


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    number = float(value) if abs(value) < 1e300 else math.inf
    return number if math.isfinite(number) else None


def _is_mask(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= 8 and not set(value) - {"0", "1"}
