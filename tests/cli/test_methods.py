"""What every weight method does through the command line: search, report, evaluate, export, finetune, resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import csqcli
import csqcli.models.networks
from csqcli.file import io
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

    if CARDS[method].learns_basis:
        assert [layer["stored_bits"] for layer in report["layers"]] == [2] * 4
        check_forms_of_a_basis(csq, model, tmp_path)
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


def test_binary_activations_are_the_sign_and_survive_every_command(csq, tmp_path: Path) -> None:
    run = ("search", "tests.plain_models:tanhs", "--no-pretrained", "--data", "digits", "--method", "xnor")
    run += ("--target-bits", 1, "--act-bits", 1, *SHORT)
    code, _, err = csq(*run, "-o", tmp_path / "run")
    assert code == 0, err
    model = tmp_path / "run" / "model.safetensors"
    report = json.loads(csq("report", model, "--json")[1])
    assert report["recipe"]["quantization"]["act_method"] == "xnor"
    assert [(entry["bits"], entry["signed"]) for entry in report["activations"]] == [(8, True), (1, True), (1, True)]
    top1 = report["accuracy"]["hard_top1"]
    trust = ("--trust-code",)
    assert json.loads(csq("evaluate", model, "--data", "digits", "--json", *trust)[1])["top1"] == top1
    for form in ("--bit-packed", "--onnx"):
        out = tmp_path / ("a.onnx" if form == "--onnx" else "a.safetensors")
        code, _, err = csq("export", model, form, "--data", "digits", "-o", out, *trust)
        assert code == 0, err
        assert json.loads(csq("report", out, "--json")[1])["parity"]["top1"] == pytest.approx(top1, abs=0.5)
    code, _, err = csq(
        "finetune", model, "--data", "digits", "--epochs", 1, *SHORT[2:], *trust, "-o", tmp_path / "tuned"
    )
    assert code == 0, err
    code, _, err = csq(*run, "--act-bits", 1, "--set", "quantization.act_method=pact", "-o", tmp_path / "no")
    assert (code, "act_bits 1 has act_method xnor, not pact" in err) == (2, True)


def check_forms_of_a_basis(csq, model: Path, tmp_path: Path) -> None:
    """Forms of integers × scale refuse in one line, and leave no file; all others hold the same levels."""
    for form in ("--int8-packed", "--onnx"):
        out = tmp_path / ("no.onnx" if form == "--onnx" else "no.safetensors")
        code, _, err = csq("export", model, form, "-o", out)
        line = (
            f"csq: error: {model}: conv1.weight has a learned basis, whose levels are not integers × scale, and {form[2:]} "
            "holds nothing else; take --bit-packed, --bit-packed-small or --state-dict\n"
        )
        assert (code, err.endswith(line), out.exists()) == (2, True, False)
    weights = csqcli.load(model).state_dict()
    integers = [layer.integers for layer in io.read(model).layers]
    for form in ("--bit-packed", "--bit-packed-small", "--state-dict"):
        out = tmp_path / f"basis{form}.safetensors"
        code, _, err = csq("export", model, form, "--data", "digits", "-o", out)
        assert code == 0, err
        written = json.loads(csq("report", out, "--json")[1])
        stated = json.loads(csq("report", model, "--json")[1])
        assert written["schema_version"] == stated["schema_version"] == 2
        for key in ("stored_bits_per_weight", "entropy_bits_per_weight"):
            assert written["sizes"][key] == pytest.approx(stated["sizes"][key], abs=1e-5)
        back = io.read(out)
        assert all(torch.equal(a.integers, b) for a, b in zip(back.layers, integers, strict=True))
        if form != "--bit-packed-small":
            assert all(torch.equal(value, weights[name]) for name, value in back.state_dict().items())
    plain = load_file(tmp_path / "basis--state-dict.safetensors")
    csqcli.models.networks.digits_cnn().load_state_dict(plain)  # strictly
    code, _, err = csq("finetune", model, "--data", "digits", "--set", "quantization.method=staged", "--quiet")
    assert code == 2
    assert "conv1.weight: has a learned basis, and staged trains integers × scale; finetune it by the method" in err


def test_dorefas_activations_stay_within_their_fixed_range(csq, tmp_path: Path) -> None:
    run = ("search", "--recipe", "digits", "--method", "dorefa", "--target-bits", 1, "--act-bits", 3, *SHORT)
    code, _, err = csq(*run, "-o", tmp_path)
    assert code == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["recipe"]["quantization"]["act_method"] == "dorefa"
    assert report["parity"]["max_logit_gap"] == 0
    assert [entry["scale"] for entry in report["activations"][1:]] == pytest.approx([1 / 7] * 3)


def test_gates_train_a_file_with_scales_per_channel_on(csq, tmp_path: Path) -> None:
    short = ("--set", "max_steps=4", "--quiet")
    run = ("search", "--recipe", "digits", "--method", "staged", "--target-bits", 2, "--epochs", 1, *short)
    assert csq(*run, "-o", tmp_path / "run")[0] == 0
    on = ("--set", "quantization.method=csq", "--epochs", 2, "-o", tmp_path / "on")
    code, _, err = csq("finetune", tmp_path / "run", "--data", "digits", *on, *short)
    assert code == 0, err
    betas = [json.loads(line)["beta"] for line in (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()]
    assert betas[-1] == 20.0  # gates' own: β ends at beta_final
    layers = io.read(tmp_path / "on" / "model.safetensors").layers
    assert [len(layer.scale) for layer in layers] == [16, 32, 48, 10]


def test_the_same_planes_in_all_layers_but_one_that_a_rule_keeps(csq, tmp_path: Path) -> None:
    """The target that the refusal of 2 names: the whole part for the layers without a rule, the fraction for the others."""
    run = ("search", "--recipe", "digits", "--method", "ste", "--set", "layers.keep=[fc]", *SHORT, "-o", tmp_path)
    code, _, err = csq(*run, "--target-bits", 2)
    assert (code, "or --target-bits 2.16" in err) == (2, True)
    code, _, err = csq(*run, "--target-bits", 2.16)
    assert code == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    assert [layer["bits"] for layer in report["layers"]] == [2, 2, 2, 8]
    assert report["budget"]["mean_bits"] <= 2.16


def test_pact_without_rounded_activations_says_what_is_left(csq, tmp_path: Path) -> None:
    run = ("search", "--recipe", "digits", "--method", "pact", "--target-bits", 2, *SHORT[:-1], "-o", tmp_path)
    code, out, err = csq(*run)
    assert code == 0, err
    assert "nothing is left of PACT but its weights" in out + err
    code, out, _ = csq("export", tmp_path, "--bit-packed-small")
    code, out, _ = csq(
        "export", tmp_path / "model-bit-packed-small.safetensors", "--int8-packed", "-o", tmp_path / "8.safetensors"
    )
    assert (code, out.startswith("bit-packed-small")) == (0, False)
