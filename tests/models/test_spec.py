"""Model names as users type them."""

from __future__ import annotations

import subprocess
import sys

from csqcli.models import spec


def test_prefixes_force_a_library_and_plain_names_prefer_timm() -> None:
    assert spec.parse("resnet18").source == "timm:resnet18"
    assert spec.parse("torchvision:resnet18").library == "torchvision"
    assert spec.parse("vgg11").library == "timm"
    assert spec.parse("alexnet").library == "torchvision"
    assert spec.parse("cifar_resnet20").library == "csq"
    assert spec.parse("resnet18.a1_in1k").source == "timm:resnet18.a1_in1k"


def test_names_and_data_config_rules_are_at_hand_without_torch() -> None:
    code = "import csqcli.models.spec, csqcli.models.data_config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
