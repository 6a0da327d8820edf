"""The smallest form: what folds, what must not, 16-bit numbers, and that integers and answers stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantized_models as models
import torch
from safetensors.torch import load_file

import csqcli
from csqcli.errors import UserError
from csqcli.exporting import folding
from csqcli.exporting.run import export_file
from csqcli.file import io, layout, loading
from csqcli.file.io import QuantizedFile
from csqcli.file.manifest import ActivationEntry
from csqcli.quant import activations
from csqcli.quant.layers import find_layers

NORMS = "quantized_models:Norms"
MASKS = ("11000000", "11100000")


@pytest.fixture(scope="module")
def file() -> QuantizedFile:
    return models.make_file(NORMS, MASKS, per_channel=True)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def _fold(file: QuantizedFile) -> folding.Folding:
    return folding.fold(file, loading.hard_model(file, trust_code=True), (3, 16, 16))


@torch.no_grad()
def _logits(file: QuantizedFile, images: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = loading.hard_model(file, trust_code=True)(images)
    return logits


def test_folding_changes_no_integer_and_no_answer(file: QuantizedFile, images: torch.Tensor) -> None:
    folded = _fold(file).file
    assert all(torch.equal(a.integers, b.integers) for a, b in zip(folded.layers, file.layers, strict=True))
    wanted = _logits(file, images)
    assert (_logits(folded, images) - wanted).abs().max() < 1e-5 * wanted.std()


def test_steps_fold_only_where_nothing_else_reads_the_convolution(file: QuantizedFile) -> None:
    folding_done = _fold(file)
    one_step = {layer.name for layer in folding_done.file.layers if layer.scale.numel() == 1}
    assert one_step == {"plain.weight", "linear.weight"}  # the others are read or called twice, or standardised
    assert (folding_done.norms, folding_done.steps) == (5, 2)
    assert folding_done.kept == {"bare": "has no statistics, or no scale and shift"}
    others = folding_done.file.others
    assert not others["plain.bias"].any()
    assert others["read_twice.bias"].any()
    for name in ("plain_norm", "read_twice_norm", "used_twice_norm", "standard_norm", "linear_norm"):
        assert not others[f"{name}.running_mean"].any()
        assert (others[f"{name}.running_var"] == 1).all()


def test_sixteen_bits_are_a_relative_error_of_two_to_the_minus_eleven(file: QuantizedFile) -> None:
    rounded = folding.in_16_bits(file)
    for name, value in rounded.others.items():
        if value.dtype == torch.float32:
            assert ((value - file.others[name]).abs() <= file.others[name].abs() * 2.0**-11).all(), name
            assert layout._as_float16(value) is not None, name
    assert torch.equal(folding.in_16_bits(rounded).others["plain.bias"], rounded.others["plain.bias"])


@pytest.mark.parametrize("largest", [1e-38, 3e-7, 1.0, 1000.0, 3e38])
def test_sixteen_bits_hold_tensors_of_any_magnitude(largest: float) -> None:
    value = torch.tensor([largest, -largest / 3, 0.0])
    rounded = folding._rounded(value)
    assert rounded[0] == pytest.approx(largest, rel=2.0**-11)
    assert rounded[1] == pytest.approx(-largest / 3, rel=2.0**-11)


def test_a_float32_tensor_is_stored_in_16_bits_only_where_that_is_exact(file: QuantizedFile, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    exact = torch.tensor([1.0, -0.0, 2.0**-20, 3.5e-6])
    inexact = torch.tensor([1.0, 1.0 + 2.0**-12])
    exact[3] = 2.0**-19 + 2.0**-20
    assert layout._as_float16(exact) is not None
    assert layout._as_float16(inexact) is None
    io.write(path, file, form="bit-packed")
    stored = {record.name: record.stored for record in io.read(path).manifest.packed_others}
    assert stored["bare.running_var"] is None
    assert load_file(path)["csq_float32"].numel() > 0


def test_the_small_file_is_the_model_that_it_gives_back(
    tmp_path: Path, file: QuantizedFile, images: torch.Tensor
) -> None:
    source, small = tmp_path / "a.safetensors", tmp_path / "small.safetensors"
    io.write(source, file)
    manifest = export_file(source, small, form="bit-packed-small", trust_code=True)
    again = export_file(
        small, tmp_path / "plain.safetensors", form="int8-packed", trust_code=True
    )  # and back to a plain one
    assert manifest.folded
    assert again.folded
    assert manifest.parity is not None
    assert manifest.parity.payload_sha256 == file.manifest.payload_sha256
    assert manifest.parity.notes[0] == "5 BatchNorms folded, with the per-channel steps of 2 of 6 layers"
    assert sum(manifest.sizes.parts.values()) == small.stat().st_size
    with torch.no_grad():
        answers = [csqcli.load(path, trust_code=True)(images) for path in (small, tmp_path / "plain.safetensors")]
    assert torch.equal(*answers)
    assert (answers[0] - _logits(file, images)).abs().max() < 0.01 * answers[0].std()


@pytest.mark.parametrize(("source", "share", "norms"), [("test_efficientnet", 0.8, True), ("test_vit", 0.88, False)])
def test_the_small_form_saves_with_batchnorm_and_without(
    tmp_path: Path, source: str, share: float, norms: bool
) -> None:
    file = models.make_file(f"timm:{source}", MASKS, per_channel=True)
    size = file.manifest.data_config["input_size"]
    folded = folding.in_16_bits(folding.fold(file, loading.hard_model(file), size).file)
    before = io.write(tmp_path / "a.safetensors", file, form="bit-packed")
    after = io.write(tmp_path / "b.safetensors", folded, form="bit-packed")
    assert after < share * before
    assert io.read(tmp_path / "b.safetensors").manifest.folded == norms


def test_a_folded_model_is_not_trained_on(tmp_path: Path, csq) -> None:
    io.write(tmp_path / "a.safetensors", models.make_file("csq:digits_cnn", MASKS))
    assert csq("export", tmp_path / "a.safetensors", "--bit-packed-small", "-o", tmp_path / "b.safetensors")[0] == 0
    code, _, error = csq("finetune", tmp_path / "b.safetensors", "--data", "digits", "-o", tmp_path / "run", "-q")
    assert (code, error.count("\n")) == (2, 1)
    assert "folded for inference" in error
    with pytest.raises(UserError, match="finetune the file that it was exported from"):
        csqcli.finetune(tmp_path / "b.safetensors", data="digits", output=tmp_path / "run")


def test_a_model_whose_activations_flip_in_the_last_digit_is_small_too(tmp_path: Path) -> None:
    """Folded sums differ in their last digit, which a rounded activation may show as a whole step (issue 19)."""
    file = models.make_file("timm:test_efficientnet", MASKS, per_channel=True)
    model = loading.hard_model(file)
    size = file.manifest.data_config["input_size"]
    batch = torch.randn(4, *size, generator=torch.Generator().manual_seed(2))
    quantizers = activations.calibrate(model, find_layers(model)[0], [batch], bits=3)
    file.manifest.activations = [ActivationEntry(**vars(record)) for record in quantizers.records()]
    io.write(tmp_path / "a.safetensors", file)
    manifest = export_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", form="bit-packed-small")
    parity = manifest.parity
    assert parity is not None
    assert parity.tolerance_in_std > 0.1
    assert 5e-4 < parity.max_logit_error / parity.logit_std < parity.tolerance_in_std
    assert manifest.activations == file.manifest.activations
