"""What every weight method does through the command line: search, report, evaluate, export, finetune, resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from csqcli.quant.catalog import CARDS
from csqcli.training.loop import Trainer

ONE_PLANE = ("twn", "xnor")
# gates have all this in test_app.py, ptq in training/test_post_training.py
METHODS = [name for name in CARDS if name not in ("float", "csq", "csq-uniform", "ptq")]
SHORT = ("--epochs", 2, "--set", "max_steps=3", "--set", "bn_recalibration_batches=2", "--quiet")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_s_file_is_reported_evaluated_exported_finetuned_and_resumed(
    csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    target = 1 if method in ONE_PLANE else 2
    run = ("search", "--recipe", "digits", "--method", method, "--target-bits", target, *SHORT)
    code, _, err = csq(*run, "-o", tmp_path / "whole")
    assert code == 0, err
    model = tmp_path / "whole" / "model.safetensors"
    report = json.loads(csq("report", model, "--json")[1])
    assert 0 < report["budget"]["mean_bits"] <= target
    assert report["recipe"]["quantization"]["method"] == method
    assert json.loads((tmp_path / "whole" / "report.json").read_text())["parity"]["max_logit_gap"] == 0
    top1 = report["accuracy"]["hard_top1"]
    assert json.loads(csq("evaluate", model, "--data", "digits", "--json")[1])["top1"] == top1

    packed = tmp_path / "packed.safetensors"
    code, _, err = csq("export", model, "--bit-packed", "-o", packed)
    assert code == 0, err
    assert packed.stat().st_size < model.stat().st_size
    code, _, err = csq(
        *("finetune", packed, "--data", "digits", "--epochs", 1, "--set", "max_steps=3", "--quiet"),
        *("-o", tmp_path / "tuned"),
    )
    assert code == 0, err
    tuned = json.loads((tmp_path / "tuned" / "report.json").read_text())
    assert tuned["finetune"]["input_top1"] == top1
    assert [layer["bits"] for layer in tuned["layers"]] == [layer["bits"] for layer in report["layers"]]

    original, calls = Trainer.run_epoch, iter(range(3))

    def interrupted(self, epoch, **more):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return original(self, epoch, **more)

    monkeypatch.setattr(Trainer, "run_epoch", interrupted)
    assert csq(*run, "-o", tmp_path / "broken")[0] == 130
    monkeypatch.setattr(Trainer, "run_epoch", original)
    code, _, err = csq(*run, "-o", tmp_path / "broken", "--resume")
    assert code == 0, err
    assert (tmp_path / "broken" / "model.safetensors").read_bytes() == model.read_bytes()


def test_dorefas_activations_stay_within_their_fixed_range(csq, tmp_path: Path) -> None:
    run = ("search", "--recipe", "digits", "--method", "dorefa", "--target-bits", 1, "--act-bits", 3, *SHORT)
    code, _, err = csq(*run, "-o", tmp_path)
    assert code == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["recipe"]["quantization"]["act_method"] == "dorefa"
    assert report["parity"]["max_logit_gap"] == 0
    assert [entry["scale"] for entry in report["activations"][1:]] == pytest.approx([1 / 7] * 3)
