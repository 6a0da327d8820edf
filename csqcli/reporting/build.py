"""The report as JSON: the manifest, the training history, and for a file which of its numbers are only its own word."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from csqcli.errors import UserError
from csqcli.file.manifest import Manifest
from csqcli.reporting.recompute import recomputed
from csqcli.reporting.sparsity import LayerSparsity, described
from csqcli.system.files import read_regular
from csqcli.system.limits import read_json
from csqcli.system.run_files import METRICS_FILE

_HISTORY_BYTES = 2**26  # a line takes a few hundred
_LINE_VALUES = 2**14  # a mask per layer among them


def build(
    manifest: Manifest,
    history: list[dict[str, Any]] | None = None,
    *,
    sparsity: Mapping[str, LayerSparsity] | None = None,
) -> dict[str, Any]:
    """The report of a run: the manifest, with the file's measured size, the sparsity of its layers, and a line per epoch."""
    return manifest.model_dump(mode="json") | {"sparsity": described(sparsity or {}), "history": history or []}


def describe(path: Path) -> dict[str, Any]:
    """The report of a file, whoever made it. Numbers are recomputed; ``as_stated`` lists the fields that cannot be.

    Raises UserError for a file that is not csq's or is damaged.
    """
    found = recomputed(path)
    report = build(found.manifest, history_beside(path), sparsity=found.sparsity)
    return report | {"as_stated": found.as_stated}


def history_beside(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl beside a model; none for a file that travelled alone, or where that is no plain file."""
    try:
        lines = read_regular(file.parent / METRICS_FILE, limit=_HISTORY_BYTES).decode("utf-8").splitlines()
        return [read_json(line, nodes=_LINE_VALUES) for line in lines]
    except (OSError, ValueError, UserError):
        return []
