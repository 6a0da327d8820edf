"""csqcli.quantize: post-training quantization of a model in memory."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import csqcli
from csqcli.file import io
from csqcli.models.networks import digits_cnn
from csqcli.quant.layers import find_layers
from csqcli.quant.layerwise import LayerwiseRounding, quantize_model
from csqcli.quant.methods.base import Schedule, plan_for
from csqcli.quant.methods.ptq import PostTraining

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    """A run of `csq search --epochs 0`, and the batches of images that it looked at."""
    seen: list[list[Tensor]] = []
    run = LayerwiseRounding.run

    def watched(self: LayerwiseRounding, *given: Any) -> None:
        seen.append([batch.clone() for batch in self.batches])
        run(self, *given)

    folder = tmp_path_factory.mktemp("ptq")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerwiseRounding, "run", watched)
        csqcli.search(recipe="digits", target_bits=2.5, epochs=0, images=128, threads=1, output=folder)
    return folder, seen[0]


def digits_float() -> nn.Module:
    model = digits_cnn()
    model.load_state_dict(safetensors.torch.load_file(ROOT / "csqcli" / "assets" / "digits_float.safetensors"))
    return model


def test_it_gives_the_bits_that_the_command_gives(searched: tuple[Path, list[Tensor]], tmp_path: Path) -> None:
    folder, batches = searched
    model = digits_float()
    found = csqcli.quantize(model, [(batch, None) for batch in batches], 2.5)
    theirs = io.read(folder / "model.safetensors")
    report = csqcli.save(model, found, tmp_path / "m.safetensors", source="csq:digits_cnn", num_classes=10)
    ours = io.read(tmp_path / "m.safetensors")
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
        assert torch.equal(model.state_dict()[name], value), name
    assert {layer["name"]: layer["bits"] for layer in report["layers"]} == found.planes
    assert found.mean_bits == report["budget"]["mean_bits"] <= 2.5
    assert report["recipe"]["quantization"]["method"] == "ptq"


def test_the_model_keeps_its_modes_and_the_caller_its_random_stream(searched: tuple[Path, list[Tensor]]) -> None:
    _, batches = searched
    model = digits_float().train()
    model.bn1.eval()  # type: ignore[operator]
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    csqcli.quantize(model, batches, 3, settings={"images": 64})
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_no_more_images_are_looked_at_than_the_settings_say(searched: tuple[Path, list[Tensor]]) -> None:
    _, batches = searched
    few, many = digits_float(), digits_float()
    pixels = torch.cat(batches)
    csqcli.quantize(few, [pixels[:64]], 2, settings={"images": 64})
    csqcli.quantize(many, iter([pixels[:128]]), 2, settings={"images": 64})
    assert all(torch.equal(one, two) for one, two in zip(few.parameters(), many.parameters(), strict=True))


def test_excluded_weights_stay_as_they_are_and_are_not_counted(searched: tuple[Path, list[Tensor]]) -> None:
    _, batches = searched
    model = digits_float()
    before = model.fc.weight.clone()  # type: ignore[union-attr, operator]
    found = csqcli.quantize(model, batches, 2, exclude=["fc"])
    assert torch.equal(model.fc.weight, before)  # type: ignore[arg-type]
    assert "fc.weight" not in found.planes


def test_rounded_activations_are_in_the_file_and_in_its_exports(
    searched: tuple[Path, list[Tensor]], tmp_path: Path
) -> None:
    _, batches = searched
    model = digits_float()
    found = csqcli.quantize(model, batches, 3, act_bits=8)
    report = csqcli.save(model, found, tmp_path / "m.safetensors", source="csq:digits_cnn", num_classes=10)
    assert len(report["activations"]) == 4
    loaded = csqcli.load(tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]), model.eval()(batches[0]))
    graph = csqcli.export(tmp_path / "m.safetensors", form="onnx")
    assert graph["parity"]["max_logit_error"] < 1e-4
    again = csqcli.quantize(model, batches, 3)  # a second time: the hooks stay those of the first
    assert again.mean_bits <= 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "resnet18"}, "the model must be a torch.nn.Module, not a str"),
        ({"target_bits": 0}, "target_bits must be above 0 and at most 8, not 0"),
        ({"target_bits": math.nan}, "target_bits must be above 0"),
        ({"target_bits": 0.5}, "target_bits 0.5 cannot be met: the layer rules alone need 1"),
        ({"images": []}, "csqcli.quantize: the loader gives no batch"),
        ({"images": ["text"]}, "a batch of the loader holds str where images should be"),
        ({"images": [torch.full((4, 1, 8, 8), math.nan)]}, "the images hold NaN or infinite values"),
        ({"images": [torch.zeros(4, 3, 8, 8)]}, "csqcli.quantize: cannot run on an image of 3×8×8"),
        ({"images": None}, "the loader must be iterable, not a NoneType"),
        ({"images": [torch.zeros(0, 1, 8, 8)]}, "the loader gives no image"),
        ({"target_bits": True}, "target_bits must be above 0"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"act_bits": 8.0}, "act_bits must be 2 to 8"),
        ({"act_bits": 1}, "act_bits must be 2 to 8, or 32"),
        ({"settings": {"image": 3}}, "settings of `ptq`: .*; did you mean `images`"),
        ({"exclude": ["fx"]}, "fx"),
    ],
)
def test_bad_arguments_are_one_line_and_change_nothing(given: dict[str, Any], message: str) -> None:
    model = digits_float()
    before = copy.deepcopy(model.state_dict())
    arguments = {"model": model, "images": [torch.rand(8, 1, 8, 8)], "target_bits": 2, **given}
    with pytest.raises(csqcli.UserError, match=message):
        csqcli.quantize(**arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_group_of_layers_that_takes_long_is_heard_of_before_it_is_done(searched: tuple[Path, list[Tensor]]) -> None:
    told: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def watch(name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        yield told.setdefault(name, []).append

    quantize_model(digits_float(), searched[1], 2, watch=watch)
    done = told["rounding layer by layer"]
    assert done.count(0) >= len(searched[1])  # after every batch of the first group
    assert done == sorted(done)
    assert done[-1] == 4


def test_what_fails_halfway_leaves_the_weights_as_they_were(
    searched: tuple[Path, list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, batches = searched
    model = digits_float()
    before = copy.deepcopy(model.state_dict())
    original, calls = LayerwiseRounding.round_group, iter(range(9))

    def stopped(self: LayerwiseRounding, group: list[int]) -> None:
        original(self, group)
        if next(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(LayerwiseRounding, "round_group", stopped)
    with pytest.raises(KeyboardInterrupt):
        csqcli.quantize(model, batches, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_was_changed_since_is_not_saved(searched: tuple[Path, list[Tensor]], tmp_path: Path) -> None:
    _, batches = searched
    model, other = digits_float(), digits_cnn()
    first = csqcli.quantize(model, batches, 4)
    again = csqcli.quantize(model, batches, 2)
    details: dict[str, Any] = {"source": "csq:digits_cnn", "num_classes": 10}
    for network, found in ((model, first), (other, again)):
        with pytest.raises(csqcli.UserError, match=r"was changed after|not those trained"):
            csqcli.save(network, found, tmp_path / "m.safetensors", **details)
    with torch.no_grad():
        model.conv1.weight.add_(0.01)  # type: ignore[union-attr, operator]
    with pytest.raises(csqcli.UserError, match=r"conv1\.weight: was changed after the model was quantized"):
        csqcli.save(model, again, tmp_path / "m.safetensors", **details)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_is_quantized_in_it(
    dtype: torch.dtype, searched: tuple[Path, list[Tensor]], tmp_path: Path
) -> None:
    _, batches = searched
    model = digits_float().to(dtype)
    found = csqcli.quantize(model, batches, 3)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    csqcli.save(model, found, tmp_path / "m.safetensors", source="csq:digits_cnn", num_classes=10)
    assert csqcli.evaluate(tmp_path / "m.safetensors", "digits", val_limit=100)["top1"] >= 95


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_the_caller_does_without_gradients_is_quantized_alike(
    mode: Callable[[], Any], searched: tuple[Path, list[Tensor]]
) -> None:
    _, batches = searched
    plain, without = digits_float(), digits_float()
    csqcli.quantize(plain, batches, 3)
    with mode():
        csqcli.quantize(without, (batch * 1 for batch in batches), 3)
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), without.parameters(), strict=True))


def test_a_call_that_fails_leaves_the_rounding_of_an_earlier_one(searched: tuple[Path, list[Tensor]]) -> None:
    _, batches = searched
    model = digits_float().eval()
    csqcli.quantize(model, batches, 3, act_bits=4)
    with torch.no_grad():
        before = model(batches[0])
        with pytest.raises(csqcli.UserError, match="cannot be met"):
            csqcli.quantize(model, batches, 0.5, act_bits=8)
        assert torch.equal(model(batches[0]), before)


def test_a_model_that_was_compiled_before_rounds_its_activations(searched: tuple[Path, list[Tensor]]) -> None:
    _, batches = searched
    model = digits_float().eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(batches[0])
        csqcli.quantize(compiled, batches, 3, act_bits=2)
        torch.testing.assert_close(compiled(batches[0]), model(batches[0]))


def test_a_batchnorm_has_settled_before_the_layers_behind_it_are_looked_at() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 10)).eval()
    layers, _ = find_layers(model)
    method = PostTraining(layers, plan_for(layers, 1, Schedule(0, 1), planes=[1, 1]))
    rounding = LayerwiseRounding(model, method, [torch.randn(16, 1, 8, 8)])
    assert rounding.groups == [[0], [1]]
    before = model[1].running_mean.clone()
    with torch.no_grad():
        rounding.round_group([0])
        assert torch.equal(model[1].running_mean, before)
        rounding.round_group([1])
    assert not torch.equal(model[1].running_mean, before)


def test_a_batchnorm_behind_the_last_layer_settles_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10)).eval()
    before = model[2].running_mean.clone()
    csqcli.quantize(model, [torch.randn(64, 1, 8, 8)], 1)
    assert not torch.equal(model[2].running_mean, before)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_weight_that_a_hook_computes_is_named_and_the_model_stays_as_it_was() -> None:
    head = nn.utils.weight_norm(nn.Linear(4, 2))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(csqcli.UserError, match=r"4: the model cannot be copied: its `weight` is computed") as error:
        csqcli.quantize(model, [(torch.randn(8, 3, 4, 4), None)], target_bits=3)
    assert "parametrizations.weight_norm" in error.value.line()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
