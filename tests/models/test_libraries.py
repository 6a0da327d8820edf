"""Names, checkpoints and factories."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from csqcli.errors import UserError
from csqcli.models import checkpoints
from csqcli.models import libraries as sources
from csqcli.models import networks as models


def test_prefixes_force_a_library_and_plain_names_prefer_timm() -> None:
    assert sources.parse("resnet18").source == "timm:resnet18"
    assert sources.parse("torchvision:resnet18").library == "torchvision"
    assert sources.parse("vgg11").library == "timm"
    assert sources.parse("alexnet").library == "torchvision"
    assert sources.parse("cifar_resnet20").library == "csq"
    assert sources.parse("resnet18.a1_in1k").source == "timm:resnet18.a1_in1k"


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
        sources.load(name, num_classes=10, pretrained=False)
    assert complaint in caught.value.line()


def test_torchvision_resize_is_reproduced_by_timms_crop_arithmetic() -> None:
    for crop, resize in ((224, 256), (224, 232), (299, 342), (384, 384), (518, 518), (480, 480)):
        assert int(crop / sources.crop_share(crop, resize)) == resize


def test_torchvision_data_config_is_that_of_its_weights() -> None:
    config = sources.load("torchvision:resnet50", num_classes=7, pretrained=False).data_config
    assert config["input_size"] == (3, 224, 224)
    assert int(224 / config["crop_pct"]) == 232  # IMAGENET1K_V2 resizes to 232
    assert config["interpolation"] == "bilinear"


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "tar"])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_load_whatever_they_are_wrapped_in(
    tmp_path: Path, suffix: str, wrap: str | None, prefix: str
) -> None:
    torch.manual_seed(1)
    original = models.digits_cnn()
    state = {prefix + name: value for name, value in original.state_dict().items()}
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save({wrap: state, "epoch": 3} if wrap else state, path)
    loaded = sources.load("digits_cnn", num_classes=10, checkpoint=str(path))
    assert torch.equal(loaded.model.fc.weight, original.fc.weight)
    assert len(loaded.checkpoint_sha256 or "") == 64


def test_ema_weights_are_preferred_when_a_checkpoint_holds_both(tmp_path: Path) -> None:
    plain, ema = models.digits_cnn(), models.digits_cnn()
    torch.save({"state_dict": plain.state_dict(), "state_dict_ema": ema.state_dict()}, tmp_path / "both.pth")
    loaded = sources.load("digits_cnn", num_classes=10, checkpoint=str(tmp_path / "both.pth"))
    assert torch.equal(loaded.model.fc.weight, ema.fc.weight)


class _Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_checkpoint_with_pickled_code_is_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"state_dict": _Evil()}))
    torch.save({"state_dict": _Evil()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(UserError, match=r"never runs|not a readable checkpoint"):
            checkpoints.read_checkpoint(str(tmp_path / name))
    assert "executed" not in capsys.readouterr().out


def test_checkpoint_problems_are_named(tmp_path: Path) -> None:
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(
        UserError, match=r"keys differ .* missing \(first: conv1.weight\), 2 unexpected \(first: bias\)"
    ):
        sources.load("digits_cnn", num_classes=10, checkpoint=str(tmp_path / "other.safetensors"))
    save_file(models.digits_cnn(num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    with pytest.raises(UserError, match=r"the checkpoint has 7 classes, /data has 10 \(tensor fc.bias\)"):
        sources.load(
            "digits_cnn", num_classes=10, checkpoint=str(tmp_path / "seven.safetensors"), num_classes_from="/data"
        )
    state = models.digits_cnn().state_dict()
    state["fc.bias"][3] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=r"tensor `fc.bias` holds NaN"):
        sources.load("digits_cnn", num_classes=10, checkpoint=str(tmp_path / "nan.safetensors"))
    (tmp_path / "noise.pth").write_bytes(b"noise")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoints.read_checkpoint(str(tmp_path / "noise.pth"))


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
        with pytest.raises(UserError, match=r"pretrained weights could not be had.*pass --checkpoint FILE"):
            sources.load(name, num_classes=1000)


def test_a_factory_gets_the_number_of_classes_when_it_takes_one() -> None:
    loaded = sources.load("csqcli.models.networks:digits_cnn", num_classes=7, pretrained=False)
    assert loaded.model.fc.out_features == 7
    assert loaded.spec.library == "factory"
