"""Model names as users type them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from csqcli.errors import UserError
from csqcli.models import spec


def test_prefixes_force_a_library_and_plain_names_prefer_timm() -> None:
    assert spec.parse("resnet18").source == "timm:resnet18"
    assert spec.parse("torchvision:resnet18").library == "torchvision"
    assert spec.parse("vgg11").library == "timm"
    assert spec.parse("alexnet").library == "torchvision"
    assert spec.parse("cifar_resnet20").library == "csq"
    assert spec.parse("resnet18.a1_in1k").source == "timm:resnet18.a1_in1k"


def test_a_factory_typed_as_a_file_is_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mymodel.py").write_text("def build(): ...")
    for typed in ("mymodel:build", "mymodel.py:build", "./mymodel.py:build"):
        assert spec.parse(typed).source == "mymodel:build"
    assert spec.parse("nets/mine.py:build").source == "nets.mine:build"
    with pytest.raises(UserError) as dotted:
        spec.parse("mymodel.build")
    assert dotted.value.hint == "did you mean `mymodel:build`?"
    for outside in ("../mymodel.py:build", f"{tmp_path}/mymodel.py:build"):
        with pytest.raises(UserError) as error:
            spec.parse(outside)
        assert error.value.hint == "run csq beside it and write mymodel:build"


def test_names_and_data_config_rules_are_at_hand_without_torch() -> None:
    code = "import csqcli.models.spec, csqcli.models.data_config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
