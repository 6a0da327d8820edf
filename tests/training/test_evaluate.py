"""Accuracy is counted on finite scores only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from csqcli.errors import UserError
from csqcli.training.evaluate import check_scores, evaluate, recalibrate_batchnorm
from csqcli.training.run import Run


class _Loader:
    batches, samples, skipped = 1, 4, 0

    def epoch(self, epoch: int, start: int = 0):
        yield torch.ones(4, 3), torch.zeros(4, dtype=torch.long)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.bias, value)
    with pytest.raises(UserError, match="scores are NaN or infinite"):
        evaluate(model, _Loader())
    nn.init.zeros_(model.bias)
    assert evaluate(model, _Loader()).samples == 4


def test_a_network_of_one_image_size_is_told_how_it_is_built_for_another() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1)
    with pytest.raises(UserError, match=r"leave data.input_size out, .*--set 'model.arguments=\{img_size: 64\}'"):
        check_scores(model, (3, 64, 64), 3, where="vit")
    check_scores(
        timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, img_size=64), (3, 64, 64), 3, where="vit"
    )


class _Returns(nn.Module):
    def __init__(self, *sizes: int, named: bool = False) -> None:
        super().__init__()
        self.sizes, self.named = sizes, named

    def forward(self, images: torch.Tensor) -> Any:
        scores = tuple(torch.zeros(len(images), size) for size in self.sizes)
        if self.named:
            return {f"head{number}": value for number, value in enumerate(scores)}
        return scores if len(scores) > 1 else scores[0]


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (_Returns(7), "m: has 7 outputs for 3 classes; its factory must pass num_classes on to the last layer"),
        (_Returns(4, 3), "m: the first of 2 outputs has 4 scores, not 3; let it come first"),
        (_Returns(4, 3, named=True), "m: the first of 2 outputs has 4 scores, not 3; let it come first"),
    ],
)
def test_outputs_that_are_not_one_score_per_class_are_counted(model: nn.Module, complaint: str) -> None:
    with pytest.raises(UserError) as refused:
        check_scores(model, (3, 8, 8), 3, where="m")
    assert refused.value.line() == complaint


class _Broken(_Loader):
    def epoch(self, epoch: int, start: int = 0):
        yield torch.ones(4, 3), torch.zeros(4, dtype=torch.long)
        raise UserError("the disk is gone")


class _Empty(_Loader):
    def epoch(self, epoch: int, start: int = 0):
        yield torch.empty(0), torch.empty(0, dtype=torch.long)  # no image of it could be decoded
        yield torch.arange(12.0).view(4, 3), torch.zeros(4, dtype=torch.long)


def test_a_recalibration_that_fails_leaves_the_averages_as_they_were_configured() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.3), nn.Linear(3, 2))
    with pytest.raises(UserError, match="the disk is gone"):
        recalibrate_batchnorm(model, _Broken(), epoch=0, batches=4)
    assert model[0].momentum == 0.3
    assert model.training


def test_a_batch_without_images_is_passed_over() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    recalibrate_batchnorm(model, _Empty(), epoch=0, batches=2)
    assert model[0].running_mean.tolist() == [4.5, 5.5, 6.5]


@pytest.mark.parametrize(
    ("classes", "top1", "asked"), [(2, 74.0, False), (2, 54.0, True), (10, 14.0, True), (10, 16.0, False)]
)
def test_only_what_is_near_a_guess_is_said_to_be_chance(classes: int, top1: float, asked: bool) -> None:
    said: list[str] = []
    run: Any = SimpleNamespace(
        record=SimpleNamespace(accuracy=SimpleNamespace(float_top1=top1, float_top1_present=None, samples=100)),
        images=SimpleNamespace(num_classes=classes),
        source=SimpleNamespace(weights_from="a checkpoint"),
        recipe=SimpleNamespace(model=SimpleNamespace(head="auto")),
        display=SimpleNamespace(say=said.append),
    )
    Run.tell_float(run)
    assert any("which is about chance" in line for line in said) == asked
