"""Layers with a learned basis in a file: what is read is what was written, and what contradicts it is one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from csqcli.errors import UserError
from csqcli.file import header, io
from csqcli.file.manifest import ModelRecord
from csqcli.models.networks import DIGITS_CONFIG
from csqcli.quant.hard_layer import HardLayer, top_planes


def written(path: Path, **change: object) -> Path:
    model = nn.Sequential(nn.Linear(4, 3))
    record = ModelRecord(source="m:f", library="factory", name="m:f", num_classes=3, weights_from="random")
    layer = HardLayer(
        "0.weight",
        torch.tensor([[-3, -1, 1, 3]] * 3, dtype=torch.int32),
        torch.ones(1),
        top_planes(2, 8),
        basis=torch.tensor([[0.1, 0.2, 0.3], [0.7, 0.5, 0.4]]),
    )
    file = io.assemble(
        model, [replace(layer, **change)], record=record, data_config=DIGITS_CONFIG, target_bits=2.0  # type: ignore[arg-type]
    )  # fmt: skip
    io.write(path, file)
    return path


def test_the_weights_are_the_signed_sums_of_the_basis(tmp_path: Path) -> None:
    back = io.read(written(tmp_path / "a.safetensors"))
    expected = [  # −v0 − v1, v0 − v1, −v0 + v1, v0 + v1 of each channel
        [-0.8, -0.6, 0.6, 0.8],
        [-0.7, -0.3, 0.3, 0.7],
        [-0.7, -0.1, 0.1, 0.7],
    ]
    torch.testing.assert_close(back.layers[0].weight(), torch.tensor(expected))
    manifest = header.read_manifest(tmp_path / "a.safetensors")
    assert (manifest.schema_version, manifest.layers[0].stored_bits) == (2, 2)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda t, m: m.update(schema_version=1), r"manifest is damaged \(a learned basis in schema version 1\)"),
        (lambda t, m: t.pop("0.weight_basis"), "layer 0.weight: tensor 0.weight_basis is missing"),
        (lambda t, m: t.update({"0.weight_basis": torch.ones(3, 3)}), r"layer 0.weight: basis of shape \[3, 3\]"),
        (lambda t, m: t["0.weight_basis"].add_(1), "layer 0.weight: basis disagrees with the manifest"),
        (lambda t, m: t["0.weight_basis"].fill_(3e38), "layer 0.weight: levels that are not finite"),
        (lambda t, m: m["layers"][0].update(basis=[[1.0]]), "0.weight: a basis of 1 rows of"),
        (lambda t, m: m["layers"][0].update(mask="10100000"), "0.weight: a basis on planes that have a gap"),
    ],
)
def test_a_basis_that_contradicts_its_file_is_refused(tmp_path: Path, edit, complaint: str) -> None:
    source, target = written(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    tensors = load_file(source)
    with safe_open(source, framework="pt") as file:
        manifest = json.loads(file.metadata()["csq"])
    edit(tensors, manifest)
    save_file(tensors, target, metadata={"csq": json.dumps(manifest)})
    with pytest.raises(UserError, match=complaint):
        io.read(target)


def test_even_integers_on_a_basis_are_refused(tmp_path: Path) -> None:
    integers = torch.tensor([[-3, 0, 1, 3]] * 3, dtype=torch.int32)
    path = written(tmp_path / "a.safetensors", integers=integers)
    with pytest.raises(UserError, match=r"layer 0.weight: even integers, which no digits ±1 form"):
        io.read(path)
