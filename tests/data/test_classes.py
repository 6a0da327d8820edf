"""Stored class names against the data's."""

from __future__ import annotations

import pytest
import torch

from csqcli.data.classes import match_classes
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
    with pytest.raises(UserError, match=r"here: class `fish` is not one of the model's 2; pass --classes-by-position"):
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
