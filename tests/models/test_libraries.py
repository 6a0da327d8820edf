"""Models of every library, their data configs, and what is said where one cannot be built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from csqcli.errors import UserError
from csqcli.file import io
from csqcli.models import libraries
from csqcli.models.checkpoints import Checkpoint
from csqcli.models.fitting import load_for
from csqcli.models.networks import digits_cnn


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("resnet81", "unknown model; did you mean `resnet"),
        ("timm:cifar_resnet20", "no model `cifar_resnet20` in timm"),
        ("torchvision:resnet19", "no model `resnet19` in torchvision; did you mean `resnet1"),
        ("no.such.module:factory", "cannot import `no.such.module`"),
        ("csqcli.models.networks:nothing", "`csqcli.models.networks` has no `nothing`"),
    ],
)
def test_unknown_models_are_named_with_the_nearest_ones(name: str, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        libraries.load(name, num_classes=10, pretrained=False)
    assert complaint in caught.value.line()


def test_torchvision_resize_is_reproduced_by_timms_crop_arithmetic() -> None:
    for crop, resize in ((224, 256), (224, 232), (299, 342), (384, 384), (518, 518), (480, 480)):
        assert int(crop / libraries.crop_share(crop, resize)) == resize


def test_torchvision_data_config_is_that_of_its_weights() -> None:
    config = libraries.load("torchvision:resnet50", num_classes=7, pretrained=False).data_config
    assert config["input_size"] == (3, 224, 224)
    assert int(224 / config["crop_pct"]) == 232  # IMAGENET1K_V2 resizes to 232
    assert config["interpolation"] == "bilinear"


def test_pretrained_without_network_says_what_to_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import socket

    import huggingface_hub.constants

    def unreachable(*_: object, **__: object) -> None:
        raise socket.gaierror("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for name in ("resnet18", "torchvision:resnet18"):
        with pytest.raises(UserError, match=r"pretrained weights are not available.*pass --checkpoint FILE"):
            libraries.load(name, num_classes=1000)


def test_a_factory_gets_the_number_of_classes_when_it_takes_one() -> None:
    loaded = libraries.load("csqcli.models.networks:digits_cnn", num_classes=7, pretrained=False)
    assert loaded.model.fc.out_features == 7
    assert loaded.spec.library == "factory"


@pytest.mark.parametrize(
    "name", ["resnet18", "tresnet_m"]
)  # the second folds space into the channels of its first convolution
def test_a_timm_model_of_grey_images_takes_grey_images(name: str) -> None:
    loaded = libraries.load(name, num_classes=3, pretrained=False, arguments={"in_chans": 1})
    own = libraries.load(name, num_classes=3, pretrained=False).data_config
    config = loaded.data_config
    assert config["input_size"] == (1, *own["input_size"][1:])
    assert config["mean"] == pytest.approx([sum(own["mean"]) / 3])
    assert config["std"] == pytest.approx([sum(own["std"]) / 3])
    assert config["interpolation"] == own["interpolation"]
    with torch.no_grad():
        assert loaded.model.eval()(torch.zeros(1, *config["input_size"])).shape == (1, 3)


def test_a_timm_model_of_grey_images_goes_through_all_commands(csq, tmp_path: Path, image_folder: Path) -> None:
    grey = ("timm:test_resnet", "--no-pretrained", "--data", image_folder, "--set", "model.arguments={in_chans: 1}")
    short = ("--target-bits", 3, "--epochs", 1, "--set", "workers=0", "--set", "batch_size=4")
    for side in (32, 72):  # held in memory, and image by image
        code, _, error = csq("plan", *grey, *short, "--set", f"input_size={side}")
        assert code == 0, error
    run, exported = tmp_path / "run", tmp_path / "model.onnx"
    code, _, error = csq("search", *grey, *short, "--set", "input_size=72", "-o", run)
    assert code == 0, error
    code, _, error = csq("evaluate", run, "--data", image_folder)
    assert code == 0, error
    assert io.read(run / "model.safetensors").manifest.data_config["input_size"] == [1, 72, 72]
    code, _, error = csq("export", run, "--onnx", "-o", exported, "--data", image_folder)
    assert code == 0, error


def test_a_factory_that_ignores_the_number_of_classes_is_said_to() -> None:
    what = "tests.plain_models:seven: the factory built 7 outputs for 3 classes; let it take num_classes and pass it on"
    with pytest.raises(UserError, match=what):
        load_for("tests.plain_models:seven", ["a", "b", "c"])


NO_CONFIG = "its factory sets no data_config (docs/data.md): images are taken as 3×224×224 with ImageNet's mean and std"


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize(("factory", "silent"), [("says_nothing", True), ("group_norm_cnn", False)])
def test_a_factory_without_data_config_is_said_to_get_imagenet_s(factory: str, silent: bool, from_file: bool) -> None:
    source = f"tests.plain_models:{factory}"
    state = libraries.build(libraries.parse(source), num_classes=10).state_dict()
    checkpoint = Checkpoint({"": state}, "", "mine") if from_file else None
    loaded = libraries.load(source, num_classes=10, pretrained=False, checkpoint=checkpoint)
    assert [line.startswith(f"{source}: {NO_CONFIG}") for line in loaded.lines] == [True] * silent
    assert (loaded.data_config["input_size"] == (3, 224, 224)) == silent


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "--model", "tests.plain_models:says_nothing", "--data", "digits", "--val-limit", 8),
        ("sensitivity", "tests.plain_models:says_nothing", "--no-pretrained", "--data", "digits", "--val-limit", 8),
        ("search", "tests.plain_models:says_nothing", "--no-pretrained", "--data", "digits", "--target-bits", 2),
    ],
)
def test_commands_print_what_a_factory_leaves_open(csq, tmp_path: Path, command: tuple) -> None:
    size = ("--set", "data.input_size=8") if command[0] == "sensitivity" else ("--input-size", 8)
    short = ("-o", tmp_path / "run", "--epochs", 1, "--set", "max_steps=1") if command[0] == "search" else ()
    code, _, err = csq(*command, *size, *short)
    assert (code, NO_CONFIG in " ".join(err.split())) == (0, True), err


def with_pretrained(num_classes: int = 10, *, pretrained: bool = False) -> torch.nn.Module:
    return digits_cnn(num_classes)


def with_anything(**arguments) -> torch.nn.Module:
    return digits_cnn(arguments["num_classes"])


@pytest.mark.parametrize(
    ("source", "pretrained", "label"),
    [
        ("tests.plain_models:group_norm_cnn", True, "factory"),
        ("tests.plain_models:group_norm_cnn", False, "random"),
        ("tests.models.test_libraries:with_pretrained", True, "pretrained"),
        ("tests.models.test_libraries:with_anything", True, "pretrained"),
    ],
)
def test_weights_of_a_factory_that_takes_no_pretrained_are_called_the_factory_s(
    source: str, pretrained: bool, label: str
) -> None:
    loaded = libraries.load(source, num_classes=10, pretrained=pretrained)
    note = f"{source}: no checkpoint given, and its factory takes no `pretrained`: weights are those that it gives"
    assert (loaded.weights_from, loaded.lines) == (label, [note] * (label == "factory"))
