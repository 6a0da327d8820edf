"""`--torchao`: a file that torchao reads without csq, the searched integers in its own tensors."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import quantized_models as models
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from csqcli.errors import UserError
from csqcli.exporting import run, runtime, verify
from csqcli.file import header, io, loading
from csqcli.file.io import QuantizedFile
from csqcli.reporting.recompute import recomputed

SOURCE = "tests.exporting.test_torchao:Small"
NARROW = ("11100000", "11000000", "11110000")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs the [torchao] extra")


class Small(nn.Module):
    """A convolution, a parameter of the network's own, linear layers; one is tied, one is read by attention itself."""

    data_config: ClassVar[dict] = models.SMALL_IMAGES

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.position = nn.Parameter(0.02 * torch.randn(1, 36, 16))
        self.stem = nn.Conv2d(3, 16, 2, stride=2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.hidden = nn.Linear(16, 24)
        self.tied, self.tied_too = nn.Linear(24, 24), nn.Linear(24, 24, bias=False)
        self.tied_too.weight = self.tied.weight
        self.head = nn.Linear(24, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2) + self.position
        x = torch.relu(self.hidden(x + self.attention(x, x, x)[0]))
        return self.head(torch.relu(self.tied_too(torch.relu(self.tied(x)))).mean(1))


def _file(masks: tuple[str, ...] = NARROW, *, per_channel: bool = False) -> QuantizedFile:
    return models.make_file(SOURCE, masks, per_channel=per_channel)


def _rows(file: QuantizedFile) -> dict[str, str]:
    """Two layers as torchao describes them, by hand: what `flatten_tensor_state_dict` of torchao 0.18 gives."""
    described = {}
    for layer in file.layers:
        if layer.name in ("hidden.weight", "head.weight"):
            block = [1 if layer.scale.numel() > 1 else layer.integers.shape[0], layer.integers.shape[1]]
            data = {"act_quant_kwargs": None, "reduce_range": False, "block_size": block}
            data["dtype"] = {"_type": "torch.dtype", "_data": "float32"}
            entry = {"_type": "Int8Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale"]}
            described[layer.name] = json.dumps(entry)
    return described


@pytest.mark.parametrize("per_channel", [False, True])
def test_csq_reads_the_layout_without_torchao(tmp_path: Path, per_channel: bool) -> None:
    file = _file(per_channel=per_channel)
    io.write(tmp_path / "a.safetensors", file, form="torchao", rows=_rows(file))
    again = io.read(tmp_path / "a.safetensors")
    for layer, wanted in zip(again.layers, file.layers, strict=True):
        verify.check_layer(layer, wanted)
    verify.check_others(again.others, file.others)
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors["hidden._weight_qdata"].dtype == torch.int8
    assert tensors["hidden._weight_scale"].shape == ((24, 1) if per_channel else (1, 1))
    assert "hidden.weight" not in tensors
    assert tensors["stem.weight"].dtype == torch.float32
    stated = recomputed(tmp_path / "a.safetensors").manifest.sizes
    assert stated.entropy_bits_per_weight == pytest.approx(file.manifest.sizes.entropy_bits_per_weight, abs=1e-4)


def test_integers_that_were_changed_or_widened_are_one_clear_line(tmp_path: Path) -> None:
    file, path = _file(), tmp_path / "a.safetensors"
    io.write(path, file, form="torchao", rows=_rows(file))
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    honest = load_file(path)
    for tensor, complaint in (
        (honest["hidden._weight_qdata"].flip(0), "do not match their sha-256"),
        (honest["hidden._weight_qdata"].int(), "layer hidden.weight: integers of shape"),
    ):
        save_file(honest | {"hidden._weight_qdata": tensor.contiguous()}, path, metadata=metadata)
        with pytest.raises(UserError, match=complaint):
            io.read(path)


def test_a_model_that_rounds_activations_is_refused(tmp_path: Path, csq: Any) -> None:
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("needs the [torchao] extra")
    path = Path(__file__).parents[1] / "file" / "fixtures" / "digits_schema1.safetensors"
    code, _, error = csq("export", path, "--torchao", "-o", tmp_path / "a.safetensors")
    assert (code, error.count("\n")) == (2, 1)
    assert "rounds the inputs of its layers" in error


def test_a_missing_torchao_is_one_line_with_the_pip_command(
    digits_run: Path, tmp_path: Path, csq: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = runtime.importlib.import_module

    def import_module(name: str) -> Any:
        if name.startswith("torchao"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return honest(name)

    monkeypatch.setattr(runtime.importlib, "import_module", import_module)
    code, _, error = csq("export", digits_run / "model.safetensors", "--torchao", "-o", tmp_path / "a.safetensors")
    assert (code, error) == (2, "csq: error: torchao: needs the package torchao; pip install 'csq[torchao]'\n")


@needs_torchao
@pytest.mark.parametrize("per_channel", [False, True])
def test_torchao_gets_the_searched_integers_and_computes_the_hard_model(tmp_path: Path, per_channel: bool) -> None:
    file = _file(per_channel=per_channel)
    io.write(tmp_path / "model.safetensors", file)
    manifest = run.export_file(
        tmp_path / "model.safetensors", tmp_path / "a.safetensors", form="torchao", trust_code=True
    )
    assert manifest.parity is not None
    assert manifest.parity.max_logit_error <= 5e-4 * manifest.parity.logit_std
    encodings = {record.name: record.encoding for record in manifest.layers}
    assert {name for name, encoding in encodings.items() if encoding == header.ROWS} == {"hidden.weight", "head.weight"}
    assert manifest.parity.notes[0].startswith(f"2 of {len(file.layers)} layers are int8 in torchao")
    model = loading.load_file(tmp_path / "a.safetensors", trust_code=True)
    images = torch.randn(2, 3, 12, 12)
    wanted = loading.load_file(tmp_path / "model.safetensors", trust_code=True)
    assert torch.equal(model(images), wanted(images))


@needs_torchao
def test_torchaos_description_of_a_layer_is_what_the_layout_test_has_by_hand(tmp_path: Path) -> None:
    file = _file(per_channel=True)
    io.write(tmp_path / "model.safetensors", file)
    run.export_file(tmp_path / "model.safetensors", tmp_path / "a.safetensors", form="torchao", trust_code=True)
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        metadata = opened.metadata()
    for name, description in _rows(file).items():
        assert json.loads(metadata[name]) == json.loads(description)
    assert json.loads(metadata["tensor_names"]) == ["hidden.weight", "head.weight"]


@needs_torchao
def test_the_documented_reader_needs_no_csq(tmp_path: Path) -> None:
    """The code in docs/export.md, in a process that cannot import csq."""
    file = models.make_file("timm:test_vit", NARROW)
    io.write(tmp_path / "model.safetensors", file)
    run.export_file(tmp_path / "model.safetensors", tmp_path / "a.safetensors", form="torchao")
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    block = text.split("### torchao")[1].split("```python\n")[1].split("```")[0]
    for written, here in (
        ("model.safetensors", str(tmp_path / "a.safetensors")),
        ("vit_tiny_patch16_224", "test_vit"),
        ("num_classes=1000", "num_classes=10"),
    ):
        assert written in block
        block = block.replace(written, here)
    script = f"""
import sys
sys.modules["csqcli"] = None
{block}
print(type(model.blocks[0].mlp.fc1.weight).__name__, model(torch.zeros(1, 3, 160, 160)).shape[1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Int8Tensor", "10"]
