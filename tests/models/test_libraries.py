"""Models of every library, their data configs, and what is said where one cannot be built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from csqcli.errors import UserError
from csqcli.models import libraries


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
