"""Which folder is which split, and what takes the place of a validation split that is not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from csqcli.data.class_folders import role_of
from csqcli.data.specs import open_data, same_place
from csqcli.data.splits import Images
from csqcli.errors import UserError


@pytest.fixture
def one_split(image_folder: Path) -> Path:
    """Class folders without any split: 6 images of each of two classes."""
    return (image_folder / "train").rename(image_folder.parent / "unsplit")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("train", "train"), ("Training", "train"), ("TRN", "train"), ("train_images", "train"), ("train2017", "train"),
        ("val", "val"), ("valid", "val"), ("validation", "val"), ("dev", "val"), ("val-set", "val"),
        ("test", "test"), ("Testing", "test"), ("tst", "test"),
        ("trainer", None), ("train_val", None), ("cats", None), ("val_leopards", None), ("2017", None),
    ],
)  # fmt: skip
def test_a_split_is_told_by_any_usual_name(name: str, role: str | None) -> None:
    assert role_of(name) == role


@pytest.mark.parametrize(("train", "val"), [("Training", "Validation"), ("trn", "dev"), ("train_images", "valid")])
def test_folders_in_any_usual_spelling_are_the_same_data(image_folder: Path, train: str, val: str) -> None:
    plain = open_data(str(image_folder))
    (image_folder / "train").rename(image_folder / train)
    (image_folder / "val").rename(image_folder / val)
    opened = open_data(str(image_folder))
    assert (len(opened.train), len(opened.val), opened.classes) == (12, 6, plain.classes)


def test_two_folders_that_say_they_are_the_same_split_are_refused(image_folder: Path) -> None:
    shutil.copytree(image_folder / "val", image_folder / "valid")
    with pytest.raises(UserError, match="val/ and valid/ are both called like the validation split; rename or move"):
        open_data(str(image_folder))


def test_test_is_taken_for_validation_only_where_the_user_says_so(image_folder: Path) -> None:
    (image_folder / "val").rename(image_folder / "test")
    with pytest.raises(UserError, match=r"no validation split; --val-split 0.1 .*, or --val-split test takes its test"):
        open_data(str(image_folder))
    opened = open_data(str(image_folder), val_split="test")
    assert (len(opened.train), len(opened.val)) == (12, 6)
    assert all("/test/" in path for path in opened.val.paths)
    assert len(open_data(str(image_folder), train=False, val_split="test").val) == 6
    for path in (image_folder / "test" / "dark").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="class `dark` has no test images; add some, or remove the class"):
        open_data(str(image_folder), val_split="test")


def test_evaluation_of_data_without_splits_is_told_how_to_take_all(one_split: Path) -> None:
    for asked in (None, "test"):
        with pytest.raises(UserError, match="--val-split 1 takes"):
            open_data(str(one_split), train=False, val_split=asked)
    assert (
        len(open_data(str(one_split), train=False, val_split=1.0).val)
        == len(open_data(str(one_split), val_split=0.5).val) * 2
    )


def test_an_unlabelled_test_folder_is_in_nobody_s_way(image_folder: Path) -> None:
    (image_folder / "val").rename(image_folder / "test")
    for path in list((image_folder / "test").rglob("*.png")):
        path.rename(image_folder / "test" / f"{path.parent.name}{path.name}")
    shutil.rmtree(image_folder / "test" / "dark")
    shutil.rmtree(image_folder / "test" / "bright")
    assert len(open_data(str(image_folder), val_split=0.5).val) == 6
    with pytest.raises(UserError, match="no test split with the classes of the training images"):
        open_data(str(image_folder), val_split="test")


def test_a_share_of_every_class_is_held_out(one_split: Path) -> None:
    opened = open_data(str(one_split), val_split=1 / 3)
    assert opened.train.labels.tolist() == [0] * 4 + [1] * 4  # 6 images of each class: 2 are a third
    assert opened.val.labels.tolist() == [0] * 2 + [1] * 2
    assert not set(opened.train.paths) & set(opened.val.paths)
    assert open_data(str(one_split), val_split=0.01).val.labels.tolist() == [0, 1]  # never none of a class
    assert len(open_data(str(one_split), train=False, val_split=1).val) == 12
    with pytest.raises(UserError, match="--val-split 1: no image is left to train on"):
        open_data(str(one_split), val_split=1)


def test_the_same_images_are_held_out_wherever_the_data_lie(one_split: Path) -> None:
    def held_out(root: Path, **more) -> set[str]:
        images = open_data(str(root), val_split=0.5, **more).val
        return {images.identity(index) for index in range(len(images))}

    first = held_out(one_split)
    assert held_out(one_split, train=False) == first
    moved = Path(shutil.copytree(one_split, one_split.parent / "elsewhere" / "deeper"))
    assert held_out(moved) == first
    packed = Path(shutil.make_archive(str(one_split.parent / "packed"), "zip", one_split))
    assert held_out(packed) == first
    assert len({frozenset(held_out(one_split, val_seed=seed)) for seed in range(4)}) > 1


def test_data_with_a_validation_split_keep_it_and_say_so(image_folder: Path, caplog) -> None:
    assert len(open_data(str(image_folder), val_split=0.5).train) == 12
    assert caplog.messages == [
        f"{image_folder}: has a validation split of its own; val_split 0.5 is for data without one"
    ]


def test_a_folder_around_everything_is_looked_through(image_folder: Path) -> None:
    (image_folder.parent / "outer" / "inner").mkdir(parents=True)
    image_folder.rename(image_folder.parent / "outer" / "inner" / "photographs")
    assert len(open_data(str(image_folder.parent / "outer")).train) == 12


def test_training_images_and_those_held_out_are_one_set_for_any_share() -> None:
    images = Images(torch.arange(5).repeat_interleave(7), pixels=torch.zeros(35, 1, 2, 2, dtype=torch.uint8))
    for share, of_each in ((0.1, 1), (0.3, 2), (0.5, 4), (0.99, 6), (1.0, 7)):
        stays, held_out = images.held_out(share, seed=0)
        assert held_out.labels.bincount(minlength=5).tolist() == [of_each] * 5
        assert len(stays) + len(held_out) == 35


def test_data_and_dot_slash_data_are_the_same_place(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(image_folder.parent)
    assert same_place("images") == same_place("./images/") == same_place(str(image_folder)) == str(image_folder)
    assert same_place("folder:images") == f"folder:{image_folder}"
    assert same_place("digits") == "digits"


def test_search_finetune_and_evaluate_hold_out_the_same_images(csq, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label, level in (("dark", 60), ("bright", 190)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(level - 50, level + 50, (8, 8)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{number}.png")
    arguments = ("search", "digits_cnn", "--no-pretrained", "--target-bits", 2, "--epochs", 1, "-q")
    code, _, err = csq(*arguments, "--data", tmp_path / "data", "-o", tmp_path / "run")
    assert code == 2
    assert "no validation split; --val-split 0.1 holds out a tenth of the training images" in err
    code, _, err = csq(*arguments, "--data", tmp_path / "data", "--val-split", 0.25, "-o", tmp_path / "run")
    assert code == 0, err
    model = tmp_path / "run" / "model.safetensors"
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["accuracy"]["samples"] == 10
    code, out, _ = csq("evaluate", model, "--data", tmp_path / "data", "--json")
    assert json.loads(out)["top1"] == report["accuracy"]["hard_top1"]
    assert json.loads(out)["samples"] == 10
    code, _, err = csq(
        "finetune", model, "--data", tmp_path / "data", "--epochs", 1, "--seed", 9, "-q", "-o", tmp_path / "b"
    )
    assert code == 0, err
    tuned = json.loads((tmp_path / "b" / "report.json").read_text())
    assert tuned["finetune"]["input_top1"] == report["accuracy"]["hard_top1"]
