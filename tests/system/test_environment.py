"""What `csq doctor` looks for is what the distribution declares."""

from __future__ import annotations

from importlib import metadata

import pytest

from csqcli.system.environment import declared, describe

REQUIREMENTS = [  # as wheels of several tools write them
    "torch>=2.6",
    "pyyaml>=6",
    'torch>=2.10; extra == "onnx"',
    'onnx>=1.17; extra == "onnx"',
    "csq[onnx]; extra == 'litert'",
    "ai-edge-litert<2.4,>=2.3; sys_platform == 'linux' and extra == 'litert'",
    'pytest>=8; extra == "dev"',
]


def test_packages_and_extras_are_those_that_the_distribution_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", {"csq": REQUIREMENTS}.__getitem__)
    assert declared() == (["torch", "pyyaml"], {"onnx": ["onnx"], "litert": ["ai-edge-litert"]})


def test_a_folder_that_was_not_installed_declares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert declared() == ([], {})


def test_every_extra_that_a_user_may_need_is_described(tmp_path) -> None:
    found = describe(tmp_path)
    assert {
        "onnx",
        "haq",
        "hf",
        "openvino",
        "litert",
        "torchao",
        "tensorboard",
        "trackio",
        "mlflow",
        "slurm",
        "png",
    } <= set(found["extras"])
    assert "pyyaml" in found["packages"]
    assert all(found["packages"].values())
