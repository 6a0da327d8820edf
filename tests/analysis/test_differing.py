"""`csq diff` says what comparing every layer's output by hand says; `csq compare` what the reports say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import quantized_models
import torch
from torch import Tensor, nn

import csqcli
from csqcli.data.specs import open_data
from csqcli.file import io
from csqcli.file.checkpoint import open_checkpoint
from csqcli.file.loading import hard_model
from csqcli.models.fitting import load_for

pytestmark = pytest.mark.usefixtures("remembered_traces")


def recorded(model: nn.Module, images: Tensor, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs of modules that are called once."""
    inputs, outputs = {}, {}
    handles = []
    for name in names:

        def hook(module: nn.Module, given: tuple, output: Tensor, name: str = name) -> None:
            inputs[name], outputs[name] = given[0], output

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return inputs, outputs


def decibels(wanted: Tensor, found: Tensor) -> float:
    a, b = wanted.double().numpy(), found.double().numpy()
    return 10 * np.log10((a**2).sum() / ((a - b) ** 2).sum())


def _thirty_digits(file: Path) -> tuple[torch.Tensor, nn.Module]:
    """Validation images as the file's data config has them, and the float model that it was made from."""
    config = io.read(file).manifest.data_config
    pixels = open_data("digits", train=False, val_limit=30).val.pixels
    assert pixels is not None
    classes = [str(d) for d in range(10)]
    model = load_for("digits_cnn", classes, checkpoint=open_checkpoint("builtin:digits_float")).loaded.model
    return (pixels.float() / 255 - config["mean"][0]) / config["std"][0], model


def test_ratios_are_those_of_outputs_recorded_by_hand(digits_run: Path) -> None:
    file = digits_run / "model.safetensors"
    found = csqcli.diff("builtin:digits_float", digits_run, "digits", val_limit=30, batch_size=7)
    images, float_ = _thirty_digits(file)
    hard = csqcli.load(file)
    names = ["conv1", "conv2", "conv3", "fc"]
    inputs, wanted = recorded(float_, images, names)
    _, outputs = recorded(hard, images, names)
    rows = {row["name"]: row for row in found["layers"]}
    assert found["images"] == 30
    for name in names:
        row = rows[f"{name}.weight"]
        assert row["hard"] == pytest.approx(decibels(wanted[name], outputs[name]), abs=1e-3)
        with torch.no_grad():
            alone = hard.get_submodule(name)(inputs[name])
        assert row["own"] == pytest.approx(decibels(wanted[name], alone), abs=1e-3)
        assert row["signal"] == pytest.approx(float(wanted[name].double().square().mean()), rel=1e-4)
        assert row["engine"] is None
    ratios = [row["hard"] for row in found["layers"]]
    assert ratios == sorted(ratios)
    assert found["logits"]["hard"] == pytest.approx(rows["fc.weight"]["hard"], abs=1e-6)


def test_a_model_against_itself_differs_nowhere(digits_run: Path) -> None:
    found = csqcli.diff(digits_run, digits_run, "digits", val_limit=10)
    assert [(row["own"], row["hard"], row["noise"]) for row in found["layers"]] == [(None, None, 0.0)] * 4
    assert found["logits"]["agreement"] == 100


@pytest.fixture(scope="module")
def traps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, list[str]]:
    """An ONNX export of every kind of layer, the hard model, and its layers' names."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("traps")
    file = quantized_models.make_file("quantized_models:Traps", masks=("11110000",))
    io.write(folder / "traps.safetensors", file)
    csqcli.export(folder / "traps.safetensors", folder / "traps.onnx", form="onnx", trust_code=True)
    return folder / "traps.onnx", hard_model(file, trust_code=True), [layer.name for layer in file.layers]


def test_the_engines_outputs_are_those_of_the_layers_in_torch(traps: tuple[Path, nn.Module, list[str]]) -> None:
    from csqcli.exporting.tapping import TappedModel

    path, model, names = traps
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    _, taps = TappedModel(path).run(images)
    owners = {name: name.rpartition(".")[0] for name in names if not name.startswith(("attention", "unused", "tied"))}
    _, wanted = recorded(model, images, list(owners.values()))
    assert {"stem", "grouped", "depthwise", "up", "down", "zeros", "head"} == set(wanted)
    for name, owner in owners.items():
        (output,) = taps[name]
        torch.testing.assert_close(output, wanted[owner], rtol=1e-4, atol=1e-5)
    assert len(taps["tied.weight"]) == 2  # one weight, read by two layers
    assert "unused.weight" not in taps


def test_an_export_is_compared_in_its_engine_and_only_with_its_own_file(digits_run: Path, tmp_path: Path, csq) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export = tmp_path / "run.onnx"
    csqcli.export(digits_run / "model.safetensors", export, form="onnx")
    both = csqcli.diff("builtin:digits_float", digits_run, "digits", export=export, val_limit=20)
    alone = csqcli.diff("builtin:digits_float", export, "digits", val_limit=20)
    for row in both["layers"]:
        assert row["engine"] == pytest.approx(row["hard"], abs=1e-3)
    assert [row["engine"] for row in alone["layers"]] == [row["engine"] for row in both["layers"]]
    assert {row["hard"] for row in alone["layers"]} == {None}
    assert alone["engine"].startswith("onnxruntime ")
    other = tmp_path / "other"
    command = ("search", "--recipe", "digits", "--target-bits", 3, "--epochs", 1, "--set", "max_steps=1", "--quiet")
    assert csq(*command, "--output", other)[0] == 0
    code, _, err = csq("diff", "builtin:digits_float", other, "--export", export, "--data", "digits", "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "holds other integers than the quantized file" in err


def test_a_folded_batchnorm_is_compared_behind_it(tmp_path: Path) -> None:
    """An int8 graph has BatchNorm in the convolution: against the convolution's own output it would differ by the folding."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = Path(__file__).parents[1] / "file" / "fixtures" / "digits_schema1.safetensors"
    export = tmp_path / "a.onnx"
    csqcli.export(file, export, form="onnx", activations="int8")
    found = csqcli.diff("builtin:digits_float", file, "digits", export=export, val_limit=30)
    images, float_ = _thirty_digits(file)
    norms = {name: module for name, module in float_.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert len(norms) == 3
    _, wanted = recorded(float_, images, list(norms))
    _, hard = recorded(csqcli.load(file), images, list(norms))
    rows = {row["name"]: row for row in found["layers"]}
    for number, name in enumerate(norms, 1):  # rounding that flips in the engine costs little beside four bits
        assert rows[f"conv{number}.weight"]["engine"] == pytest.approx(decibels(wanted[name], hard[name]), abs=1.0)


def test_compare_shows_runs_exports_and_reports_side_by_side(digits_run: Path, tmp_path: Path, csq) -> None:
    other, packed = tmp_path / "other", tmp_path / "packed.safetensors"
    command = ("search", "--recipe", "digits", "--target-bits", 3, "--method", "ste", "--quiet", "--epochs", 1)
    assert csq(*command, "--set", "max_steps=1", "--output", other)[0] == 0
    csqcli.export(digits_run / "model.safetensors", packed, form="bit-packed")
    code, out, err = csq("compare", digits_run, other, packed, digits_run / "report.json", "--json")
    assert code == 0, err
    found = json.loads(out)
    reports = [json.loads((run / "report.json").read_text()) for run in (digits_run, other)]
    for at, report in ((0, reports[0]), (1, reports[1]), (3, reports[0])):
        assert found["models"][at]["hard_top1"] == report["accuracy"]["hard_top1"]
        assert found["models"][at]["mean_bits"] == report["budget"]["mean_bits"]
        for row, layer in zip(found["layers"], report["layers"], strict=True):
            assert (row["name"], row["planes"][at]) == (layer["name"], layer["bits"])
    assert found["models"][0]["file_bytes"] == (digits_run / "model.safetensors").stat().st_size
    assert found["models"][2]["file_bytes"] == packed.stat().st_size
    for row in found["layers"]:
        assert row["differs"] == (len(set(row["planes"])) > 1)
        assert row["planes"][0] == row["planes"][2] == row["planes"][3]
    assert found["settings"]["quantization.method"] == ["staged", "ste", "staged", "staged"]
    assert found["settings"]["quantization.target_bits"] == [2.0, 3.0, 2.0, 2.0]
    text = csq("compare", digits_run, other)[1]
    marked = [line for line in text.splitlines() if line.startswith(("conv", "fc"))]
    assert ["*" in line for line in marked] == [row["planes"][0] != row["planes"][1] for row in found["layers"]]


def test_an_export_that_names_a_factory_is_not_imported_unasked(traps: tuple[Path, nn.Module, list[str]], csq) -> None:
    code, _, err = csq("diff", "quantized_models:Traps", traps[0], "--data", "digits", "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "the file asks to import `quantized_models:Traps`; pass --trust-code" in err


def test_a_finetune_says_nothing_of_a_model_that_its_file_brought(csq, digits_run: Path, tmp_path: Path) -> None:
    made = csq("finetune", digits_run, "--data", "digits", "--epochs", 1, "--set", "max_steps=1", "-o", tmp_path, "-q")
    assert made[0] == 0, made[2]
    code, out, err = csq("compare", digits_run, tmp_path, "--json")
    assert code == 0, err
    assert not [key for key in json.loads(out)["settings"] if key.startswith("model.")]
