"""docs/report-json.md names every field that `--json` prints, and no other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from csqcli.file import manifest
from csqcli.file.manifest import Manifest, Record
from csqcli.training.run_state import AdaptationRecord

TEXT = (Path(__file__).parents[2] / "docs" / "report-json.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([a-z0-9_]+)`", TEXT))
FREE = {
    "settings",
    "arguments",
    "environment",
    "recipe",
    "versions",
    "data_config",
    "parts",
}  # whose keys are not csq's


def fields_of(value: object) -> Iterator[str]:
    if isinstance(value, list):
        for part in value[:1]:
            yield from fields_of(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            if key not in FREE:
                yield from fields_of(part)


def test_every_field_of_a_manifest_is_described() -> None:
    records = [kind for kind in vars(manifest).values() if isinstance(kind, type) and issubclass(kind, Record)]
    known = {name for kind in records for name in kind.model_fields}
    assert len(records) > 8
    assert known - NAMED == set()
    assert set(Manifest.model_fields) <= known


def test_every_field_that_commands_print_is_described(digits_run: Path, csq) -> None:
    printed = set(AdaptationRecord.model_fields) - {"sha256"}
    for command in (
        f"report {digits_run} --json",
        f"evaluate {digits_run / 'model.safetensors'} --data digits --val-limit 20 --json",
        "inspect digits_cnn --json",
        "methods --json",
        "recipes list --json",
    ):
        code, out, err = csq(*command.split())
        assert code == 0, err
        printed |= set(fields_of(json.loads(out)))
    printed |= set(fields_of(json.loads((digits_run / "report.json").read_text())))
    assert printed - NAMED == set()
