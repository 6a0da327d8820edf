"""`csq plan`: what it predicts is what the run then writes, and it writes nothing itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from csqcli import pipeline
from csqcli.data.splits import DataSet, Images
from csqcli.recipe.resolve import resolve
from csqcli.system.progress import Display


def noise(text: str, *, train: bool) -> DataSet:
    """Images of noise in four classes, by seed."""
    pixels = torch.randint(0, 256, (96, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    images = Images(torch.arange(96) % 4, pixels=pixels)
    return DataSet("noise", classes=list("abcd"), val=images, train=images)


DIGITS = ("digits", {"target_bits": 2, "epochs": 6})
TWENTY_LAYERS = (
    "short",
    {
        "model.source": "timm:mobilenetv3_small_050",
        "model.pretrained": False,
        "quantization.method": "staged",
        "quantization.target_bits": 3,
        "data.source": "training.test_planning:noise",
        "data.input_size": 32,
        "data.batch_size": 16,
        "epochs": 4,
        "bn_recalibration_batches": 4,
    },
)


@pytest.mark.parametrize(("recipe", "settings"), [DIGITS, TWENTY_LAYERS], ids=["digits", "mobilenetv3"])
def test_predicted_bytes_are_within_five_percent_of_those_written(
    recipe: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    resolved = resolve(recipe, settings)
    planned = pipeline.plan(resolved, display=Display(quiet=True))
    report = pipeline.search(resolved, tmp_path / "run", display=Display(quiet=True))
    assert len(report["layers"]) >= (4 if recipe == "digits" else 20)
    written = tmp_path / "run" / "model.safetensors"
    small = tmp_path / "small.safetensors"
    from csqcli.exporting.run import export_file

    export_file(written, small, form="bit-packed-small", trust_code=True)
    assert planned["bytes"]["model"] == pytest.approx(written.stat().st_size, rel=0.05)
    assert planned["bytes"]["bit_packed_small"] == pytest.approx(small.stat().st_size, rel=0.05)
    assert planned["mean_bits"] <= planned["target_mean_bits"]
    assert [layer["name"] for layer in planned["layers"]] == [layer["name"] for layer in report["layers"]]


def test_a_plan_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    planned = pipeline.plan(resolve("digits", {"target_bits": 2}), display=Display(quiet=True))
    assert planned["time"]["steps"] == 20 * (1257 // 64 + 1)  # epochs × batches of digits' 1,257 training images
    assert [path.name for path in tmp_path.rglob("*")] == ["scratch"]


def test_the_plan_counts_all_phases(tmp_path: Path) -> None:
    settings = {"target_bits": 2, "epochs": 3, "adaptation.epochs": 2, "finetune.epochs": 1, "max_steps": 2}
    planned = pipeline.plan(resolve("digits", settings), display=Display(quiet=True))
    assert planned["time"]["steps"] == (3 + 2 + 1) * 2
    assert planned["time"]["seconds"] >= planned["time"]["steps"] * planned["time"]["step_seconds"]
