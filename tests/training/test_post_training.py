"""`csq search --epochs 0`: post-training quantization through the real command line."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import csqcli
from csqcli import pipeline
from csqcli.data.specs import open_data
from csqcli.models.networks import digits_cnn
from csqcli.quant import activations, layerwise, norms
from csqcli.quant.activations import attached
from csqcli.quant.layers import find_layers
from csqcli.quant.layerwise import LayerwiseRounding
from csqcli.quant.methods.base import Schedule, plan_for
from csqcli.quant.methods.ptq import PostTraining
from csqcli.quant.second_order import InputMoments
from csqcli.recipe.resolve import resolve
from csqcli.system.progress import Display
from csqcli.training import post_training

RUN = ("search", "--recipe", "digits", "--epochs", 0, "--set", "images=128", "--quiet")


def test_a_file_is_within_its_budget_says_what_it_is_and_goes_through_every_command(csq, tmp_path: Path) -> None:
    code, _, err = csq(*RUN, "--target-bits", 2.5, "-o", tmp_path / "run", "--finetune-epochs", 0)
    assert code == 0, err
    model = tmp_path / "run" / "model.safetensors"
    report = json.loads(csq("report", model, "--json")[1])
    assert (
        sum(entry["bits"] * entry["weights"] for entry in report["layers"]) <= 2.5 * report["budget"]["total_weights"]
    )
    assert (report["recipe"]["quantization"]["method"], report["recipe"]["epochs"]) == ("ptq", 0)
    assert "post-training" in csq("report", model)[1]
    assert report["accuracy"]["hard_top1"] >= report["accuracy"]["float_top1"] - 3  # 98.2 in float
    assert json.loads((tmp_path / "run" / "report.json").read_text())["parity"]["max_logit_gap"] == 0
    found = json.loads(csq("evaluate", model, "--data", "digits", "--json")[1])
    assert found["top1"] == report["accuracy"]["hard_top1"]
    assert csq("export", model, "--bit-packed", "-o", tmp_path / "packed.safetensors")[0] == 0
    code, _, err = csq(
        *("finetune", model, "--data", "digits", "--epochs", 1, "--set", "max_steps=2", "--quiet"),
        *("-o", tmp_path / "tuned"),
    )
    assert code == 0, err

    assert csq(*RUN, "--target-bits", 2.5, "-o", tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == model.read_bytes()


def test_every_calibration_image_is_looked_at_beside_a_network_that_rounds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    round_group = LayerwiseRounding.round_group

    def watched(rounding: LayerwiseRounding, group: list[int]) -> None:
        seen.append((sum(map(len, rounding.batches)), len(attached(rounding.model)), len(attached(rounding.teacher))))
        round_group(rounding, group)

    monkeypatch.setattr(LayerwiseRounding, "round_group", watched)
    csqcli.search(recipe="digits", target_bits=2, epochs=0, act_bits=4, output=tmp_path, images=100)  # 64 and 36
    assert set(seen) == {(100, 4, 0)}


def test_labels_of_the_training_images_are_never_looked_at(tmp_path: Path) -> None:
    recipe = resolve("digits", {"epochs": 0, "quantization.target_bits": 2, "images": 128})
    files = []
    for name in ("true", "none"):
        images = open_data("digits")
        assert images.train is not None
        if name == "none":
            images.train.labels = torch.zeros_like(images.train.labels)
        pipeline.search(recipe, tmp_path / name, display=Display(quiet=True), images=images)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_folder_of_images_without_labels_is_enough_to_calibrate_on(csq, tmp_path: Path) -> None:
    images = open_data("digits").train
    assert images is not None
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for index in range(100):  # flat and nested, in no folders of classes
        images.pil(index, 1).save(tmp_path / "photos" / ("more" if index % 2 else ".") / f"{index:03}.png")
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    run = ("search", "--recipe", "digits", "--epochs", 0, "--target-bits", 3, "--quiet", "-o", tmp_path / "run")
    code, _, err = csq(*run, "--calib", tmp_path / "photos")
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["inputs"]["train"]["images"] == 100
    assert report["accuracy"]["hard_top1"] >= 95  # 98.2 in float


def test_a_run_stopped_between_groups_resumes_to_the_same_bytes(
    csq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = (*RUN, "--target-bits", 2, "--set", "passes=3")
    assert csq(*run, "-o", tmp_path / "whole")[0] == 0
    original, calls = LayerwiseRounding.round_group, iter(range(9))

    def stopped(self, group):
        original(self, group)
        if next(calls) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(LayerwiseRounding, "round_group", stopped)
    code, _, err = csq(*run, "-o", tmp_path / "broken")
    assert (code, "2 groups of layers rounded" in err) == (130, True), err
    monkeypatch.setattr(LayerwiseRounding, "round_group", original)
    code, _, err = csq(*run, "-o", tmp_path / "broken", "--resume")
    assert code == 0, err
    names = ("whole", "broken")
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in names}) == 1
    assert not list((tmp_path / "broken").glob("resume*"))


def test_a_method_that_trains_needs_epochs_and_one_that_does_not_takes_none(csq, tmp_path: Path) -> None:
    common = ("search", "--recipe", "digits", "--quiet", "-o", tmp_path / "run")
    code, _, err = csq(*common, "--method", "staged", "--epochs", 0)
    assert (code, "`staged` needs at least 1" in err) == (2, True), err
    code, _, err = csq(*common, "--method", "ptq", "--epochs", 3)
    assert (code, "`ptq` trains nothing" in err) == (2, True), err
    assert not (tmp_path / "run").exists()


def test_a_plan_of_zero_epochs_says_why_there_is_none(csq) -> None:
    code, _, err = csq("plan", "--recipe", "digits", "--target-bits", 3, "--set", "epochs=0", "--quiet")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "0 epochs have no steps to be timed" in err


def test_the_optimizer_for_loops_of_one_s_own_refuses_a_method_without_steps() -> None:
    with pytest.raises(csqcli.UserError, match="`ptq` trains nothing"):
        csqcli.CSQ(digits_cnn(), 2, total_steps=3, method="ptq")


def test_a_batchnorm_moves_by_what_became_of_its_inputs_and_not_by_the_images() -> None:
    """Means by their difference, variances by their ratio (NumPy, float64), over all batches; unchanged inputs change nothing."""
    rng = np.random.default_rng(3)
    float_norm, norm = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    start_mean, start_variance = rng.normal(size=3), rng.uniform(1, 2, size=3)
    for module in (float_norm, norm):
        module.running_mean.copy_(torch.tensor(start_mean))
        module.running_var.copy_(torch.tensor(start_variance))
        module.eval()
    batches = [rng.normal(5, 3, size=(4, 3, 6, 6)) for _ in range(3)]
    with norms.following(norm, float_norm):
        for batch in batches:
            float_norm(torch.tensor(batch, dtype=torch.float32))
            norm(torch.tensor(2 * batch + 1, dtype=torch.float32))
    means = np.mean([(batch + 1).mean(axis=(0, 2, 3)) for batch in batches], axis=0)  # 2 b + 1 − b
    ratios = np.mean([(4 * v + 1e-5) / (v + 1e-5) for v in (batch.var(axis=(0, 2, 3)) for batch in batches)], axis=0)
    np.testing.assert_allclose(norm.running_mean.numpy(), start_mean + means, rtol=1e-5)
    np.testing.assert_allclose(norm.running_var.numpy(), start_variance * ratios, rtol=1e-5)
    np.testing.assert_allclose(float_norm.running_mean.numpy(), start_mean, rtol=1e-6)
    before = norm.running_mean.clone(), norm.running_var.clone()
    with norms.following(norm, float_norm):
        for batch in batches:
            float_norm(torch.tensor(batch, dtype=torch.float32))
            norm(torch.tensor(batch, dtype=torch.float32))
    torch.testing.assert_close((norm.running_mean, norm.running_var), before)


@pytest.mark.parametrize("passes", [2, 5, 16])
def test_the_last_layer_is_rounded_on_what_all_others_became(passes: int) -> None:
    groups = layerwise._groups(range(9), passes)
    assert [index for group in groups for index in group] == list(range(9))
    assert groups[-1] == [8]
    assert len(groups) == min(passes, 9)
    assert max(map(len, groups[:-1])) - min(map(len, groups[:-1])) <= 1


def test_all_layers_in_one_pass_and_no_layer_at_all_are_possible() -> None:
    assert layerwise._groups(range(3), 1) == [[0, 1, 2]]
    assert layerwise._groups([], 4) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_classifier_that_sees_fewer_images_than_it_has_features_is_no_worse_on_others_than_plain_rounding(
    seed: int,
) -> None:
    """One row per image, 128 of them for 320 features; outputs on 20,000 images not looked at, NumPy in float64."""
    rng = np.random.default_rng(seed)
    mix = 10 * rng.normal(size=(320, 320)) / 320**0.5 * np.arange(1, 321) ** -0.7

    def features(images: int) -> tuple[np.ndarray, np.ndarray]:
        before = np.maximum(mix @ rng.normal(size=(320, images)) + 0.3, 0)
        return before, 0.8 * before + 0.3 * before.std() * rng.normal(size=before.shape)

    model = nn.Sequential(nn.Linear(320, 10))
    model[0].weight.data = torch.tensor(rng.normal(size=(10, 320))).float()
    layers, _ = find_layers(model)
    weight, bias = (value.detach().double().numpy().copy() for value in (model[0].weight, model[0].bias))
    method = PostTraining(layers, plan_for(layers, 3, Schedule(0, 1), planes=[3]))
    method.write(0)
    nearest = model[0].weight.detach().double().numpy().copy()
    model[0].weight.data = torch.tensor(weight).float()
    rounding = LayerwiseRounding(model, method, [torch.zeros(2, 320)])
    before, after = features(128)
    columns, float_columns = (torch.tensor(value).float().unsqueeze(0) for value in (after, before))
    halves = [InputMoments.like(columns) for _ in range(2)]
    for half, part in zip(halves, (slice(None, 64), slice(64, None)), strict=True):
        half.add(columns[..., part], float_columns[..., part])
    with torch.no_grad():
        rounding._round(0, halves)
    found, found_bias = (value.detach().double().numpy() for value in (model[0].weight, model[0].bias))
    means = (weight @ before).mean(axis=1) + bias  # the bias takes up what became of them
    np.testing.assert_allclose((found @ after).mean(axis=1) + found_bias, means, rtol=1e-3, atol=1e-3)
    fresh, fresh_after = features(20_000)
    shift = (weight @ before - nearest @ after).mean(axis=1)  # plain rounding has its bias corrected too
    wanted = weight @ fresh + bias[:, None]
    plain = np.square(wanted - (nearest @ fresh_after + (bias + shift)[:, None])).mean()
    assert np.square(wanted - (found @ fresh_after + found_bias[:, None])).mean() < plain


@pytest.mark.parametrize(("target", "images", "asked"), [(2, 128, True), (3, 128, False), (2, 1000, False)])
def test_few_planes_ask_for_more_images_where_there_are_some(
    csq, target: float, images: int, asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(post_training, "_MANY_IMAGES", 1000)  # of 1,297
    search = ("search", "--recipe", "digits", "--epochs", 0, "--target-bits", target, "--set", f"images={images}")
    code, _, err = csq(*search, "-o", tmp_path / "run")
    assert code == 0
    assert ("which 128 images are looked at may matter by a point: --set ptq.images=1000" in err) == asked


def test_attention_is_rounded_by_what_it_sees_and_layers_that_are_not_seen_are_named(csq, tmp_path: Path) -> None:
    search = (
        "search",
        "plain_models:Attending",
        "--no-pretrained",
        "--data",
        "digits",
        "--epochs",
        0,
        "--target-bits",
        3,
    )
    code, _, err = csq(*search, "--set", "images=64", "-o", tmp_path / "run")
    assert code == 0, err
    assert (
        "1 layer rounded to the nearest levels, because what they multiply is not seen or too much: widened.weight\n"
        in err
    )


@pytest.mark.parametrize(("more", "augmented"), [({}, False), ({"finetune.epochs": 1, "max_steps": 2}, True)])
def test_activations_are_calibrated_on_images_as_they_will_come_unless_training_follows(
    more: dict[str, int], augmented: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    calibrate = activations.calibrate

    def watched(model: nn.Module, layers: Any, images: Any, **options: Any) -> Any:
        seen.extend(images)
        return calibrate(model, layers, seen, **options)

    monkeypatch.setattr(activations, "calibrate", watched)
    settings = {"augment": "crop-flip", "images": 64, "act_bits": 8, "epochs": 0, "target_bits": 3}
    csqcli.search(recipe="digits", output=tmp_path, **settings, **more)
    pixels = torch.cat(seen)
    first_column = pixels[..., 0].std() / pixels.std()  # digits have next to nothing there, shifted ones have
    assert (float(first_column) > 0.1) == augmented
