"""Same seed, same bytes; an evaluation that no batch changes; weights at the ends of their types' ranges."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import csqcli
from csqcli import evaluating
from csqcli.data.loaders import LoaderSettings, make_loader
from csqcli.data.specs import open_data
from csqcli.errors import UserError
from csqcli.file import header, io, loading
from csqcli.models import networks as models
from csqcli.quant.passes.rounding import mse_step, quantize
from csqcli.training.loop import evaluate, logits_of
from tests.plain_models import Corners

METHODS = [
    "staged",
    "csq",
    "csq-uniform",
    "ste",
    "lsq",
    "parq",
    "dorefa",
    "pact",
    "lq-nets",
    "bsq",
    "msq",
    "scaled-uniform",
]
QUICK = ("--epochs", 1, "--set", "max_steps=4", "--set", "bn_recalibration_batches=2", "--quiet")
CORNERS = ("search", "tests.plain_models:Corners", "--no-pretrained", "--data", "digits", "--target-bits", 2)


def contents(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Every tensor's bytes, and the manifest without the one setting that the run was told and that must not matter."""
    manifest = header.read_manifest(path).model_dump(mode="json")
    manifest["recipe"]["data"].pop("workers")
    manifest["sizes"].pop("file_bytes")
    return {name: value.numpy().tobytes() for name, value in load_file(path).items()}, manifest


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than this machine has cores
def test_loader_workers_do_not_change_the_file_and_the_same_seed_gives_the_same_bytes(
    csq, image_folder: Path, tmp_path: Path
) -> None:
    run = (
        "search",
        "timm:resnet10t",
        "--no-pretrained",
        "--data",
        image_folder,
        "--target-bits",
        2,
        "--epochs",
        1,
        "--quiet",
    )
    run += ("--set", "input_size=72", "--set", "batch_size=4", "--set", "bn_recalibration_batches=1")
    run += ("--method", "ste", "--set", "max_steps=2")
    for name, workers, seed in (("none", 0, 5), ("three", 3, 5), ("again", 3, 5), ("other", 0, 6)):
        code, _, err = csq(*run, "-o", tmp_path / name, "--seed", seed, "--set", f"workers={workers}")
        assert code == 0, err
    files = {
        path.name: path / "model.safetensors" for path in tmp_path.iterdir() if (path / "model.safetensors").exists()
    }
    assert files["three"].read_bytes() == files["again"].read_bytes()
    assert contents(files["none"]) == contents(files["three"])
    assert contents(files["none"])[0] != contents(files["other"])[0]


def test_correct_counts_do_not_depend_on_the_batch_size(digits_run: Path, image_folder: Path) -> None:
    path = digits_run / "model.safetensors"
    counts = {size: evaluating.evaluate_file(path, "digits", batch_size=size)[0] for size in (1, 7, 64, 500)}
    assert len(set(counts.values())) == 1
    assert counts[1].samples == 500


def test_a_sample_s_logits_do_not_depend_on_its_batch_or_its_place(digits_run: Path) -> None:
    file = io.read(digits_run / "model.safetensors")
    model = loading.hard_model(file)
    images = open_data("digits", train=False).val

    def logits(order: Tensor, size: int) -> Tensor:
        settings = LoaderSettings(training=False, batch_size=size)
        loader = make_loader(images.subset(order), file.manifest.data_config, settings)
        with torch.no_grad():
            done = torch.cat([logits_of(model(batch)) for batch, _ in loader.epoch(0)])
        back = torch.empty_like(done)
        back[order] = done
        return back

    forward = torch.arange(len(images))
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    reference = logits(forward, 256)
    for order, size in ((forward, 1), (forward, 33), (shuffled, 256), (shuffled, 10)):
        torch.testing.assert_close(logits(order, size), reference, rtol=0, atol=1e-5 * float(reference.std()))
    settings = LoaderSettings(training=False, batch_size=50)
    mixed = make_loader(images.subset(shuffled), file.manifest.data_config, settings)
    plain = make_loader(images, file.manifest.data_config, settings)
    assert evaluate(model, mixed) == evaluate(model, plain)


@pytest.mark.parametrize("scale", [2.0**-110, 2.0**-100, 2.0**100, 2.0**110])
@pytest.mark.parametrize("planes", [1, 3, 8])
def test_the_best_step_scales_with_the_weights_at_any_size(scale: float, planes: int) -> None:
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    step = mse_step(weight, planes, channel_dim=0)
    scaled = mse_step(weight * scale, planes, channel_dim=0)
    assert torch.equal(scaled, step * scale)
    assert torch.equal(quantize(weight * scale, scaled[:, None], planes), quantize(weight, step[:, None], planes))


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3e38, -7.0])
def test_a_constant_layer_is_met_within_half_a_step(value: float) -> None:
    weight = torch.full((2, 3), value)
    for planes in (1, 8):
        step = mse_step(weight, planes, channel_dim=None)
        assert float(step) > 0
        assert torch.isfinite(step).all()
        error = (quantize(weight, step, planes) * step - weight).abs().max()
        assert float(error) <= 0.5 * float(step)


def test_layers_from_one_end_of_float32_to_the_other_are_searched_written_read_back_and_evaluated(
    csq, tmp_path: Path
) -> None:
    code, _, err = csq(*CORNERS, "--method", "staged", "-o", tmp_path, *QUICK)
    assert code == 0, err
    weights = io.read(tmp_path / "model.safetensors").state_dict()
    largest = {name: float(value.abs().max()) for name, value in weights.items()}
    assert 1e-32 < largest["tiny.weight"] < 1e-29
    assert 1e28 < largest["huge.weight"] < 1e31
    code, out, err = csq("evaluate", tmp_path / "model.safetensors", "--data", "digits", "--json", "--trust-code")
    assert code == 0, err
    assert json.loads(out)["top1"] == json.loads((tmp_path / "report.json").read_text())["accuracy"]["hard_top1"]


@pytest.mark.parametrize("method", METHODS)
def test_odd_layers_are_searched_written_read_back_and_evaluated(csq, tmp_path: Path, method: str) -> None:
    odd = (*CORNERS, "--set", "model.arguments={tiny: 0.01}", "--set", "optimizer.lr=1e-4")
    code, _, err = csq(*odd, "--method", method, "--act-bits", 8, "-o", tmp_path, *QUICK)
    assert code == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert (layers["single.weight"]["weights"], layers["single.weight"]["entropy_bits"]) == (1, 0)
    weights = io.read(tmp_path / "model.safetensors").state_dict()
    assert all(value.isfinite().all() for value in weights.values())
    code, out, err = csq("evaluate", tmp_path / "model.safetensors", "--data", "digits", "--json", "--trust-code")
    assert code == 0, err
    assert json.loads(out)["top1"] == report["accuracy"]["hard_top1"]


@pytest.mark.parametrize(
    ("method", "said"),
    [  # of gates it is the check of the state, of latents that of the loss, which finds it first
        ("csq", "search reached NaN or infinite numbers by epoch 1"),
        ("csq-uniform", "search reached NaN or infinite numbers by epoch 1"),
        ("lsq", "the loss became"),
    ],
)
def test_where_plain_sgd_cannot_train_the_run_stops_in_one_line(csq, tmp_path: Path, method: str, said: str) -> None:
    code, _, err = csq(*CORNERS, "--method", method, "-o", tmp_path, *QUICK)  # dL/dW of a weight of 1e-30 is about 1e30
    assert (code, err.count("\n")) == (2, 1)
    assert said in err
    assert not (tmp_path / "model.safetensors").exists()


def test_extreme_layers_survive_every_form_of_the_file(csq, tmp_path: Path) -> None:
    assert csq(*CORNERS, "--method", "staged", "-o", tmp_path / "run", *QUICK)[0] == 0
    model = tmp_path / "run" / "model.safetensors"
    original = io.read(model).state_dict()
    for form in ("int8-packed", "bit-packed", "state-dict"):
        output = tmp_path / f"{form}.safetensors"
        code, _, err = csq("export", model, f"--{form}", "-o", output, "--trust-code")
        assert code == 0, err
        read = io.read(output).state_dict()
        assert all(torch.equal(value, read[name]) for name, value in original.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_checkpoint_in_another_precision_is_searched_in_float32(csq, tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in models.digits_cnn().state_dict().items()}
    state["conv1.weight"].view(-1)[:2] = torch.tensor([6e4, 6e-8], dtype=dtype)  # the ends of float16
    save_file(state, tmp_path / "other.safetensors")
    run = ("search", "--recipe", "digits", "--checkpoint", tmp_path / "other.safetensors", "--target-bits", 3)
    code, _, err = csq(*run, "-o", tmp_path / "run", *QUICK)
    assert code == 0, err
    read = io.read(tmp_path / "run" / "model.safetensors").state_dict()
    assert {value.dtype for value in read.values() if value.is_floating_point()} == {torch.float32}
    assert csq("evaluate", tmp_path / "run" / "model.safetensors", "--data", "digits")[0] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_checkpoint_with_nan_is_refused_by_the_tensor_s_name(csq, tmp_path: Path, bad: float, suffix: str) -> None:
    state = models.digits_cnn().state_dict()
    state["bn2.running_var"][3] = bad
    path = tmp_path / f"bad.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    code, _, err = csq(
        "search", "--recipe", "digits", "--checkpoint", path, "--target-bits", 2, "-o", tmp_path / "run", "--quiet"
    )
    assert (code, err.count("\n")) == (2, 1)
    assert "tensor `bn2.running_var` holds NaN or infinite values" in err
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_float64_checkpoint_beyond_float32_is_refused_by_the_tensor_s_name(csq, tmp_path: Path) -> None:
    state = {k: v.double() if v.is_floating_point() else v for k, v in models.digits_cnn().state_dict().items()}
    state["conv2.weight"][0, 0, 0, 0] = 1e300
    save_file(state, tmp_path / "wide.safetensors")
    run = ("search", "--recipe", "digits", "--checkpoint", tmp_path / "wide.safetensors", "--target-bits", 2)
    code, _, err = csq(*run, "-o", tmp_path / "run")
    assert (code, "tensor `conv2.weight` holds NaN or infinite values" in err) == (2, True)


def test_a_search_that_removes_every_plane_still_writes_a_file_that_reads(csq, tmp_path: Path) -> None:
    emptied = ("--set", "layers.floor=0", "--set", 'layers.max_bits={"*": 0}')
    run = ("search", "--recipe", "digits", "--target-bits", 0.001, *emptied, *QUICK)
    code, out, err = csq(*run, "-o", tmp_path)
    assert code == 0, err
    manifest = header.read_manifest(tmp_path / "model.safetensors")
    assert (manifest.budget.mean_bits, manifest.sizes.paper_compression) == (0.0, None)
    assert "without bound" in out
    assert csq("evaluate", tmp_path / "model.safetensors", "--data", "digits")[0] == 0


def test_search_evaluate_and_export_open_no_connection(csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = socket.socket.connect

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was tried")

    def local_only(self: socket.socket, address: Any) -> None:  # loader processes hand tensors over in local sockets
        return original(self, address) if self.family == socket.AF_UNIX else refused()

    monkeypatch.setattr(socket.socket, "connect", local_only)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refused)
    model = tmp_path / "model.safetensors"
    code, _, err = csq("search", "--recipe", "digits", "--target-bits", 2, "-o", tmp_path, *QUICK)
    assert code == 0, err
    assert csq("evaluate", model, "--data", "digits", "--val-limit", 8)[0] == 0
    assert csq("export", model, "--bit-packed")[0] == 0
    assert csq("inspect", "resnet18")[0] == 0
    fresh = ("search", "timm:resnet10t", "--no-pretrained", "--data", "digits", "--target-bits", 2, *QUICK)
    fresh += ("--set", "input_size=32", "--set", "val_limit=20", "--set", "batch_size=8")
    assert csq(*fresh, "-o", tmp_path / "fresh")[0] == 0


def test_the_corners_are_what_they_are_called() -> None:
    model = Corners()
    assert float(model.tiny.weight.detach().abs().max()) < 1e-30
    assert float(model.huge.weight.detach().abs().max()) > 1e29
    assert torch.isfinite(model(torch.rand(2, 1, 8, 8))).all()


def test_a_model_that_training_left_without_numbers_is_not_saved(tmp_path: Path) -> None:
    model = models.digits_cnn()
    optimizer = csqcli.CSQ(model, target_bits=3, total_steps=4)
    model(torch.full((2, 1, 8, 8), torch.nan)).sum().backward()
    optimizer.step()
    with pytest.raises(UserError, match="NaN"):
        csqcli.save(model, optimizer, tmp_path / "model.safetensors", source="csq:digits_cnn", num_classes=10)
    assert not any(tmp_path.iterdir())
