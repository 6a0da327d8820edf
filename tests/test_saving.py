"""csqcli.save writes only what csqcli.load reads back, and says before writing what could not be."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import csqcli
from csqcli import UserError
from csqcli.models.networks import DigitsCNN, digits_cnn
from csqcli.quant import activations
from csqcli.quant.layers import find_layers
from csqcli.quant.optimizer import CSQ


def images(number: int, size: int = 8) -> Tensor:
    return torch.rand(size, 1, 8, 8, generator=torch.Generator().manual_seed(number))


def trained(model: nn.Module | None = None, **settings: Any) -> tuple[nn.Module, CSQ]:
    torch.manual_seed(0)
    model = digits_cnn() if model is None else model
    optimizer = CSQ(model, **{"target_bits": 3, "total_steps": 2, **settings})
    for step in range(2):
        model(images(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(model: nn.Module, optimizer: CSQ, path: Path, **details: Any) -> dict[str, Any]:
    return csqcli.save(model, optimizer, path, **{"source": "csq:digits_cnn", "num_classes": 10, **details})


class Leaky(DigitsCNN):
    """The digits network's names and shapes, and other functions."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x)


def leaky(num_classes: int = 10) -> nn.Module:
    return Leaky(num_classes=num_classes)


def sized(num_classes: int = 10, width: int = 4) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes))
    model.data_config = {"input_size": (1, 8, 8), "mean": (0.3,), "std": (0.3,)}  # type: ignore[assignment]
    return model


def ten_scores() -> nn.Module:
    return digits_cnn()


# what is refused, before anything is written


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"source": leaky}, "source must be text, not a function; name it: timm:resnet18, or package.module:factory"),
        ({"source": "csq:digits_cn"}, "no model `digits_cn` in csq; did you mean `digits_cnn`"),
        ({"source": "timm:resnet18"}, "timm:resnet18: builds another model: .* tensors differ in name, `layer1"),
        ({"source": "csq:cifar_resnet20"}, "builds another model"),
        ({"source": "no_such_package:build"}, "cannot import `no_such_package`"),
        ({"source": "__main__:build"}, "another program cannot import from `__main__`"),
        ({"source": "tests.test_saving:leaky"}, "answers otherwise than the one in memory"),
        ({"num_classes": 11}, r"builds `fc.weight` of shape \[11, 48\], the model has \[10, 48\]"),
        ({"num_classes": 11, "source": "tests.test_saving:ten_scores"}, "the model gives 10 scores, num_classes is 11"),
        ({"num_classes": 0}, "num_classes 0: Input should be greater than or equal to 1"),
        ({"arguments": {"width": 3}}, "the constructor refused its arguments"),
        ({"classes": ["zero", "one"]}, "2 class names for 10 classes"),
        ({"accuracy": {"hard_top2": 90.0}}, "accuracy has no `hard_top2`; did you mean `hard_top"),
        ({"accuracy": 0.5e4}, r"accuracy: Input should be less than or equal to 100 \(got 5000.0\); give percent"),
        ({"accuracy": math.nan}, "accuracy: Input should be a finite number"),
        ({"data_config": {"input_size": (3, 8, 8), "mean": (0.5,), "std": (0.5,)}}, "cannot run on an image of 3×8×8"),
        ({"data_config": {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.0,)}}, "data config: std"),
        ({"loader": []}, "the loader gives no batch"),
        ({"loader": [("text", 3)]}, "a batch of the loader holds str where images should be"),
    ],
)
def test_what_could_not_be_loaded_is_refused_and_nothing_is_written(
    details: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, optimizer = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if "data_config" in details:
        details = {"data_config": {"interpolation": "bilinear", **details["data_config"]}}
    with pytest.raises(UserError, match=message):
        save(model, optimizer, tmp_path / "model.safetensors", **details)
    assert not any(tmp_path.iterdir())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_that_the_optimizer_does_not_train_is_refused(tmp_path: Path) -> None:
    _, optimizer = trained()
    with pytest.raises(UserError, match=r"the model has no weight `conv1.weight` of shape \[16, 1, 3, 3\]"):
        save(sized(), optimizer, tmp_path / "model.safetensors", source="tests.test_saving:sized")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["staged", "csq", "lsq"])
@pytest.mark.parametrize("assign", [True, False])
def test_a_network_that_was_never_trained_is_refused(method: str, assign: bool, tmp_path: Path) -> None:
    model, optimizer = trained(method=method)
    other = digits_cnn()
    if assign:  # the optimizer goes on with weights that are no longer the model's
        model.load_state_dict(other.state_dict(), assign=True)
    with pytest.raises(UserError, match=r"the model's weights are not those trained, .* \(cosine -?0\.0\d\); save the"):
        save(model if assign else other, optimizer, tmp_path / "model.safetensors")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("method", "target"), [("staged", 1), ("csq", 1), ("lsq", 1)])
def test_a_copy_and_the_weights_before_training_are_alike_enough_at_few_planes(
    method: str, target: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = digits_cnn()
    before = copy.deepcopy(model)
    _, optimizer = trained(model, method=method, target_bits=target)
    for network in (before, copy.deepcopy(model)):
        save(network, optimizer, tmp_path / "model.safetensors")


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model, _ = trained()
    other: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        UserError,
        match=r"csqcli\.save: the optimizer must be a csqcli\.CSQ, or what csqcli\.quantize returned, not a SGD; train with",
    ):
        save(model, other, tmp_path / "model.safetensors")
    assert not any(tmp_path.iterdir())


def test_the_name_ends_in_safetensors_and_the_folder_exists(tmp_path: Path) -> None:
    model, optimizer = trained()
    with pytest.raises(UserError, match=r"the name must end in \.safetensors"):
        save(model, optimizer, tmp_path / "model.pt")
    with pytest.raises(UserError, match="cannot be written"):
        save(model, optimizer, tmp_path / "none" / "model.safetensors")


def test_a_file_that_is_there_stays_when_its_successor_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = tmp_path / "model.safetensors"
    save(model, optimizer, path)
    content = path.read_bytes()
    with pytest.raises(UserError):
        save(model, optimizer, path, num_classes=11)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_damaged_on_its_way_to_disk_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from csqcli.file import io

    def damaged(path: Path, file: io.QuantizedFile) -> int:
        next(iter(file.others.values())).add_(1)  # the file is not what is in memory any more
        size = write(path, file)
        next(iter(file.others.values())).sub_(2)
        return size

    write = io.write
    monkeypatch.setattr(io, "write", damaged)
    model, optimizer = trained()
    with pytest.raises(UserError, match="values differ from the source file's"):
        save(model, optimizer, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


# what the file says


def test_the_file_says_what_it_was_told_and_what_was_counted(tmp_path: Path) -> None:
    model, optimizer = trained(exclude=["conv1"])
    names = [f"digit {number}" for number in range(10)]
    given = {"float_top1": 99.0, "hard_top1": 98.5, "samples": 500}
    report = save(model, optimizer, tmp_path / "model.safetensors", classes=names, accuracy=given)
    assert report == csqcli.report(tmp_path / "model.safetensors")
    assert report["classes"] == names
    assert {k: v for k, v in report["accuracy"].items() if v is not None} == given
    assert report["budget"]["target_mean_bits"] == 3
    assert report["left_float"] == [
        {"name": "conv1.weight", "shape": [16, 1, 3, 3], "why": "not given to the optimizer"}
    ]
    # multiply-accumulates of one 8×8 image: conv2 4·4·32 outputs × 16·9, conv3 2·2·48 × 32·9, fc 10 × 48
    assert [layer["macs"] for layer in report["layers"]] == [73_728, 55_296, 480]
    assert report["compute"]["macs"] == 73_728 + 55_296 + 480 + 64 * 16 * 9
    assert report["environment"]["csq"] == csqcli.__version__


def test_a_single_accuracy_is_the_hard_model_s_top_1(tmp_path: Path) -> None:
    report = save(*trained(), tmp_path / "model.safetensors", accuracy=97.25)
    assert report["accuracy"]["hard_top1"] == 97.25


def test_an_accuracy_may_be_a_tensor_and_is_a_number(tmp_path: Path) -> None:
    report = save(*trained(), tmp_path / "model.safetensors", accuracy=torch.tensor(97.25))
    assert report["accuracy"]["hard_top1"] == 97.25
    with pytest.raises(UserError, match="accuracy: '93 %' is no number; give percent"):
        save(*trained(), tmp_path / "model.safetensors", accuracy="93 %")


def test_what_is_over_its_target_is_not_written(tmp_path: Path) -> None:
    model, optimizer = trained()
    optimizer.method.plan = replace(optimizer.method.plan, budget=replace(optimizer.method.plan.budget, target=1.5))
    with pytest.raises(UserError, match=r"its layers have \d\.\d+ planes in the mean, over the target of 1.5"):
        save(model, optimizer, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_constructor_arguments_are_kept_and_build_the_model_again(tmp_path: Path) -> None:
    model, optimizer = trained(sized(width=6))
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"builds `1.weight` of shape \[4, 64\], the model has \[6, 64\]"):
        save(model, optimizer, path, source="tests.test_saving:sized")
    save(model, optimizer, path, source="tests.test_saving:sized", arguments={"width": 6})
    assert csqcli.load(path, trust_code=True)[1].out_features == 6


@pytest.mark.parametrize("method", ["staged", "csq"])
def test_a_saved_file_is_evaluated_and_finetuned_as_any_other(method: str, tmp_path: Path) -> None:
    path = tmp_path / "own" / "model.safetensors"
    path.parent.mkdir()
    report = save(*trained(method=method), path)
    assert report["recipe"] == {"quantization": {"method": method, "target_bits": 3}}
    before = csqcli.evaluate(path, "digits", val_limit=100)
    options = {"max_steps": 3, "val_limit": 100, "threads": 1}
    tuned = csqcli.finetune(path, data="digits", epochs=1, output=tmp_path / "tuned", **options)
    assert tuned["finetune"]["input_top1"] == before["top1"]
    assert tuned["recipe"]["quantization"]["method"] == method
    assert [layer["mask"] for layer in tuned["layers"]] == [layer["mask"] for layer in report["layers"]]


# BatchNorm


def test_batchnorm_is_the_average_over_the_loader_s_batches_on_the_hard_weights(tmp_path: Path) -> None:
    model, optimizer = trained()
    own = {name: value.clone() for name, value in model.named_buffers()}
    batches = [images(10), images(11, size=16)]
    save(model, optimizer, tmp_path / "model.safetensors", loader=[(batch, None) for batch in batches])
    loaded = csqcli.load(tmp_path / "model.safetensors")
    outputs = [loaded.conv1(batch).detach() for batch in batches]  # [images, channels, 8, 8]
    mean = torch.stack([output.mean(dim=(0, 2, 3)) for output in outputs]).mean(dim=0)
    variance = torch.stack([output.transpose(0, 1).flatten(1).var(dim=1) for output in outputs]).mean(dim=0)
    torch.testing.assert_close(loaded.bn1.running_mean, mean)
    torch.testing.assert_close(loaded.bn1.running_var, variance)
    assert not torch.equal(loaded.bn1.running_mean, own["bn1.running_mean"])
    for name, value in model.named_buffers():
        assert torch.equal(value, own[name]), name


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: [x, 3], lambda x: {"image": x, "label": 3}, lambda x: ((x,), 3)]
)
def test_batches_of_any_form_that_begin_with_images_will_do(wrap: Any, tmp_path: Path) -> None:
    model, optimizer = trained()
    save(model, optimizer, tmp_path / "model.safetensors", loader=(wrap(images(n)) for n in range(2)))
    assert csqcli.load(tmp_path / "model.safetensors").bn1.num_batches_tracked == 2


# other models


class Task(nn.Module):
    """A network inside a larger module, as Lightning users have it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = digits_cnn()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.net(x)
        return output


def test_a_part_of_what_the_optimizer_trains_is_saved_under_its_own_names(tmp_path: Path) -> None:
    task, optimizer = trained(Task())
    report = save(task.net, optimizer, tmp_path / "model.safetensors")  # type: ignore[arg-type]
    assert [layer["name"] for layer in report["layers"]] == [f"{n}.weight" for n in ("conv1", "conv2", "conv3", "fc")]
    assert torch.equal(csqcli.load(tmp_path / "model.safetensors").fc.weight, task.net.fc.weight)


def test_a_model_in_half_precision_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = digits_cnn().to(torch.bfloat16)
    optimizer = CSQ(model, target_bits=3, total_steps=1)
    model(images(0).to(torch.bfloat16)).float().square().mean().backward()
    optimizer.step()
    save(model, optimizer, tmp_path / "model.safetensors")
    loaded = csqcli.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded.fc.weight.to(torch.bfloat16), model.fc.weight)


def test_a_segmentation_model_is_saved_although_it_is_no_classifier(tmp_path: Path) -> None:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    torch.manual_seed(0)
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    optimizer = CSQ(model, target_bits=4, total_steps=1)
    config = {"input_size": (3, 64, 64), "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear"}
    source = "torchvision:lraspp_mobilenet_v3_large"
    report = save(model, optimizer, tmp_path / "m.safetensors", source=source, num_classes=4, data_config=config)
    assert report["compute"]["macs"] > 0


# activations


def calibrated() -> nn.Module:
    torch.manual_seed(0)
    model = digits_cnn()
    activations.calibrate(model, find_layers(model)[0], [images(0)], bits=4)
    return model


def test_activation_quantizers_on_the_model_reach_the_file_and_come_back(tmp_path: Path) -> None:
    model, optimizer = trained(calibrated())
    report = save(model, optimizer, tmp_path / "model.safetensors")
    assert [(entry["module"], entry["bits"]) for entry in report["activations"]] == [
        ("conv1", 8), ("conv2", 4), ("conv3", 4), ("fc", 4),
    ]  # fmt: skip
    loaded = csqcli.load(tmp_path / "model.safetensors")
    with optimizer.hard():
        torch.testing.assert_close(loaded(images(3)), model.eval()(images(3)))


# loading into a module


def test_loading_into_a_module_gives_the_file_s_model_and_replaces_quantizers(tmp_path: Path) -> None:
    model, optimizer = trained(calibrated())
    path = tmp_path / "model.safetensors"
    save(model, optimizer, path)
    torch.manual_seed(9)
    mine = calibrated()
    for _ in range(2):  # twice: no quantizer may stand behind another
        assert csqcli.load(path, into=mine) is mine
    assert not mine.training
    assert [len(module._forward_pre_hooks) for name, module in mine.named_modules() if name in ("conv1", "fc")] == [
        1,
        1,
    ]
    assert torch.equal(mine(images(4)), csqcli.load(path)(images(4)))


def test_loading_into_another_architecture_is_refused_and_leaves_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(*trained(), path)
    for other in (sized(), digits_cnn(num_classes=7)):
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(UserError, match="is it this architecture"):
            csqcli.load(path, into=other)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_loading_into_a_wrapped_module_reaches_the_network_and_its_type_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model, optimizer = trained()
    save(model, optimizer, path)
    inner = digits_cnn().double()
    csqcli.load(path, into=torch.optim.swa_utils.AveragedModel(nn.DataParallel(inner)).module)
    csqcli.load(path, into=nn.DataParallel(inner))
    assert inner.fc.weight.dtype == torch.float64
    assert torch.equal(inner.fc.weight.float(), model.fc.weight)


def test_a_file_that_names_a_factory_loads_into_a_module_without_trust(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model, optimizer = trained(sized())
    save(model, optimizer, path, source="tests.test_saving:sized")
    with pytest.raises(UserError, match="the file asks to import"):
        csqcli.load(path)
    csqcli.load(path, into=sized())
