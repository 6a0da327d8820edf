"""What is on disk is what was evaluated, and damage is noticed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantized_models import harden, make_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import csqcli
from csqcli.errors import UserError
from csqcli.file import codes, header, io
from csqcli.file.manifest import ModelRecord
from csqcli.models.networks import DIGITS_CONFIG
from csqcli.quant.hard_layer import HardLayer


def test_integers_times_scale_are_the_reloaded_weights_bit_for_bit(digits_run: Path) -> None:
    file = io.read(digits_run / "model.safetensors")
    model = csqcli.load(digits_run / "model.safetensors")
    weights = dict(model.named_parameters())
    assert len(file.layers) == 4
    for layer in file.layers:
        scale = layer.scale.view(-1, *[1] * (layer.integers.dim() - 1))
        assert torch.equal(weights[layer.name], layer.integers.float() * scale)
        assert layer.integers.abs().max() > 0


def test_integers_use_no_plane_that_the_mask_leaves_out(digits_run: Path) -> None:
    for layer in io.read(digits_run / "model.safetensors").layers:
        mask = "".join("1" if bit else "0" for bit in reversed(layer.mask.tolist())).strip("0")
        assert int(layer.integers.abs().max()) < 2 ** len(mask)
        if "0" not in mask:
            continue
        planes = [b for b, on in enumerate(reversed(mask)) if on == "1"]
        reachable = {0}
        for plane in planes:
            reachable = {value + digit * 2**plane for value in reachable for digit in (-1, 0, 1)}
        assert set(layer.integers.flatten().tolist()) <= reachable


def test_the_file_is_as_small_as_its_entropy_says(digits_run: Path) -> None:
    manifest = header.read_manifest(digits_run / "model.safetensors")
    packed_bits = 8 * sum(layer.packed_bytes for layer in manifest.layers)
    entropy_bits = sum(layer.entropy_bits * layer.weights for layer in manifest.layers)
    assert (
        0.99 * entropy_bits <= packed_bits <= 1.25 * entropy_bits + 8 * 150 * len(manifest.layers)
    )  # tables dominate tiny layers
    assert manifest.sizes.file_bytes == (digits_run / "model.safetensors").stat().st_size


def test_a_file_read_and_written_again_is_identical(digits_run: Path, tmp_path: Path) -> None:
    original = digits_run / "model.safetensors"
    file = io.read(original)
    file.manifest.sizes.file_bytes = None
    io.write(tmp_path / "again.safetensors", file)
    assert (tmp_path / "again.safetensors").read_bytes() == original.read_bytes()


def test_everything_not_quantized_stands_under_its_own_name(digits_run: Path) -> None:
    with safe_open(digits_run / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {"bn1.running_mean", "fc.bias", "conv1.weight_packed", "conv1.weight_scale"} <= names
    assert "conv1.weight" not in names


def _tampered(source: Path, target: Path, edit) -> Path:
    tensors = load_file(source)
    with safe_open(source, framework="pt") as file:
        manifest = json.loads(file.metadata()["csq"])
    edit(tensors, manifest)
    save_file(tensors, target, metadata={"csq": json.dumps(manifest)})
    return target


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda t, m: t["fc.weight_packed"].copy_(t["fc.weight_packed"].flip(0)), "damaged"),
        (lambda t, m: t.pop("fc.weight_packed"), "layer fc.weight: tensor fc.weight_packed is missing"),
        (lambda t, m: m["layers"][0].update(mask="2x"), "mask"),
        (lambda t, m: m["layers"][0].update(shape=[10**9, 10**9]), "damaged"),
        (lambda t, m: m["layers"][0].pop("shape"), "manifest is damaged"),
        (lambda t, m: m.update(schema_version=99), "schema version 99"),
        (lambda t, m: t.update({"fc.weight_scale": torch.tensor([float("nan")])}), "scale is not finite"),
        (lambda t, m: t["conv2.weight_packed"].zero_(), "damaged"),
    ],
)
def test_damage_is_one_clear_line(digits_run: Path, tmp_path: Path, edit, complaint: str) -> None:
    broken = _tampered(digits_run / "model.safetensors", tmp_path / "broken.safetensors", edit)
    with pytest.raises(UserError, match=complaint) as caught:
        io.read(broken)
    assert "\n" not in caught.value.line()


def test_a_file_that_names_a_factory_is_not_imported_without_consent(digits_run: Path, tmp_path: Path) -> None:
    def edit(tensors, manifest):
        manifest["model"].update(library="factory", name="os:getcwd", source="os:getcwd")

    stranger = _tampered(digits_run / "model.safetensors", tmp_path / "stranger.safetensors", edit)
    with pytest.raises(UserError, match=r"asks to import `os:getcwd`; pass --trust-code"):
        csqcli.load(stranger)


def test_stored_bits_count_the_span_of_the_mask_and_a_sign() -> None:
    def stored(mask: str) -> int:
        bits = torch.tensor([c == "1" for c in reversed(mask)])
        return HardLayer("w", torch.zeros(1, dtype=torch.int32), torch.ones(1), bits).stored_bits

    assert stored("11100000") == 4  # three planes, a sign
    assert stored("10110000") == 5  # the hole is stored too
    assert stored("00000001") == 2
    assert stored("00000000") == 0


class _Tied(nn.Module):
    """Two linear layers sharing one weight, one of them transposed convolution-free: the simplest tied model."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(4, num_classes, bias=False)
        self.second = nn.Linear(4, num_classes)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_a_bound_that_is_infinite_by_design_is_stored_and_nan_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    model[0].register_buffer("upper", torch.tensor(float("inf")))
    record = ModelRecord(source="m:f", library="factory", name="m:f", num_classes=2, weights_from="random")
    layers = harden(model)
    file = io.assemble(model, layers, record=record, data_config=DIGITS_CONFIG, target_bits=None)
    assert file.state_dict()["0.upper"] == float("inf")
    model[1].running_mean[1] = float("inf")
    with pytest.raises(UserError, match=r"1.running_mean: training left NaN or infinite values"):
        io.assemble(model, layers, record=record, data_config=DIGITS_CONFIG, target_bits=None)


def test_tied_weights_are_stored_once_and_load_under_both_names(tmp_path: Path) -> None:
    from csqcli.quant.layers import find_layers
    from csqcli.quant.methods.base import Schedule, plan_for
    from csqcli.quant.methods.csq import BitLevelCSQ

    model = _Tied()
    layers, _ = find_layers(model)
    method = BitLevelCSQ(layers, plan_for(layers, 3.0, Schedule(1, 1)))
    method.harden(0)
    record = ModelRecord(
        source="tests:_Tied", library="factory", name="tests:_Tied", num_classes=4, weights_from="random"
    )
    file = io.assemble(model, method.hard_layers(), record=record, data_config=DIGITS_CONFIG, target_bits=3.0)
    io.write(tmp_path / "tied.safetensors", file)
    state = io.read(tmp_path / "tied.safetensors").state_dict()
    assert [layer.name for layer in layers] == ["first.weight"]
    assert file.manifest.sizes.float_bytes == 4 * (16 + 4)  # the weight once, and a bias
    fresh = _Tied()
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh.second.weight, model.first.weight)


def test_a_layer_is_encoded_once_and_anew_only_where_it_was_replaced(tmp_path: Path, monkeypatch) -> None:
    encoded: list[int] = []
    honest = codes.encode
    monkeypatch.setattr(codes, "encode", lambda integers: encoded.append(integers.size) or honest(integers))
    file = make_file("csq:digits_cnn")
    sizes = [layer.integers.numel() for layer in file.layers]
    assert encoded == sizes
    io.write(tmp_path / "a.safetensors", file)
    io.write(tmp_path / "b.safetensors", file, form="bit-packed")
    assert encoded == sizes
    file.layers[1] = replace(file.layers[1], integers=torch.zeros_like(file.layers[1].integers))
    file.manifest.payload_sha256 = io.payload_sha256(file.layers)
    io.write(tmp_path / "c.safetensors", file)
    assert encoded == [*sizes, sizes[1]]
    assert not io.read(tmp_path / "c.safetensors").layers[1].integers.any()
