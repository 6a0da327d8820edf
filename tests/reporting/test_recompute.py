"""A report shows numbers that were counted, and says which of them only the file claims."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_models import make_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from csqcli.errors import UserError
from csqcli.file import header, io
from csqcli.file.io import QuantizedFile
from csqcli.reporting.build import describe, history_beside
from csqcli.reporting.histogram import histogram, magnitude_name
from csqcli.reporting.recompute import recomputed

FORMS = ("compact", "int8-packed", "bit-packed", "state-dict")
TRAPS = "quantized_models:Traps"


@pytest.fixture(scope="module")
def file() -> QuantizedFile:
    return make_file(TRAPS)


@pytest.mark.parametrize("form", FORMS)
def test_what_the_writer_counted_is_what_is_counted_again(file: QuantizedFile, tmp_path: Path, form: str) -> None:
    io.write(tmp_path / "a.safetensors", file, form=form)  # type: ignore[arg-type]
    counted, _, histograms, _ = recomputed(tmp_path / "a.safetensors")
    assert sum(counted.sizes.parts.values()) == counted.sizes.file_bytes
    assert counted.sizes.model_copy(update={"file_bytes": None, "parts": {}}) == file.manifest.sizes
    assert [layer.entropy_bits for layer in counted.layers] == [r.entropy_bits for r in file.manifest.layers]
    for layer in file.layers:
        found, integers = histograms[layer.name], layer.integers
        assert (found.low, found.high) == (int(integers.min()), int(integers.max()))
        zeros, ones = int((integers == 0).sum()), int((integers.abs() == 1).sum())
        assert (found.magnitudes[0], sum(found.magnitudes[1:2])) == (zeros, ones)
        assert sum(found.magnitudes) == sum(found.bins) == integers.numel()


def test_integers_are_grouped_by_magnitude_and_into_bins_of_one_width() -> None:
    found = histogram(np.array([5, 0, 7, 1, 0, 0, 0, 0, 2]), low=-2)  # -2: 5, 0: 7, 1: 1, 6: 2
    assert (found.low, found.high) == (-2, 6)
    assert found.magnitudes == (7, 1, 5, 2)  # 0, ±1, ±2…3, ±4…7
    assert found.bins == (0, 0, 0, 0, 5, 0, 7, 1, 0, 0, 0, 0, 2)  # -6 … 6
    wide = histogram(np.ones(255, dtype=np.int64), low=-127)
    assert (len(wide.bins), sum(wide.bins)) == (33, 255)
    assert max(wide.bins) - min(wide.bins) <= 1
    assert [magnitude_name(bits) for bits in range(4)] == ["0", "±1", "±2…3", "±4…7"]


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_lies_about_its_size_is_reported_as_it_is(file: QuantizedFile, tmp_path: Path, form: str) -> None:
    honest = file.manifest.model_copy(deep=True)
    lying = QuantizedFile(file.manifest.model_copy(deep=True), file.layers, file.others)
    lying.manifest.sizes.float_bytes *= 100
    lying.manifest.sizes.paper_compression = 99.0
    lying.manifest.sizes.stored_bits_per_weight = lying.manifest.sizes.entropy_bits_per_weight = 0.1
    for layer in lying.manifest.layers:
        layer.stored_bits, layer.entropy_bits = 1, 0.1
    io.write(tmp_path / "a.safetensors", lying, form=form)  # type: ignore[arg-type]
    report = describe(tmp_path / "a.safetensors")
    report["sizes"].pop("file_bytes")
    report["sizes"].pop("parts")
    assert report["sizes"] == honest.sizes.model_dump(exclude={"file_bytes", "parts"})
    assert [layer["stored_bits"] for layer in report["layers"]] == [layer.stored_bits for layer in honest.layers]


def test_bit_operations_are_recomputed_and_macs_are_marked(digits_run: Path, tmp_path: Path, csq) -> None:
    file = io.read(digits_run / "model.safetensors")
    assert file.manifest.compute is not None
    wanted = file.manifest.compute.bops
    file.manifest.compute.bops = 1
    file.manifest.sizes.file_bytes = None
    io.write(tmp_path / "a.safetensors", file)
    report = describe(tmp_path / "a.safetensors")
    assert report["compute"]["bops"] == wanted
    assert {"accuracy", "compute.macs"} <= set(report["as_stated"])
    out = csq("report", tmp_path / "a.safetensors")[1]
    assert "bit operations; MACs as stated in the file" in out
    assert "of 500 images, as stated in the file" in out


def _without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    "edit",
    [
        _without("head.weight_packed"),
        lambda tensors: tensors.update({"head.weight_packed": tensors["head.weight_packed"][:-1].clone()}),
        lambda tensors: tensors.update({"head.weight_packed": tensors["head.weight_packed"].float()}),
        lambda tensors: tensors.update({"head.weight_packed": tensors["head.weight_packed"].to(torch.bfloat16)}),
    ],
)
def test_payloads_that_are_not_the_layers_are_one_clear_line(file: QuantizedFile, tmp_path: Path, edit) -> None:
    path = tmp_path / "a.safetensors"
    io.write(path, file)
    tensors = load_file(path)
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    edit(tensors)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match=r"layer head\.weight: .*the file is damaged") as caught:
        describe(path)
    assert "\n" not in caught.value.line()


def test_history_is_read_from_a_plain_file_below_a_limit_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, metrics = tmp_path / "model.safetensors", tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps({"epoch": 1}) + "\n")
    assert history_beside(model) == [{"epoch": 1}]
    monkeypatch.setattr("csqcli.reporting.build._HISTORY_BYTES", 3)
    assert history_beside(model) == []
    monkeypatch.undo()
    metrics.rename(tmp_path / "elsewhere")
    metrics.symlink_to(tmp_path / "elsewhere")
    assert history_beside(model) == []
    metrics.unlink()
    os.mkfifo(metrics)  # would wait for a writer
    assert history_beside(model) == []


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.int64])
def test_a_manifest_of_a_type_that_numpy_lacks_is_damaged(
    file: QuantizedFile, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "a.safetensors"
    io.write(path, file, form="bit-packed")
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    assert header.MANIFEST_TENSOR in tensors
    save_file(tensors | {header.MANIFEST_TENSOR: tensors[header.MANIFEST_TENSOR].to(dtype)}, path, metadata=metadata)
    with pytest.raises(UserError, match="manifest is damaged"):
        describe(path)
