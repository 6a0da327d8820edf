"""Staying near the float model: the distance of what the classifier reads, and what follows from it for a run."""

from __future__ import annotations

import copy
import json
import re
from importlib import resources

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import csqcli
from csqcli.errors import UserError
from csqcli.training import run
from csqcli.training.loop import Trainer
from csqcli.training.teacher import Teacher, feature_distance


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def test_the_distance_of_features_is_that_of_its_formula_in_float64() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(6, 9)), rng.normal(size=(6, 9))
    wanted = np.mean(((ours - theirs) ** 2).sum(1) / (theirs**2).sum(1))
    found = feature_distance(torch.tensor(ours).float(), torch.tensor(theirs).float())
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    assert torch.isfinite(feature_distance(torch.ones(2, 3), torch.zeros(2, 3)))


def test_the_whole_loss_is_labels_predictions_and_features_at_their_weights() -> None:
    model, float_model = network(0), network(0).eval()
    teacher = Teacher(model, distill=0.25, features=3.0)
    teacher.watch(model)
    model.load_state_dict(network(1).state_dict())  # as training moves it away
    images, labels = torch.randn(8, 3, 6, 6), torch.randint(0, 5, (8,))
    scores = model(images)
    found = teacher.loss(images, scores, nn.functional.cross_entropy(scores, labels), amp=False)

    with torch.no_grad():
        ours, theirs = model[:-1](images).double().numpy(), float_model[:-1](images).double().numpy()
        p, q = scores.double().softmax(1).numpy(), float_model(images).double().softmax(1).numpy()
    cross = -np.log(p[np.arange(8), labels.numpy()]).mean()
    divergence = (q * (np.log(q) - np.log(p))).sum(1).mean()
    distance = (((ours - theirs) ** 2).sum(1) / (theirs**2).sum(1)).mean()
    assert float(found.detach()) == pytest.approx(0.75 * cross + 0.25 * divergence + 3 * distance, rel=1e-4)

    found.backward()
    assert model[0].weight.grad is not None
    copy.deepcopy(model)  # nothing of the graph stays behind


def test_a_model_equal_to_the_float_one_is_at_distance_zero() -> None:
    model = network()
    teacher = Teacher(model, distill=0.0, features=1.0)
    teacher.watch(model)
    images = torch.randn(4, 3, 6, 6)
    scores = model(images)
    assert float(teacher.loss(images, scores, torch.zeros(()), amp=False).detach()) == 0


def test_a_model_without_one_classifier_is_told_what_to_leave_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    with pytest.raises(UserError) as error:
        Teacher(model, distill=0.0, features=1.0)
    assert re.search("optimizer.distill_features", error.value.line())


def test_an_input_that_is_rounded_for_the_classifier_is_compared_as_it_is_read() -> None:
    model = network()
    teacher = Teacher(model, distill=0.0, features=1.0)
    teacher.watch(model)
    model[-1].register_forward_pre_hook(
        lambda layer, inputs: (torch.zeros_like(inputs[0]),)
    )  # as --act-bits, afterwards
    images = torch.randn(4, 3, 6, 6)
    found = teacher.loss(images, model(images), torch.zeros(()), amp=False)
    assert float(found.detach()) == pytest.approx(1.0)  # ‖0 − h*‖² / ‖h*‖²


def test_a_search_that_stays_near_the_features_ends_elsewhere(csq, tmp_path) -> None:
    common = ("search", "--recipe", "digits", "--epochs", 1, "--target-bits", 2, "-q", "--set", "max_steps=6")
    weights = []
    for name, weight in (("without", 0), ("with", 5.0)):
        code, _, error = csq(*common, "-o", tmp_path / name, "--set", f"distill_features={weight}")
        assert code == 0, error
        weights.append(
            torch.cat([p.flatten() for p in csqcli.load(tmp_path / name / "model.safetensors").parameters()])
        )
    assert not torch.equal(*weights)


def test_rounding_without_training_and_a_finetune_after_it_take_a_recipe_that_follows_features(
    csq, tmp_path, monkeypatch
) -> None:
    copied: list[bool] = []
    monkeypatch.setattr(run, "Teacher", lambda *given, **more: copied.append(True) or Teacher(*given, **more))
    common = ("search", "--recipe", "digits", "--epochs", 0, "--target-bits", 2, "-q", "--set", "ptq.images=64")
    trained = ("--finetune-epochs", 1, "--set", "max_steps=6")
    for name, words, teachers in (("rounded", (), 0), ("trained", trained, 1)):
        copied.clear()
        code, _, error = csq(*common, *words, "--set", "distill_features=16", "--distill", 0.9, "-o", tmp_path / name)
        assert code == 0, error
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert (len(copied), "finetune" in report) == (teachers, teachers == 1)


def test_search_and_finetune_of_one_run_follow_the_same_features(csq, tmp_path) -> None:
    rounded = ("--act-bits", 8, "--finetune-epochs", 1, "--set", "distill_features=1", "--set", "max_steps=2")
    recipe = ("--recipe", "digits", "--epochs", 1, "--target-bits", 2)
    code, _, error = csq("search", *recipe, *rounded, "-q", "-o", tmp_path / "run")
    assert code == 0, error
    assert "finetune" in (tmp_path / "run" / "report.json").read_text()


def test_a_finetune_of_a_file_follows_the_float_weights_that_are_named(csq, digits_run, tmp_path) -> None:
    common = ("finetune", digits_run, "--data", "digits", "--epochs", 1, "-q", "--set", "max_steps=6")
    named = ("--set", "distill=0.9", "--set", "distill_features=1", "--teacher", "builtin:digits_float")
    found = {}
    for name, words in (("alone", ()), ("followed", named), ("again", named)):
        code, _, error = csq(*common, *words, "--force", "-o", tmp_path / name)
        assert code == 0, error
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found[name] = json.loads(lines[-1])["train_loss"]
    assert found["followed"] == found["again"] != found["alone"]


def test_a_teacher_of_another_network_one_not_named_and_one_not_followed_are_refused(csq, digits_run, tmp_path) -> None:
    common = ("finetune", digits_run, "--data", "digits", "--epochs", 1, "-q")
    other, share = tmp_path / "other.pth", ("--set", "distill=0.5")
    torch.save(nn.Linear(3, 10).state_dict(), other)
    followed, itself = ("--teacher", "builtin:digits_float"), ("--teacher", digits_run)
    for words, said in (
        (share, "--teacher FILE"),
        ((*share, "--teacher", other), "other.pth"),
        ((*share, *itself), "is quantized"),
        (followed, "no share"),
    ):
        code, _, error = csq(*common, *words, "-o", tmp_path / "run")
        assert code == 2
        assert said in error
        assert not (tmp_path / "run").exists()


def test_a_finetune_that_goes_on_wants_the_same_teacher(csq, digits_run, tmp_path, monkeypatch) -> None:
    teacher = tmp_path / "teacher.safetensors"
    weights = load_file(str(resources.files("csqcli") / "assets" / "digits_float.safetensors"))
    save_file(weights, teacher)
    words = (
        "finetune",
        digits_run,
        "--data",
        "digits",
        "--epochs",
        2,
        "-q",
        "-o",
        tmp_path / "run",
        "--teacher",
        teacher,
    )
    settings = ("--set", "distill=0.5", "--set", "max_steps=2")
    whole = Trainer.run_epoch

    def stopped(self: Trainer, epoch: int, **more: object) -> dict[str, object]:
        if epoch == 1:
            raise KeyboardInterrupt
        return whole(self, epoch, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "run_epoch", stopped)
        assert csq(*words, *settings)[0] == 130
    other = {name: value * 1.01 if value.is_floating_point() else value for name, value in weights.items()}
    save_file(other, teacher)
    code, _, error = csq(*words, *settings, "--resume")
    assert (code, "was started with another teacher" in error) == (2, True)
    moved = tmp_path / "moved.safetensors"
    save_file(weights, moved)
    resumed = [moved if word == teacher else word for word in words]
    code, _, error = csq(*resumed, *settings, "--resume")
    assert code == 0, error
    whole_run = [tmp_path / "whole" if word == tmp_path / "run" else word for word in resumed]
    assert csq(*whole_run, *settings)[0] == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    again = ("finetune", tmp_path / "run", "--data", "digits", "--epochs", 1, "-q", "-o", tmp_path / "again")
    assert "name it: --teacher FILE" in csq(*again, "--set", "distill=0.5")[2]  # no file says what is read
