"""The manifest's schema: code can write only what it names, files of later versions are read for what is known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from quantized_models import make_file

from csqcli.file import header, io
from csqcli.file.manifest import AccuracyRecord, Manifest, ModelRecord


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    """A manifest as a JSON object."""
    return json.loads(make_file("csq:digits_cnn").manifest.model_dump_json())


def test_code_cannot_write_a_field_that_the_schema_does_not_have(raw: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="acuracy"):
        Manifest(**raw, acuracy={})
    with pytest.raises(ValidationError, match="top1"):
        AccuracyRecord(top1=50.0)
    manifest = Manifest(**raw)
    with pytest.raises(ValueError, match="acuracy"):
        manifest.acuracy = 3
    with pytest.raises(TypeError, match="Manifest has no field acuracy"):
        manifest.model_copy(update={"acuracy": 3})
    with pytest.raises(TypeError, match="acuracy"):
        io.assemble(None, [], record=None, data_config={}, target_bits=None, acuracy=None)


def test_what_a_later_version_added_is_passed_over_at_every_depth(raw: dict[str, Any]) -> None:
    later = json.loads(json.dumps(raw)) | {"moons": 2}
    later["model"]["moons"] = later["layers"][0]["moons"] = 2
    assert header.parse_manifest(json.dumps(later), where="file").model_dump(mode="json") == raw


def test_a_part_that_was_made_already_is_taken_as_it_is(raw: dict[str, Any]) -> None:
    record = ModelRecord(source="m:f", library="factory", name="m:f", num_classes=2, weights_from="random")
    assert Manifest(**raw | {"model": record}).model == record


def test_two_layers_of_one_name_are_refused(raw: dict[str, Any]) -> None:
    twice = json.loads(json.dumps(raw))
    twice["layers"][1]["aliases"] = [twice["layers"][0]["name"]]
    with pytest.raises(ValidationError, match="two tensors or modules have the same name"):
        Manifest(**twice)


@pytest.mark.parametrize("module", ["manifest", "header", "codes", "deflate", "sizes"])
def test_the_schema_and_its_readers_need_no_torch(module: str) -> None:
    script = f"import sys, csqcli.file.{module}; assert not {{'torch', 'timm', 'onnx'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
