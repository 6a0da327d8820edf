"""Stored class names against the data's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from csqcli import evaluating
from csqcli.data.classes import match_classes
from csqcli.data.specs import open_data
from csqcli.data.splits import DataSet, Images
from csqcli.errors import UserError


def test_names_in_another_order_are_mapped_to_the_model_s_outputs() -> None:
    assert match_classes(["cat", "dog", "owl"], ["cat", "dog", "owl"]) == [0, 1, 2]
    assert match_classes(["owl", "cat", "dog"], ["cat", "dog", "owl"]) == [1, 2, 0]
    assert match_classes(["owl", "cat", "dog"], ["cat", "owl"]) == [1, 0]
    images = Images(torch.tensor([0, 2, 1]), paths=["a", "b", "c"])
    moved = DataSet("x", ["cat", "dog", "owl"], images, None).relabelled([1, 2, 0], ["owl", "cat", "dog"])
    assert moved.val.labels.tolist() == [1, 0, 2]
    assert moved.classes == ["owl", "cat", "dog"]


def test_foreign_names_are_refused_unless_positions_are_asked_for() -> None:
    with pytest.raises(
        UserError, match=r"here: class `fish` is not one of the model's 2; `csq evaluate --classes-by-position`"
    ):
        match_classes(["cat", "dog"], ["cat", "fish"], where="here")
    with pytest.raises(UserError, match="did you mean `cats`"):
        match_classes(["cats", "dogs"], ["cat", "dog"])
    assert match_classes(["cat", "dog"], ["fish", "owl"], by_position=True) == [0, 1]
    with pytest.raises(UserError, match="the model has 2 classes, the data has 3"):
        match_classes(["cat", "dog"], ["a", "b", "c"], by_position=True)


def test_a_name_that_stands_twice_says_so() -> None:
    with pytest.raises(UserError, match="the model has two classes `crane`"):
        match_classes(["crane", "dog", "crane"], ["dog", "crane"])
    assert match_classes(["crane", "crane"], ["crane", "crane"]) == [0, 1]  # exactly as stored


def backwards(text: str, *, train: bool) -> DataSet:
    """The digits with classes from 9 to 0, called ``text`` and the digit."""
    return open_data("digits").relabelled(range(9, -1, -1), [f"{text}{digit}" for digit in range(9, -1, -1)])


def test_a_file_is_evaluated_by_its_own_class_names(digits_run: Path, csq, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "somebody", sys.modules[__name__])
    path = digits_run / "model.safetensors"
    there, _ = evaluating.evaluate_file(path, "digits", device="cpu")
    back, _ = evaluating.evaluate_file(path, "somebody:backwards", device="cpu")
    assert there == back
    assert there.top1 > 90
    code, _, err = csq("evaluate", path, "--data", "somebody:backwards:digit-")
    assert (
        code,
        "class `digit-9` is not one of the model's 10, nor are 9 more; `csq evaluate --classes-by-position`" in err,
    ) == (
        2,
        True,
    )
    code, out, _ = csq("evaluate", path, "--data", "somebody:backwards:digit-", "--classes-by-position")
    assert (code, "of 500 images" in out) == (0, True)
    by_position, _ = evaluating.evaluate_file(path, "somebody:backwards:digit-", device="cpu", classes_by_position=True)
    assert by_position.top1 < 20  # 4 and 5 swap places, no digit keeps its own


def test_finetuning_maps_classes_by_name_too(digits_run: Path, tmp_path: Path, csq, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "somebody", sys.modules[__name__])
    code, _, err = csq(
        *("finetune", digits_run / "model.safetensors", "--data", "somebody:backwards", "--epochs", 1),
        *("--quiet", "-o", tmp_path / "more"),
    )
    assert (code, err) == (0, "")
    assert evaluating.evaluate_file(tmp_path / "more" / "model.safetensors", "digits", device="cpu")[0].top1 > 90
