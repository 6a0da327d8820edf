"""One small model of each family that is built unlike the others, through everything that benchmarks/model_sweep.py asserts.

The script itself goes through all models of timm and torchvision; plain convolutional networks are left to it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "model_sweep.py"
FAMILIES: dict[str, dict[str, Any]] = {  # and the constructor's arguments: fewer of equal blocks
    "timm:coat_lite_tiny": {"serial_depths": [1, 1, 1, 1]},  # factorised attention with depthwise position encoding
    "timm:convit_tiny": {
        "depth": 3,
        "local_up_to_layer": 2,
    },  # gated positional attention, weights that start as the identity
    "timm:deit_tiny_distilled_patch16_224": {"depth": 2},  # two heads
    "timm:edgenext_xx_small": {},
    "timm:efficientvit_b0": {},
    "timm:efficientvit_m0": {},
    "timm:eva02_tiny_patch14_224": {"depth": 5},  # rotary positions, SwiGLU
    "timm:fasternet_t0": {},
    "timm:fastvit_t8": {"layers": [1, 1, 1, 1]},  # branches to be merged
    "timm:gmlp_ti16_224": {},
    "timm:inception_next_atto": {"depths": [1, 1, 1, 1]},
    "timm:mobilevitv2_050": {},
    "timm:pit_ti_224": {"depth": [1, 1, 1]},
    "timm:pvt_v2_b0": {"depths": [1, 1, 1, 1]},
    "timm:repghostnet_058": {},
    "timm:repvit_m0_9": {"depth": [1, 1, 2, 1]},
    "timm:test_byobnet": {},
    "timm:test_coatnet": {},
    "timm:test_convnext": {},
    "timm:test_efficientnet_evos": {},
    "timm:test_mambaout": {},
    "timm:test_nfnet": {},  # weight standardisation with a gain
    "timm:test_resnet": {},
    "timm:test_vit3": {},  # attention pooling of a latent
    "timm:test_vit_relpos": {},
    "timm:vit_tiny_r_s16_p8_224": {"depth": 2},  # hybrid: a weight-standardised stem with same-padding
    "timm:xcit_tiny_12_p16_224": {"depth": 2},
    "torchvision:lraspp_mobilenet_v3_large": {},  # segmentation: a dict
    "torchvision:mnasnet0_5": {},  # a state dict with a version
    "torchvision:mobilenet_v3_small": {},
    "torchvision:quantized_shufflenet_v2_x0_5": {},
    "torchvision:raft_small": {},  # optical flow: two images, a list
    "torchvision:squeezenet1_1": {},
}


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    spec = importlib.util.spec_from_file_location("model_sweep", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["model_sweep"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")  # of the libraries' own code
@pytest.mark.parametrize("source", FAMILIES)
def test_a_model_of_every_family_goes_through_csq(sweep: ModuleType, source: str, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        progress = sweep.Progress()
        sweep.check(source, tmp_path, progress, arguments=FAMILIES[source])
    finally:
        torch.set_num_threads(threads)
    assert progress.stage == "done"
    assert progress.facts["parameter_share"] > 0.95
    assert progress.facts["uncounted"] == []


def test_the_paper_s_method_passes_the_same_check(sweep: ModuleType, tmp_path: Path) -> None:
    progress = sweep.Progress()
    sweep.check("timm:test_resnet", tmp_path, progress, method="csq")
    assert progress.stage == "done"


def test_a_model_over_its_limit_is_a_failed_line_that_a_second_start_retries(tmp_path: Path) -> None:
    """In a process of its own that runs no torch itself, as the script's is: it forks the models' from it."""
    results = tmp_path / "results.jsonl"
    starts = "import sys, model_sweep as sweep\ncode = []\n" + "".join(
        f"sys.argv = ['model_sweep', '--results', {str(results)!r}, '--only', 'timm:test_resnet', *{more}]\n"
        "try: sweep.main()\nexcept SystemExit as end: code.append(end.code)\n"
        for more in (["--minutes", "0"], ["--retry-failed"])
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, SCRIPT.parent)))}
    command = [sys.executable, "-c", f"{starts}print(code)"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "['1 failed', 0]", done.stderr
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["status"] for line in lines] == ["failed", "passed"]
    assert lines[0]["reason"] == "over the limit of 0 minutes"
    assert lines[1]["stage"] == "done"


def test_the_table_counts_what_failed_and_what_was_not_run(sweep: ModuleType) -> None:
    passed = {
        "status": "passed",
        "parameters": 100,
        "quantized_weights": 52,
        "parameter_share": 0.52,
        "mac_share": 0.6,
        "input_size": [3, 8, 8],
        "left_float": [["pos_embed", [1, 5, 8], "no weight"]],
        "layers": 3,
        "uncounted": ["aux.weight"],
        "without_gradient": [],
        "classifier": True,
    }
    results = {
        "timm:a": passed | {"model": "timm:a"},
        "timm:b": {"model": "timm:b", "status": "failed", "stage": "load", "reason": "KeyError: 'x'"},
    }
    names = ["timm:a", "timm:b", "torchvision:c"]
    text = sweep.table(names, dict.fromkeys(names, 2_000_000), results)
    assert "| timm | 2 | 1 | 1 | 0 |" in text
    assert "| torchvision | 1 | 0 | 0 | 1 |" in text
    assert "| timm:b | load | KeyError: 'x' |" in text
    assert "| timm:a | 52.0 % | 40 in pos_embed and the like: no weight |" in text
    assert "| timm:a | 60.0 % | 3×8×8 |" in text
    assert "Unused: timm:a (1 of 3: aux.weight …)." in text
    assert "torchvision:c (2)" in text
